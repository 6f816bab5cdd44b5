"""Where an artifact is: one value for each kind of place, made by ``puller.resolve``.

Values only. What is secret in them is in no ``repr``, no ``uri`` and no ``identity``. An identity
says what makes two locations the same artifact; the source of the credentials belongs to it: what
one storage key may read is not served to the holder of another.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import urlsplit

ANONYMOUS: Final = "no credentials (anonymous)"


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
class LocalArchiveLocation:
    """An archive on this machine that was found to be readable: it is unpacked into the cache."""

    uri: str
    path: str  # real, absolute

    @property
    def identity(self) -> tuple[str, ...]:
        return ("archive", self.path)


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
        return self.object_uri(self.prefix)

    def object_uri(self, key: str) -> str:
        return f"s3://{self.bucket}/{key}"

    @property
    def where(self) -> str:
        return self.endpoint or f"AWS ({self.region})"

    @property
    def identity(self) -> tuple[str, ...]:
        return ("s3", self.endpoint, self.bucket, self.prefix, self.credentials_from)


@dataclass(frozen=True, slots=True)
class GcsCredentials:
    """A service account's key, or the file of Google's own tools that has one."""

    client_email: str = ""
    private_key: str = field(default="", repr=False)
    private_key_id: str = field(default="", repr=False)
    credentials_file: str = ""  # GOOGLE_APPLICATION_CREDENTIALS

    @property
    def anonymous(self) -> bool:
        return not self.private_key and not self.credentials_file


@dataclass(frozen=True, slots=True)
class GcsLocation:
    bucket: str
    prefix: str
    endpoint: str  # "" is Google itself
    credentials: GcsCredentials
    credentials_from: str
    certificate_pem: str = field(default="", repr=False)

    @property
    def uri(self) -> str:
        return self.object_uri(self.prefix)

    def object_uri(self, key: str) -> str:
        return f"gs://{self.bucket}/{key}"

    @property
    def where(self) -> str:
        return self.endpoint or "Google Cloud Storage"

    @property
    def identity(self) -> tuple[str, ...]:
        return ("gs", self.endpoint, self.bucket, self.prefix, self.credentials_from)


@dataclass(frozen=True, slots=True)
class AzureCredentials:
    """One of: an account key, a shared access signature, a service principal, a federated token."""

    account_key: str = field(default="", repr=False)
    shared_access_signature: str = field(default="", repr=False)
    client_id: str = field(default="", repr=False)
    client_secret: str = field(default="", repr=False)
    tenant_id: str = ""
    federated_token_file: str = ""
    authority: str = ""  # who gives tokens; "" is Microsoft's public cloud

    @property
    def anonymous(self) -> bool:
        return not (
            self.account_key
            or self.shared_access_signature
            or self.client_secret
            or self.federated_token_file
        )


@dataclass(frozen=True, slots=True)
class AzureLocation:
    account: str
    bucket: str  # the container
    prefix: str
    endpoint: str  # "" is the account's own address in the public cloud
    credentials: AzureCredentials
    credentials_from: str
    certificate_pem: str = field(default="", repr=False)

    @property
    def uri(self) -> str:
        return self.object_uri(self.prefix)

    def object_uri(self, key: str) -> str:
        return f"azure://{self.bucket}/{key}"

    @property
    def where(self) -> str:
        return self.endpoint or f"https://{self.account}.blob.core.windows.net"

    @property
    def identity(self) -> tuple[str, ...]:
        where = self.endpoint or self.account
        return ("azure", where, self.bucket, self.prefix, self.credentials_from)


@dataclass(frozen=True, slots=True)
class HttpLocation:
    """One file. The query of its URL may be a signature, so it is not shown."""

    url: str = field(repr=False)
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    certificate_pem: str = field(default="", repr=False)
    client_certificate_pem: str = field(default="", repr=False)
    client_key_pem: str = field(default="", repr=False)
    credentials_from: str = ANONYMOUS

    @property
    def uri(self) -> str:
        bare, query, _ = self.url.partition("?")
        return f"{bare}?…" if query else bare

    @property
    def where(self) -> str:
        parts = urlsplit(self.url)
        return f"{parts.scheme}://{parts.netloc}"

    @property
    def identity(self) -> tuple[str, ...]:
        return ("http", self.url, self.credentials_from)


StoreLocation = S3Location | GcsLocation | AzureLocation
RemoteLocation = StoreLocation | HttpLocation | LocalArchiveLocation
Location = FileLocation | PvcLocation | RemoteLocation
