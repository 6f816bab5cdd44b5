"""The ``storage-config`` secret as a folder: each entry a file that only its owner reads.

Reads what a Secret resource holds and writes it where serving pods look (their --storage-config).
A file is replaced as a whole, so that a reader sees the old entry or the new one. Only files that
were written from here are ever deleted: what a person put beside them stays.

A wrong resource is ``InvalidArgument``, a folder that cannot be written is ``OSError``. No value
of a secret is in any message.
"""

from __future__ import annotations

import base64
import binascii
import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal

from mesh.core.errors import InvalidArgument
from mesh.manifest_fields import wrong

log = logging.getLogger(__name__)

KIND: Final = "Secret"
NAME: Final = "storage-config"
# What the API server takes as a key; "." and ".." aside, which no file can be.
_KEY: Final = re.compile(r"[-._a-zA-Z0-9]{1,253}")
_SECRET_MAX_BYTES: Final = 1 << 20  # Kubernetes' bound on a secret
# Which files are ours. Readers of the folder pass over what begins with a dot.
_WRITTEN: Final = ".written"

Written = Literal["created", "configured", "unchanged"]


def data_of(secret: Mapping[str, Any] | None) -> dict[str, bytes]:
    """What a secret of an API server holds; {} for none. A value that is not base64 is left out."""
    found: dict[str, bytes] = {}
    for key, value in ((secret or {}).get("data") or {}).items():
        try:
            found[key] = base64.b64decode(value, validate=True)
        except (binascii.Error, ValueError):
            log.warning("the storage secret's entry %r is not base64", key)
    return found


def is_secret(resource: Mapping[str, Any]) -> bool:
    return resource.get("kind") == KIND


def applied_secret(resource: Mapping[str, Any]) -> dict[str, bytes]:
    """What the secret ``storage-config`` holds as a person wrote it: ``stringData`` goes before
    ``data``. Raises InvalidArgument."""
    if resource.get("apiVersion") != "v1":
        raise wrong("apiVersion", "v1", resource.get("apiVersion"))
    metadata = resource.get("metadata")
    name = metadata.get("name") if isinstance(metadata, Mapping) else None
    if name != NAME:
        raise InvalidArgument(
            f"metadata.name: the only secret that a mesh reads is {NAME!r}; found {name!r}"
        )
    found: dict[str, bytes] = {}
    for key, text in _entries(resource, "data"):
        try:
            found[key] = base64.b64decode("".join(text.split()), validate=True)
        except (binascii.Error, ValueError):
            raise InvalidArgument(
                f"data.{key}: expected base64 (plain text goes under stringData)"
            ) from None
    for key, text in _entries(resource, "stringData"):
        found[key] = text.encode()
    if sum(map(len, found.values())) > _SECRET_MAX_BYTES:
        raise InvalidArgument(f"data: expected at most {_SECRET_MAX_BYTES} bytes in all")
    return found


def _entries(resource: Mapping[str, Any], part: str) -> list[tuple[str, str]]:
    entries = resource.get(part) or {}
    if not isinstance(entries, Mapping):
        raise InvalidArgument(f"{part}: expected a mapping of a storage key to its text")
    for key, text in entries.items():
        if not _KEY.fullmatch(key) or key.startswith("."):
            raise wrong(f"{part}: a key", "letters, digits, '-', '_' and '.', no dot first", key)
        if not isinstance(text, str):
            raise InvalidArgument(f"{part}.{key}: expected a string (JSON in quotes or a block)")
    return list(entries.items())


def write_folder(folder: Path, data: Mapping[str, bytes]) -> Written:
    """Make the folder hold that: each entry a file of mode 0600; an entry that was written before
    and is none any more goes. An API server takes entries that begin with a dot as well; no reader
    of the folder looks at them, and our own mark is one. Raises OSError."""
    data = {key: value for key, value in data.items() if not key.startswith(".")}
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    before = _written_before(folder)
    changed = [key for key, value in data.items() if _content(folder / key) != value]
    gone = (before or frozenset()) - data.keys()
    if before == frozenset(data) and not changed:
        return "unchanged"
    # Ours first: whoever ends between here and there has no file that nobody takes away.
    marked = sorted({*data, *gone})
    _write(folder, _WRITTEN, json.dumps(marked).encode())
    for key in changed:
        _write(folder, key, data[key])
    for key in gone:
        (folder / key).unlink(missing_ok=True)
    if gone:
        _write(folder, _WRITTEN, json.dumps(sorted(data)).encode())
    return "created" if before is None else "configured"


def _written_before(folder: Path) -> frozenset[str] | None:
    """None when nothing was ever written from here."""
    try:
        names = json.loads((folder / _WRITTEN).read_bytes())
    except (OSError, ValueError):
        return None
    if not isinstance(names, list):
        return None
    return frozenset(
        key
        for key in names
        if isinstance(key, str) and _KEY.fullmatch(key) and not key.startswith(".")
    )


def _content(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None


def _write(folder: Path, name: str, content: bytes) -> None:
    partial = folder / f".{name}.partial"
    partial.unlink(missing_ok=True)
    partial.touch(mode=0o600)
    partial.write_bytes(content)
    partial.replace(folder / name)
