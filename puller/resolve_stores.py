"""S3, Google Cloud Storage, Azure and http(s): an entry of the storage secret, or the environment,
and a path → the location with everything that its back end needs. Pure; see ``puller.resolve``.

A model's own words choose the bucket (container) and the path; the address and the credentials come
from the operator. An entry for http is used only below its own ``url``: its headers and its client
certificate go nowhere else.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final
from urllib.parse import quote, unquote, urlsplit

import orjson

from mesh.core.errors import LoadFailed
from puller.location import (
    ANONYMOUS,
    AzureCredentials,
    AzureLocation,
    GcsCredentials,
    GcsLocation,
    HttpLocation,
    S3Credentials,
    S3Location,
)
from puller.safe_path import UnsafePathError, safe_relative_path
from puller.storage_key import ModelKey, StorageEntry, checked_endpoint, checked_prefix

_BUCKET: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,254}")
_CONTAINER: Final = re.compile(r"\$root|\$web|[a-z0-9](?:[a-z0-9]|-(?=[a-z0-9])){2,62}")
_ACCOUNT: Final = re.compile(r"[a-z0-9]{3,24}")
# Azure's addresses, with and without a DNS zone, in its public and its national clouds.
_AZURE_HOST: Final = re.compile(
    r"https://([a-z0-9]{3,24})\.(?:z\d{1,2}\.)?blob\."
    r"(?:core\.windows\.net|storage\.azure\.net|core\.chinacloudapi\.cn|core\.usgovcloudapi\.net)"
    r"/([^?#]*)",
    re.IGNORECASE,
)
# As Google writes it into the keys that it gives out, now and in former years.
_GOOGLE_TOKENS: Final = re.compile(
    r"https://(?:[a-z0-9-]+\.)?googleapis\.com/[\w/.-]*|https://accounts\.google\.com/o/oauth2/token"
)
_HEADER_NAME: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_HEADER_VALUE: Final = re.compile(r"[\t\x20-\x7e\x80-\xff]*")
_HEADERS_MAX: Final = 64
_FORBIDDEN_HEADERS: Final = frozenset(
    {"host", "range", "if-match", "content-length", "transfer-encoding", "connection"}
)
_AWS_DEFAULT_REGION: Final = "us-east-1"


def s3_location(
    path: str, key: ModelKey, entry: StorageEntry | None, store_env: Mapping[str, str]
) -> S3Location:
    key.check_params("s3")
    bucket = _bucket(key, entry, path, ("bucket", "default_bucket"), _BUCKET)
    prefix = checked_prefix(path, f"path in bucket {bucket!r}")
    region = key.params.get("region", "")
    if entry is None:
        return _s3_from_environment(bucket, prefix, region, store_env)
    credentials = S3Credentials(
        access_key_id=entry.text("access_key_id"),
        secret_access_key=entry.text("secret_access_key"),
        session_token=entry.text("session_token"),
    )
    if bool(credentials.access_key_id) != bool(credentials.secret_access_key):
        raise LoadFailed(f"{entry.shown} has only one of access_key_id and secret_access_key")
    return S3Location(
        bucket=bucket,
        prefix=prefix,
        endpoint=entry.endpoint("endpoint_url"),
        region=region or entry.text("region") or _AWS_DEFAULT_REGION,
        credentials=credentials,
        credentials_from=entry.shown,
        certificate_pem=entry.text("certificate"),
    )


def _s3_from_environment(
    bucket: str, prefix: str, region: str, store_env: Mapping[str, str]
) -> S3Location:
    credentials = S3Credentials(
        access_key_id=store_env.get("AWS_ACCESS_KEY_ID", ""),
        secret_access_key=store_env.get("AWS_SECRET_ACCESS_KEY", ""),
        session_token=store_env.get("AWS_SESSION_TOKEN", ""),
        web_identity_token_file=store_env.get("AWS_WEB_IDENTITY_TOKEN_FILE", ""),
        role_arn=store_env.get("AWS_ROLE_ARN", ""),
        role_session_name=store_env.get("AWS_ROLE_SESSION_NAME", ""),
    )
    if bool(credentials.access_key_id) != bool(credentials.secret_access_key):
        raise LoadFailed("only one of AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY is set")
    endpoint = store_env.get("AWS_ENDPOINT_URL_S3") or store_env.get("AWS_ENDPOINT_URL") or ""
    return S3Location(
        bucket=bucket,
        prefix=prefix,
        endpoint=checked_endpoint(endpoint, "AWS_ENDPOINT_URL"),
        region=region
        or store_env.get("AWS_REGION")
        or store_env.get("AWS_DEFAULT_REGION")
        or _AWS_DEFAULT_REGION,
        credentials=credentials,
        credentials_from=ANONYMOUS if credentials.anonymous else "the AWS environment",
        certificate_file=store_env.get("AWS_CA_BUNDLE", ""),
    )


def gcs_location(
    path: str, key: ModelKey, entry: StorageEntry | None, store_env: Mapping[str, str]
) -> GcsLocation:
    key.check_params("gcs")
    bucket = _bucket(key, entry, path, ("bucket",), _BUCKET)
    prefix = checked_prefix(path, f"path in bucket {bucket!r}")
    if entry is None:
        credentials = GcsCredentials(
            credentials_file=store_env.get("GOOGLE_APPLICATION_CREDENTIALS", "")
        )
        endpoint = checked_endpoint(
            store_env.get("STORAGE_EMULATOR_HOST", ""), "STORAGE_EMULATOR_HOST"
        )
        origin = ANONYMOUS if credentials.anonymous else "GOOGLE_APPLICATION_CREDENTIALS"
        return GcsLocation(bucket, prefix, endpoint, credentials, origin)
    credentials = GcsCredentials(
        client_email=entry.text("client_email"),
        private_key=entry.text("private_key"),
        private_key_id=entry.text("private_key_id"),
    )
    if bool(credentials.client_email) != bool(credentials.private_key):
        raise LoadFailed(f"{entry.shown} has only one of client_email and private_key")
    token_uri = entry.text("token_uri")
    if token_uri and not _GOOGLE_TOKENS.fullmatch(token_uri):
        raise LoadFailed(
            f"token_uri of {entry.shown} is not Google's (https://oauth2.googleapis.com/token): "
            "tokens are signed here by the key and no other address is ever asked for one; leave "
            "it out where the endpoint takes such tokens"
        )
    endpoint = entry.endpoint("endpoint_url")
    certificate = entry.text("certificate")
    return GcsLocation(bucket, prefix, endpoint, credentials, entry.shown, certificate)


def azure_account_of(uri: str) -> str:
    """The account of a blob's own address; "" for any other URI, and for a signed link."""
    match = _AZURE_HOST.match(uri)
    return match[1].lower() if match and match.end() == len(uri) and match[2] else ""


def azure_location(
    path: str,
    key: ModelKey,
    entry: StorageEntry | None,
    store_env: Mapping[str, str],
    *,
    account: str = "",
) -> AzureLocation:
    """``account``: the one that the URI names, if it does."""
    key.check_params("azure")
    container = _bucket(key, entry, path, ("container", "bucket"), _CONTAINER)
    prefix = checked_prefix(path, f"path in container {container!r}")
    if entry is not None:
        own, credentials, endpoint = _azure_entry(entry)
        if account and own and account != own:
            if key.storage_key:
                raise LoadFailed(
                    f"{entry.shown} is for account {own!r}, the URI names account {account!r}"
                )
            entry = None  # the default is for another account
    if entry is None:
        return _azure_from_environment(account, container, prefix, store_env)
    account = own or account
    if not _ACCOUNT.fullmatch(account):
        raise LoadFailed(f"{entry.shown} has no account_name (3 to 24 small letters and digits)")
    certificate = entry.text("certificate")
    return AzureLocation(
        account, container, prefix, endpoint, credentials, entry.shown, certificate
    )


def _azure_entry(entry: StorageEntry) -> tuple[str, AzureCredentials, str]:
    """(account, credentials, endpoint)."""
    connection = entry.text("connection_string")
    if connection:
        return _connection_string(connection, entry)
    credentials = AzureCredentials(
        account_key=entry.text("account_key"),
        shared_access_signature=entry.text("sas_token").removeprefix("?"),
        client_id=entry.text("client_id"),
        client_secret=entry.text("client_secret"),
        tenant_id=entry.text("tenant_id"),
        authority=checked_endpoint(entry.text("authority_host"), entry.shown),
    )
    principal = (credentials.client_id, credentials.client_secret, credentials.tenant_id)
    if any(principal) and not all(principal):
        raise LoadFailed(f"{entry.shown} has only some of client_id, client_secret and tenant_id")
    return entry.text("account_name"), credentials, entry.endpoint("endpoint_url")


def _connection_string(text: str, entry: StorageEntry) -> tuple[str, AzureCredentials, str]:
    parts: dict[str, str] = {}
    for part in filter(None, (part.strip() for part in text.split(";"))):
        name, found, value = part.partition("=")
        if not found:
            raise LoadFailed(f"connection_string of {entry.shown} is not NAME=VALUE;NAME=VALUE")
        parts[name.lower()] = value
    account = parts.get("accountname", "") or entry.text("account_name")
    endpoint = checked_endpoint(parts.get("blobendpoint", ""), entry.shown)
    suffix = parts.get("endpointsuffix", "")
    if not endpoint and suffix and suffix != "core.windows.net":
        scheme = parts.get("defaultendpointsprotocol", "https")
        endpoint = checked_endpoint(f"{scheme}://{account}.blob.{suffix}", entry.shown)
    credentials = AzureCredentials(
        account_key=parts.get("accountkey", ""),
        shared_access_signature=parts.get("sharedaccesssignature", "").removeprefix("?"),
    )
    if credentials.anonymous:
        raise LoadFailed(
            f"connection_string of {entry.shown} has no AccountKey and no SharedAccessSignature"
        )
    return account, credentials, endpoint


def _azure_from_environment(
    account: str, container: str, prefix: str, store_env: Mapping[str, str]
) -> AzureLocation:
    own = store_env.get("AZURE_STORAGE_ACCOUNT_NAME") or store_env.get("AZURE_STORAGE_ACCOUNT", "")
    credentials = AzureCredentials(
        account_key=store_env.get("AZURE_STORAGE_ACCESS_KEY")
        or store_env.get("AZURE_STORAGE_ACCOUNT_KEY", ""),
        shared_access_signature=store_env.get("AZURE_STORAGE_SAS_TOKEN", "").removeprefix("?"),
        client_id=store_env.get("AZURE_CLIENT_ID", ""),
        client_secret=store_env.get("AZURE_CLIENT_SECRET", ""),
        tenant_id=store_env.get("AZURE_TENANT_ID", ""),
        federated_token_file=store_env.get("AZURE_FEDERATED_TOKEN_FILE", ""),
        authority=checked_endpoint(
            store_env.get("AZURE_AUTHORITY_HOST", ""), "AZURE_AUTHORITY_HOST"
        ),
    )
    endpoint = checked_endpoint(
        store_env.get("AZURE_STORAGE_ENDPOINT", ""), "AZURE_STORAGE_ENDPOINT"
    )
    # Keys and signatures are one account's. Whoever names another one reads it as anybody may.
    bound = credentials.account_key or credentials.shared_access_signature or own or endpoint
    if account and account != own and bound:
        credentials, endpoint = AzureCredentials(), ""
    account = account or own
    if not _ACCOUNT.fullmatch(account):
        raise LoadFailed(
            f"no storage account for azure://{container}/{prefix}: name one in a storage key "
            "(account_name) or in AZURE_STORAGE_ACCOUNT_NAME, or write "
            "https://ACCOUNT.blob.core.windows.net/CONTAINER/PATH"
        )
    origin = ANONYMOUS if credentials.anonymous else "the AZURE environment"
    return AzureLocation(account, container, prefix, endpoint, credentials, origin)


def http_location(path: str, key: ModelKey, entry: StorageEntry | None) -> HttpLocation:
    """``path`` below the ``url`` of an entry."""
    key.check_params("http")
    base = entry.text("url") if entry is not None else ""
    if entry is None or not base:
        name = "" if entry is None else entry.name
        raise LoadFailed(f"storage key {name!r} of type http has no 'url' for path {path!r}")
    prefix = checked_prefix(path, f"path below the url of {entry.shown}")
    url = f"{base.rstrip('/')}/{quote(prefix)}" if prefix else base
    return _http_with_entry(_checked_url(url), entry)


def http_location_of_uri(uri: str, key: ModelKey, entry: StorageEntry | None) -> HttpLocation:
    key.check_params("http")
    url = _checked_url(uri)
    if entry is None:
        return HttpLocation(url)
    base = _checked_url(entry.text("url")) if entry.text("url") else ""
    if base and _is_below(url, base):
        return _http_with_entry(url, entry)
    if not key.storage_key:
        return HttpLocation(url)  # the default is for another place
    raise LoadFailed(
        f"{HttpLocation(url).uri} does not lie below the 'url' of {entry.shown}; "
        "its headers and certificates are used only there"
    )


def _http_with_entry(url: str, entry: StorageEntry) -> HttpLocation:
    certificate, key = entry.text("client_certificate"), entry.text("client_key")
    if bool(certificate) != bool(key):
        raise LoadFailed(f"{entry.shown} has only one of client_certificate and client_key")
    return HttpLocation(
        url=url,
        headers=_headers(entry),
        certificate_pem=entry.text("certificate"),
        client_certificate_pem=certificate,
        client_key_pem=key,
        credentials_from=entry.shown,
    )


def _headers(entry: StorageEntry) -> Mapping[str, str]:
    """An object of strings, or the same as text; ModelMesh's lists of values are joined."""
    raw: Any = entry.fields.get("headers") or {}
    if isinstance(raw, str):
        try:
            raw = orjson.loads(raw)
        except orjson.JSONDecodeError:
            raw = None
    if not isinstance(raw, dict) or len(raw) > _HEADERS_MAX:
        raise LoadFailed(f"'headers' of {entry.shown} is not an object of strings")
    found: dict[str, str] = {}
    for name, value in raw.items():
        if isinstance(value, list) and all(isinstance(one, str) for one in value):
            value = ", ".join(value)
        if not isinstance(value, str) or not _HEADER_VALUE.fullmatch(value):
            raise LoadFailed(f"header {name!r} of {entry.shown} is no text that a header may have")
        if not _HEADER_NAME.fullmatch(name) or name.lower() in _FORBIDDEN_HEADERS:
            raise LoadFailed(f"{entry.shown} may not set the header {name!r}")
        found[name] = value
    return found


def _checked_url(url: str) -> str:
    try:
        parts = urlsplit(url)
        host = parts.hostname
        _ = parts.port
    except ValueError:
        raise LoadFailed("the http address cannot be read as a URL") from None
    if parts.scheme.lower() not in ("http", "https") or not host:
        raise LoadFailed("the http address is not http://HOST/PATH or https://HOST/PATH")
    if "@" in parts.netloc:
        raise LoadFailed(
            f"the address at {host} carries a user name; put an Authorization header into a "
            "storage key of type http"
        )
    if any(ord(char) <= 0x20 or ord(char) == 0x7F for char in url):
        raise LoadFailed(f"the address at {host} contains a blank or a control character")
    path = unquote(parts.path).strip("/")
    try:
        if path:
            safe_relative_path(path)
    except UnsafePathError as error:
        raise LoadFailed(f"the address at {host} refused: {error}") from None
    return parts._replace(scheme=parts.scheme.lower(), fragment="").geturl()


def _is_below(url: str, base: str) -> bool:
    mine, its = urlsplit(url), urlsplit(base)
    if (mine.scheme, mine.netloc.lower()) != (its.scheme, its.netloc.lower()):
        return False
    root = unquote(its.path).rstrip("/")
    return not root or unquote(mine.path) == root or unquote(mine.path).startswith(root + "/")


def _bucket(
    key: ModelKey,
    entry: StorageEntry | None,
    path: str,
    names: tuple[str, ...],
    pattern: re.Pattern[str],
) -> str:
    found = [key.params.get(name, "") for name in names]
    if entry is not None:
        found += [entry.text(name) for name in names]
    bucket = next(filter(None, found), "")
    what = names[0]
    if not bucket:
        name = "" if entry is None else entry.name
        raise LoadFailed(
            f"no {what} for path {path!r}: storage key {name!r} has none; "
            f"set {what!r} there or in the model's storage parameters"
        )
    if not pattern.fullmatch(bucket):
        raise LoadFailed(f"{bucket!r} is not the name of a {what}")
    return bucket
