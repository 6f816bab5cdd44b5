"""A model's ``key`` and the storage secret → one entry, and its fields as checked text. Pure.

``key`` is the JSON that KServe's ModelMesh mode writes: ``storage_key``, ``storage_params`` (and
the old ``bucket``); other fields belong to others. The entry is chosen as in KServe: the one that
is named, else ``default_<type>`` when a type is known, else ``default``. ``storage_params`` may
override what ``OVERRIDABLE`` lists. Not endpoint or credentials, or whoever may register a model
could have our credentials used against an address of his own.

Fails with ``LoadFailed`` (FAILED_PRECONDITION), naming the field; a value is in no message.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import orjson

from mesh.core.errors import LoadFailed
from puller.safe_path import UnsafePathError, safe_relative_path

OVERRIDABLE: Final[dict[str, frozenset[str]]] = {
    "s3": frozenset({"type", "bucket", "default_bucket", "region"}),
    "gcs": frozenset({"type", "bucket"}),
    "azure": frozenset({"type", "bucket", "container"}),
    "http": frozenset({"type"}),
    "pvc": frozenset({"type", "name"}),
}


@dataclass(frozen=True, slots=True)
class StorageSecret:
    """The storage secret as it was read: ``where`` is its folder, for messages."""

    where: str
    entries: Mapping[str, str] = field(default_factory=dict, repr=False)

    def shown(self) -> str:
        if not self.where:
            return ": no storage secret is configured (--storage-config, MESH_STORAGE_CONFIG)"
        if not self.entries:
            return f" in storage secret {self.where!r} (it has no entries)"
        names = sorted(self.entries)
        some = ", ".join(names[:20]) + (", …" if len(names) > 20 else "")
        return f" in storage secret {self.where!r} (its keys: {some})"


@dataclass(frozen=True, slots=True)
class StorageEntry:
    """One entry of the secret."""

    name: str
    fields: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def text(self, name: str) -> str:
        """A field, stripped; "" when it is not there."""
        value = self.fields.get(name, "")
        if value is None:
            return ""
        if not isinstance(value, str):
            raise LoadFailed(f"{name!r} of storage key {self.name!r} is not a string")
        return value.strip()

    def endpoint(self, name: str) -> str:
        return checked_endpoint(self.text(name), f"storage key {self.name!r}")

    @property
    def shown(self) -> str:
        return f"storage key {self.name!r}"


@dataclass(frozen=True, slots=True)
class ModelKey:
    storage_key: str
    params: Mapping[str, str]

    def type_of(self, entry: StorageEntry | None) -> str:
        kind = self.params.get("type") or (entry.fields.get("type") if entry is not None else "")
        return kind.lower() if isinstance(kind, str) else ""

    def check_params(self, kind: str) -> None:
        unknown = sorted(set(self.params) - OVERRIDABLE[kind])
        if unknown:
            raise LoadFailed(
                f"storage parameter {unknown[0]!r} cannot be set by a model for storage type "
                f"{kind!r} (can be: {', '.join(sorted(OVERRIDABLE[kind]))}); "
                "put it into the entry of the storage secret"
            )


def parse_key(key: str) -> ModelKey:
    if not key.strip():
        return ModelKey("", {})
    try:
        document = orjson.loads(key)
    except orjson.JSONDecodeError:
        document = None
    if not isinstance(document, dict):
        raise LoadFailed(
            "the model's key is not a JSON object; expected for example "
            '{"storage_key": "my-storage", "storage_params": {"bucket": "models"}}'
        )
    storage_key = document.get("storage_key") or ""
    if not isinstance(storage_key, str):
        raise LoadFailed("storage_key in the model's key is not a string")
    raw = document.get("storage_params") or {}
    if not isinstance(raw, dict) or not all(isinstance(value, str) for value in raw.values()):
        raise LoadFailed("storage_params in the model's key is not an object of strings")
    params = {name: value for name, value in raw.items() if value}
    bucket = document.get("bucket")
    if bucket and isinstance(bucket, str):
        params.setdefault("bucket", bucket)
    return ModelKey(storage_key, params)


def choose_entry(key: ModelKey, kind: str, secret: StorageSecret) -> StorageEntry | None:
    if key.storage_key:
        if key.storage_key not in secret.entries:
            raise LoadFailed(f"specified storage key {key.storage_key!r} not found{secret.shown()}")
        return _parse_entry(key.storage_key, secret)
    for name in (f"default_{kind}" if kind else "", "default"):
        if name and name in secret.entries:
            return _parse_entry(name, secret)
    return None


def entry_for_uri(key: ModelKey, kind: str, uri: str, secret: StorageSecret) -> StorageEntry | None:
    """The entry for a URI of this type. A default of another type is for something else."""
    entry = choose_entry(key, kind, secret)
    if entry is None or key.type_of(entry) in (kind, ""):
        return entry
    if key.storage_key:
        raise LoadFailed(
            f"{entry.shown} is of type {key.type_of(entry)!r}, which cannot read {uri}"
        )
    return None


def checked_endpoint(url: str, where: str) -> str:
    if not url:
        return ""
    scheme, found, host = url.partition("://")
    if not found or scheme.lower() not in ("http", "https") or not host.strip("/"):
        raise LoadFailed(f"the endpoint in {where} is not an http:// or https:// URL")
    if "@" in host:
        raise LoadFailed(f"the endpoint in {where} carries a user name; use the key's own fields")
    return url.rstrip("/")


def checked_prefix(path: str, what: str) -> str:
    """A path inside a bucket, claim or container; "" is all of it."""
    path = path.strip("/")
    if path:
        try:
            safe_relative_path(path)
        except UnsafePathError as error:
            raise LoadFailed(f"{what} refused: {error}") from None
    return path


def _parse_entry(name: str, secret: StorageSecret) -> StorageEntry:
    try:
        document = orjson.loads(secret.entries[name])
    except orjson.JSONDecodeError:
        document = None
    if not isinstance(document, dict):
        raise LoadFailed(
            f"entry {name!r} of storage secret {secret.where!r} is not a JSON object"
        ) from None  # the cause would quote the secret
    return StorageEntry(name, document)
