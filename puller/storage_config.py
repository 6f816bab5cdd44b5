"""Reads KServe's ``storage-config`` secret as Kubernetes mounts it: a folder, one file per key.

Read afresh for every fetch, so that a changed secret counts at once. Gives the raw text of every
entry; ``puller.location`` parses the one that is chosen, so that a broken entry harms only its
own models. Fails with ``LoadFailed``: FAILED_PRECONDITION when the folder is not there or an entry
is no text. Values are secrets: never put them into a message or a log.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

from mesh.core.errors import LoadFailed

ENTRY_MAX_BYTES: Final = 1 << 20  # Kubernetes bounds a whole secret to this
ENTRIES_MAX: Final = 1_000


def read_storage_config(directory: Path | None) -> Mapping[str, str]:
    """Entry name → its text; empty when no folder is configured. Blocking (small files)."""
    if directory is None:
        return {}
    try:
        paths = sorted(path for path in directory.iterdir() if not path.name.startswith("."))
    except FileNotFoundError:
        return {}  # an optional secret that is not there is mounted as nothing
    except OSError as error:
        raise LoadFailed(
            f"the storage secret in {str(directory)!r} cannot be read: {error.strerror}"
        ) from error
    if len(paths) > ENTRIES_MAX:
        raise LoadFailed(
            f"the storage secret in {str(directory)!r} has {len(paths)} entries, "
            f"more than {ENTRIES_MAX}"
        )
    return {path.name: _read_entry(path) for path in paths if path.is_file()}


def _read_entry(path: Path) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(ENTRY_MAX_BYTES + 1)
    except OSError as error:
        raise LoadFailed(
            f"entry {path.name!r} of the storage secret in {str(path.parent)!r} cannot be read: "
            f"{error.strerror}"
        ) from error
    if len(content) > ENTRY_MAX_BYTES:
        return ""  # parsed as broken if it is ever chosen
    return content.decode("utf-8", errors="replace")
