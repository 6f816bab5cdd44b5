"""Decides where an artifact is: a model's ``path`` and ``key`` → one ``Location``. Pure.

``path`` is a URI (``file:///dir``, ``pvc://claim/dir``, ``s3://bucket/dir``) or a path inside the
storage that ``key`` names. ``key`` is the JSON that KServe's ModelMesh mode writes:
``storage_key``, ``storage_params`` (and the old ``bucket``); other fields belong to others. An
entry of the storage secret is chosen as in KServe: the key that is named, else ``default_<type>``
when a type is known, else ``default``; ``storage_params`` override type, bucket, region and claim
name. They do not override endpoint or credentials, or whoever may register a model could have our
credentials used against an address of his own.

Must not touch disk or network. Fails with ``LoadFailed`` (FAILED_PRECONDITION), naming the
offending field; a secret's value is in no message and in no ``repr``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import unquote

import orjson

from mesh.core.errors import LoadFailed
from puller.safe_path import UnsafePathError, safe_relative_path

SUPPORTED: Final = ("file", "pvc", "s3")
_TYPE_OF_SCHEME: Final[dict[str, str]] = {
    "file": "file",
    "pvc": "pvc",
    "s3": "s3",
    "gs": "gcs",
    "gcs": "gcs",
    "azure": "azure",
    "abfs": "azure",
    "http": "http",
    "https": "http",
    "hf": "hf",
    "oci": "oci",
    "hdfs": "hdfs",
    "webhdfs": "webhdfs",
}
_OVERRIDABLE: Final[dict[str, frozenset[str]]] = {
    "s3": frozenset({"type", "bucket", "default_bucket", "region"}),
    "pvc": frozenset({"type", "name"}),
}
_BUCKET: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,254}")
_CLAIM: Final = re.compile(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?")
_SCHEME: Final = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_AWS_DEFAULT_REGION: Final = "us-east-1"


@dataclass(frozen=True, slots=True)
class FileLocation:
    """A path on this machine; whether it may be read is the operator's ``file_roots``'s say."""

    path: str  # absolute

    @property
    def uri(self) -> str:
        return f"file://{self.path}"


@dataclass(frozen=True, slots=True)
class PvcLocation:
    """A path in a mounted volume claim; ``path`` is relative, "" is the whole claim."""

    claim: str
    path: str

    @property
    def uri(self) -> str:
        return f"pvc://{self.claim}/{self.path}"


@dataclass(frozen=True, slots=True)
class S3Credentials:
    """Static keys, or the names of the files and roles that give temporary ones."""

    access_key_id: str = field(default="", repr=False)
    secret_access_key: str = field(default="", repr=False)
    session_token: str = field(default="", repr=False)
    web_identity_token_file: str = ""
    role_arn: str = ""
    role_session_name: str = ""

    @property
    def anonymous(self) -> bool:
        return not self.access_key_id and not self.web_identity_token_file


@dataclass(frozen=True, slots=True)
class S3Location:
    bucket: str
    prefix: str  # an object, or the "folder" whose objects are the artifact; "" is the bucket
    endpoint: str  # "" is AWS itself
    region: str
    credentials: S3Credentials
    credentials_from: str  # for a person: which storage key or environment
    certificate_pem: str = field(default="", repr=False)
    certificate_file: str = ""  # AWS_CA_BUNDLE; read by whoever connects

    @property
    def uri(self) -> str:
        return f"s3://{self.bucket}/{self.prefix}"

    @property
    def identity(self) -> tuple[str, ...]:
        """What makes two locations the same artifact. The source of the credentials belongs to
        it: what one storage key may read is not served to the holder of another."""
        return ("s3", self.endpoint, self.bucket, self.prefix, self.credentials_from)


Location = FileLocation | PvcLocation | S3Location


@dataclass(frozen=True, slots=True)
class StorageSecret:
    """The storage secret as it was read: ``where`` is its folder, for messages."""

    where: str
    entries: Mapping[str, str] = field(default_factory=dict, repr=False)


@dataclass(frozen=True, slots=True)
class _Key:
    storage_key: str
    params: Mapping[str, str]


def resolve_location(
    path: str, key: str, *, secret: StorageSecret, aws_env: Mapping[str, str]
) -> Location:
    """Where the artifact of a model with this ``path`` and ``key`` is. See the module."""
    parsed = _parse_key(key)
    scheme = _SCHEME.match(path)
    if scheme is not None:
        return _resolve_uri(scheme.group(1).lower(), path[scheme.end() :], parsed, secret, aws_env)
    return _resolve_in_storage(path, parsed, secret, aws_env)


def _parse_key(key: str) -> _Key:
    if not key.strip():
        return _Key("", {})
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
    return _Key(storage_key, params)


def _resolve_uri(
    scheme: str, rest: str, key: _Key, secret: StorageSecret, aws_env: Mapping[str, str]
) -> Location:
    kind = _TYPE_OF_SCHEME.get(scheme)
    if kind is None or kind not in SUPPORTED:
        raise LoadFailed(
            f"{scheme}:// is not supported yet; an artifact can be at "
            + ", ".join(f"{name}://" for name in SUPPORTED)
        )
    if kind == "file":
        return _file_location(rest)
    head, _, tail = rest.partition("/")
    if kind == "pvc":
        return _pvc_location(head, tail)
    entry_name, entry = _choose_entry(key, "s3", secret)
    if entry is not None and _type_of(entry, key) not in ("s3", ""):
        if key.storage_key:
            raise LoadFailed(
                f"storage key {entry_name!r} is of type {_type_of(entry, key)!r}, "
                f"which cannot read s3://{head}"
            )
        entry_name, entry = "", None  # the default is for something else
    params = {**key.params, "bucket": head}
    return _s3_location(tail, entry_name, entry, params, aws_env)


def _resolve_in_storage(
    path: str, key: _Key, secret: StorageSecret, aws_env: Mapping[str, str]
) -> Location:
    entry_name, entry = _choose_entry(key, key.params.get("type", ""), secret)
    if entry is None and "type" not in key.params:
        raise LoadFailed(
            f"path {path!r} is not a URI, no storage key is given, and there is no 'default' "
            f"entry{_in_secret(secret)}; use s3://, pvc:// or file://, or name a storage key"
        )
    kind = _type_of(entry or {}, key)
    match kind:
        case "s3":
            return _s3_location(path, entry_name, entry, key.params, aws_env)
        case "pvc":
            _check_params("pvc", key.params)
            claim = key.params.get("name") or _text(entry or {}, "name", entry_name)
            return _pvc_location(claim, path)
        case "":
            raise LoadFailed(f"storage key {entry_name!r} has no 'type'; give it one, such as s3")
        case _:
            raise LoadFailed(
                f"storage type {kind!r} (storage key {entry_name!r}) is not supported yet; "
                "supported are s3, pvc"
            )


def _choose_entry(
    key: _Key, kind: str, secret: StorageSecret
) -> tuple[str, Mapping[str, Any] | None]:
    if key.storage_key:
        if key.storage_key not in secret.entries:
            raise LoadFailed(
                f"specified storage key {key.storage_key!r} not found{_in_secret(secret)}"
            )
        return key.storage_key, _parse_entry(key.storage_key, secret)
    for name in (f"default_{kind}" if kind else "", "default"):
        if name and name in secret.entries:
            return name, _parse_entry(name, secret)
    return "", None


def _parse_entry(name: str, secret: StorageSecret) -> Mapping[str, Any]:
    try:
        document = orjson.loads(secret.entries[name])
    except orjson.JSONDecodeError:
        document = None
    if not isinstance(document, dict):
        raise LoadFailed(
            f"entry {name!r} of storage secret {secret.where!r} is not a JSON object"
        ) from None  # the cause would quote the secret
    return document


def _type_of(entry: Mapping[str, Any], key: _Key) -> str:
    kind = key.params.get("type") or entry.get("type") or ""
    return kind.lower() if isinstance(kind, str) else ""


def _check_params(kind: str, params: Mapping[str, str]) -> None:
    unknown = sorted(set(params) - _OVERRIDABLE[kind])
    if unknown:
        raise LoadFailed(
            f"storage parameter {unknown[0]!r} cannot be set by a model for storage type {kind!r} "
            f"(can be: {', '.join(sorted(_OVERRIDABLE[kind]))}); "
            "put it into the entry of the storage secret"
        )


def _s3_location(
    path: str,
    entry_name: str,
    entry: Mapping[str, Any] | None,
    params: Mapping[str, str],
    aws_env: Mapping[str, str],
) -> S3Location:
    _check_params("s3", params)
    fields: Mapping[str, Any] = entry or {}
    bucket = (
        params.get("bucket")
        or params.get("default_bucket")
        or _text(fields, "bucket", entry_name)
        or _text(fields, "default_bucket", entry_name)
    )
    if not bucket:
        raise LoadFailed(
            f"no bucket for path {path!r}: storage key {entry_name!r} has none; "
            "set 'bucket' there or in the model's storage parameters"
        )
    if not _BUCKET.fullmatch(bucket):
        raise LoadFailed(f"{bucket!r} is not the name of a bucket")
    prefix = path.strip("/")
    if prefix:
        _check_relative(prefix, f"path in bucket {bucket!r}")
    region = params.get("region", "")
    if entry is None:
        return _s3_from_environment(bucket, prefix, region, aws_env)
    credentials = S3Credentials(
        access_key_id=_text(entry, "access_key_id", entry_name),
        secret_access_key=_text(entry, "secret_access_key", entry_name),
        session_token=_text(entry, "session_token", entry_name),
    )
    if bool(credentials.access_key_id) != bool(credentials.secret_access_key):
        raise LoadFailed(
            f"storage key {entry_name!r} has only one of access_key_id and secret_access_key"
        )
    return S3Location(
        bucket=bucket,
        prefix=prefix,
        endpoint=_endpoint(_text(entry, "endpoint_url", entry_name), f"storage key {entry_name!r}"),
        region=region or _text(entry, "region", entry_name) or _AWS_DEFAULT_REGION,
        credentials=credentials,
        credentials_from=f"storage key {entry_name!r}",
        certificate_pem=_text(entry, "certificate", entry_name),
    )


def _s3_from_environment(
    bucket: str, prefix: str, region: str, aws_env: Mapping[str, str]
) -> S3Location:
    credentials = S3Credentials(
        access_key_id=aws_env.get("AWS_ACCESS_KEY_ID", ""),
        secret_access_key=aws_env.get("AWS_SECRET_ACCESS_KEY", ""),
        session_token=aws_env.get("AWS_SESSION_TOKEN", ""),
        web_identity_token_file=aws_env.get("AWS_WEB_IDENTITY_TOKEN_FILE", ""),
        role_arn=aws_env.get("AWS_ROLE_ARN", ""),
        role_session_name=aws_env.get("AWS_ROLE_SESSION_NAME", ""),
    )
    if bool(credentials.access_key_id) != bool(credentials.secret_access_key):
        raise LoadFailed("only one of AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY is set")
    endpoint = aws_env.get("AWS_ENDPOINT_URL_S3") or aws_env.get("AWS_ENDPOINT_URL") or ""
    anonymous = credentials.anonymous
    return S3Location(
        bucket=bucket,
        prefix=prefix,
        endpoint=_endpoint(endpoint, "AWS_ENDPOINT_URL"),
        region=region
        or aws_env.get("AWS_REGION")
        or aws_env.get("AWS_DEFAULT_REGION")
        or _AWS_DEFAULT_REGION,
        credentials=credentials,
        credentials_from="no credentials (anonymous)" if anonymous else "the AWS environment",
        certificate_file=aws_env.get("AWS_CA_BUNDLE", ""),
    )


def _endpoint(url: str, where: str) -> str:
    if not url:
        return ""
    scheme, found, host = url.partition("://")
    if not found or scheme.lower() not in ("http", "https") or not host.strip("/"):
        raise LoadFailed(f"the endpoint in {where} is not an http:// or https:// URL")
    if "@" in host:
        raise LoadFailed(f"the endpoint in {where} carries a user name; use the key's own fields")
    return url.rstrip("/")


def _text(entry: Mapping[str, Any], name: str, entry_name: str) -> str:
    value = entry.get(name, "")
    if value is None:
        return ""
    if not isinstance(value, str):
        raise LoadFailed(f"{name!r} of storage key {entry_name!r} is not a string")
    return value.strip()


def _file_location(rest: str) -> FileLocation:
    host, slash, tail = rest.partition("/")
    if host not in ("", "localhost") or not slash:
        raise LoadFailed(
            f"file://{rest} does not name an absolute path of this machine; "
            "write file:///dir/model (three slashes)"
        )
    # As a URI: bytes that are no UTF-8 become U+FFFD, which names no file.
    path = unquote(tail).strip("/")
    if path:
        _check_relative(path, f"file:///{tail}")
    return FileLocation("/" + path)


def _pvc_location(claim: str, path: str) -> PvcLocation:
    if not claim:
        raise LoadFailed("the name of the volume claim is missing (pvc://CLAIM/path, or 'name')")
    if not _CLAIM.fullmatch(claim) or ".." in claim:
        raise LoadFailed(f"{claim!r} is not the name of a volume claim")
    path = path.strip("/")
    if path:
        _check_relative(path, f"path in volume claim {claim!r}")
    return PvcLocation(claim, path)


def _check_relative(path: str, what: str) -> None:
    try:
        safe_relative_path(path)
    except UnsafePathError as error:
        raise LoadFailed(f"{what} refused: {error}") from None


def _in_secret(secret: StorageSecret) -> str:
    if not secret.where:
        return ": no storage secret is configured (--storage-config, MESH_STORAGE_CONFIG)"
    if not secret.entries:
        return f" in storage secret {secret.where!r} (it has no entries)"
    names = sorted(secret.entries)
    shown = ", ".join(names[:20]) + (", …" if len(names) > 20 else "")
    return f" in storage secret {secret.where!r} (its keys: {shown})"
