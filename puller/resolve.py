"""(path, key, storage secret, environment) → one ``Location``. Pure: touches no disk, no network.

``path`` is a URI or a path inside the storage that ``key`` names. The scheme, or the entry's type,
decides which of ``puller.resolve_stores`` reads the rest. ``https://ACCOUNT.blob.core.windows.net``
is Azure, as KServe has it, unless it carries a query: then it is a signed link to one file. Fails
with ``LoadFailed`` (FAILED_PRECONDITION) that names the field; a scheme that is not served is told
with what to use instead.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final
from urllib.parse import unquote

from mesh.core.errors import LoadFailed
from puller.location import FileLocation, Location, PvcLocation
from puller.resolve_stores import (
    azure_account_of,
    azure_location,
    gcs_location,
    http_location,
    http_location_of_uri,
    s3_location,
)
from puller.storage_key import (
    ModelKey,
    StorageEntry,
    StorageSecret,
    checked_prefix,
    choose_entry,
    entry_for_uri,
    parse_key,
)

SUPPORTED: Final = ("file", "pvc", "s3", "gs", "azure", "abfs", "http", "https")
_TYPE_OF_SCHEME: Final[dict[str, str]] = {
    "file": "file",
    "pvc": "pvc",
    "s3": "s3",
    "gs": "gcs",
    "gcs": "gcs",
    "azure": "azure",
    "abfs": "azure",
    "abfss": "azure",
    "http": "http",
    "https": "http",
}
_INSTEAD: Final[dict[str, str]] = {
    "hf": "copy the repository into a bucket or onto a volume, or name one file of it by its "
    "https:// address (https://huggingface.co/OWNER/NAME/resolve/REVISION/FILE)",
    "oci": "copy the model out of the image into a bucket or onto a volume",
    "hdfs": "copy it into a bucket, or mount it as a volume and use pvc://",
    "webhdfs": "copy it into a bucket; one file may come by its http:// address, if that needs no "
    "redirect to another scheme",
}
_TYPES: Final = ("s3", "gcs", "azure", "http", "pvc")
_CLAIM: Final = re.compile(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?")
_SCHEME: Final = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")


def resolve_location(
    path: str, key: str, *, secret: StorageSecret, store_env: Mapping[str, str]
) -> Location:
    """Where the artifact of a model with this ``path`` and ``key`` is. See the module."""
    parsed = parse_key(key)
    scheme = _SCHEME.match(path)
    if scheme is None:
        return _resolve_in_storage(path, parsed, secret, store_env)
    return _resolve_uri(scheme[1].lower(), path, path[scheme.end() :], parsed, secret, store_env)


def _resolve_uri(
    scheme: str,
    uri: str,
    rest: str,
    key: ModelKey,
    secret: StorageSecret,
    store_env: Mapping[str, str],
) -> Location:
    kind = _TYPE_OF_SCHEME.get(scheme)
    head, _, tail = rest.partition("/")
    match kind:
        case "file":
            return _file_location(rest)
        case "pvc":
            return _pvc_location(head, tail)
        case "s3" | "gcs":
            entry = entry_for_uri(key, kind, f"{scheme}://{head}", secret)
            key = ModelKey(key.storage_key, {**key.params, "bucket": head})
            make = s3_location if kind == "s3" else gcs_location
            return make(tail, key, entry, store_env)
        case "azure":
            return _azure_of_uri(head, tail, key, secret, store_env)
        case "http":
            account = azure_account_of(uri)
            if account:
                container, _, blob = unquote(tail).partition("/")
                return _azure_of_uri(f"{container}@{account}", blob, key, secret, store_env)
            entry = entry_for_uri(key, "http", f"{scheme}://{head}", secret)
            return http_location_of_uri(uri, key, entry)
    instead = _INSTEAD.get(scheme, "copy it into a bucket or onto a volume")
    raise LoadFailed(
        f"{scheme}:// is not supported: {instead}; an artifact can be at "
        + ", ".join(f"{name}://" for name in SUPPORTED)
    )


def _azure_of_uri(
    head: str, tail: str, key: ModelKey, secret: StorageSecret, store_env: Mapping[str, str]
) -> Location:
    """``CONTAINER/path``, or ``CONTAINER@ACCOUNT[.dfs.core.windows.net]/path`` as Hadoop has it."""
    container, _, host = head.partition("@")
    entry = entry_for_uri(key, "azure", f"azure://{head}", secret)
    key = ModelKey(key.storage_key, {**key.params, "container": container})
    account = host.partition(".")[0]
    return azure_location(tail, key, entry, store_env, account=account)


def _resolve_in_storage(
    path: str, key: ModelKey, secret: StorageSecret, store_env: Mapping[str, str]
) -> Location:
    entry = choose_entry(key, key.params.get("type", ""), secret)
    if entry is None and "type" not in key.params:
        raise LoadFailed(
            f"path {path!r} is not a URI, no storage key is given, and there is no 'default' "
            f"entry{secret.shown()}; use {', '.join(f'{name}://' for name in SUPPORTED)}, or name "
            "a storage key"
        )
    kind = key.type_of(entry)
    match kind:
        case "s3":
            return s3_location(path, key, entry, store_env)
        case "gcs":
            return gcs_location(path, key, entry, store_env)
        case "azure":
            return azure_location(path, key, entry, store_env)
        case "http":
            return http_location(path, key, entry)
        case "pvc":
            key.check_params("pvc")
            claim = key.params.get("name") or (entry.text("name") if entry is not None else "")
            return _pvc_location(claim, path)
    name = _name(entry)
    if not kind:
        raise LoadFailed(f"storage key {name!r} has no 'type'; give it one, such as s3")
    instead = _INSTEAD.get(kind)
    raise LoadFailed(
        f"storage type {kind!r} (storage key {name!r}) is not supported"
        + (f": {instead}" if instead else "")
        + f"; supported are {', '.join(_TYPES)}"
    )


def _name(entry: StorageEntry | None) -> str:
    return entry.name if entry is not None else ""


def _file_location(rest: str) -> FileLocation:
    host, slash, tail = rest.partition("/")
    if host not in ("", "localhost") or not slash:
        raise LoadFailed(
            f"file://{rest} does not name an absolute path of this machine; "
            "write file:///dir/model (three slashes)"
        )
    # As a URI: bytes that are no UTF-8 become U+FFFD, which names no file.
    return FileLocation("/" + checked_prefix(unquote(tail), f"file:///{tail}"))


def _pvc_location(claim: str, path: str) -> PvcLocation:
    if not claim:
        raise LoadFailed("the name of the volume claim is missing (pvc://CLAIM/path, or 'name')")
    if not _CLAIM.fullmatch(claim) or ".." in claim:
        raise LoadFailed(f"{claim!r} is not the name of a volume claim")
    return PvcLocation(claim, checked_prefix(path, f"path in volume claim {claim!r}"))
