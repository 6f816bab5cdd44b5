"""What S3, Google Cloud Storage and Azure have in common, through ``obstore``.

Turns a location into a manifest and ranged reads, and every error into one of ``puller.source``'s
three. All settings are given explicitly, because the library would otherwise fill the gaps from
this process's environment. Its own retries are off: ``puller.source`` counts them. Error texts of
the library carry whole replies; of these only the status and the store's error code are taken over,
so that nothing secret can reach a message.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import TYPE_CHECKING, Final

import obstore
from obstore import exceptions

from mesh.core.errors import LoadFailed
from puller.disk import Chunk
from puller.location import StoreLocation
from puller.manifest import Manifest, RemoteObject, folder_manifest, single_manifest
from puller.settings import PullerSettings
from puller.source import ObjectChangedError, TransientSourceError

if TYPE_CHECKING:
    from obstore import ObjectMeta
    from obstore.store import ClientConfig, ObjectStore, RetryConfig

ERRORS: Final = (exceptions.BaseError, OSError, ValueError)
RETRY: Final[RetryConfig] = {"max_retries": 0, "retry_timeout": timedelta(seconds=1)}
_STATUS: Final = re.compile(r"status code: (\d{3})")
_CODE: Final = re.compile(r"<Code>([A-Za-z0-9.]{1,64})</Code>")
_LIST_CHUNK: Final = 1_000  # what one reply of a store holds
_NO_BUCKET: Final = frozenset({"NoSuchBucket", "ContainerNotFound"})
_REFUSED: Final = frozenset(
    {
        "AccessDenied",
        "AuthenticationFailed",
        "AuthorizationFailure",
        "ExpiredToken",
        "InvalidAccessKeyId",
        "InvalidToken",
        "SignatureDoesNotMatch",
        "TokenRefreshRequired",
        "AccountProblem",
        "AllAccessDisabled",
    }
)
_ELSEWHERE: Final = frozenset(
    {"AuthorizationHeaderMalformed", "PermanentRedirect", "TemporaryRedirect"}
)


class StoreSource:
    """``puller.source.RemoteSource`` for one location."""

    def __init__(
        self, location: StoreLocation, store: ObjectStore, settings: PullerSettings
    ) -> None:
        self._location = location
        self._settings = settings
        self._store = store

    async def manifest(self) -> Manifest:
        """One object of that name, else all below it; asked for at once, it is one round trip."""
        uri, prefix = self._location.uri, self._location.prefix
        if not prefix:
            folder = folder_manifest("", await self._list(), uri)
        else:
            listed, head = await asyncio.gather(self._list(), self._head(), return_exceptions=True)
            if isinstance(head, RemoteObject):
                return single_manifest(head, uri)
            if isinstance(listed, BaseException):
                raise listed
            folder = folder_manifest(prefix, listed, uri)
            # S3 answers 403 for an object that is not there to who may not list: believe the list.
            if folder is None and isinstance(head, BaseException):
                raise head
        if folder is None:
            raise LoadFailed(f"{uri} does not exist: no object has that name or lies below it")
        return folder

    async def read(self, source: RemoteObject, start: int, end: int | None) -> AsyncIterator[Chunk]:
        options: obstore.GetOptions = {}
        # If-Match never holds for a weak ETag; the reply's is compared below in any case.
        if source.etag is not None and not source.etag.startswith("W/"):
            options["if_match"] = source.etag
        if end is not None and (start, end) != (0, source.size_bytes):
            options["range"] = (start, end)
        try:
            result = await obstore.get_async(self._store, source.key, options=options)
            if result.meta["size"] != source.size_bytes or (
                source.etag is not None and _quoted(result.meta["e_tag"]) != source.etag
            ):
                raise ObjectChangedError(source.key)  # a server that ignores If-Match
            async for chunk in result.stream(min_chunk_size=self._settings.chunk_bytes):
                yield memoryview(chunk)
        except ERRORS as error:
            raise classify(error, self._location, source.key) from None

    async def close(self) -> None:
        """The store stays open for others."""

    async def _list(self) -> list[RemoteObject]:
        found: list[RemoteObject] = []
        try:
            listing = obstore.list(
                self._store, prefix=self._location.prefix or None, chunk_size=_LIST_CHUNK
            )
            async for chunk in listing:
                for meta in chunk:
                    found.append(_object(meta["path"], meta))
                if len(found) > self._settings.max_artifact_files:
                    raise LoadFailed(
                        f"{self._location.uri} has more than "
                        f"{self._settings.max_artifact_files} objects; is this one model?"
                    )
        except ERRORS as error:
            raise classify(error, self._location, None) from None
        return found

    async def _head(self) -> RemoteObject | None:
        try:
            meta = await obstore.head_async(self._store, self._location.prefix)
        except FileNotFoundError:
            return None
        except ERRORS as error:
            raise classify(error, self._location, self._location.prefix) from None
        return _object(self._location.prefix, meta)


def _object(key: str, meta: ObjectMeta) -> RemoteObject:
    return RemoteObject(key, meta["size"], _quoted(meta["e_tag"]))


def _quoted(etag: str | None) -> str | None:
    """As RFC 9110 writes it: some servers leave the quotes out of their listings."""
    return etag if etag is None or '"' in etag else f'"{etag}"'


def client_options(settings: PullerSettings, endpoint: str, certificate_pem: str) -> ClientConfig:
    client: ClientConfig = {
        "allow_http": endpoint.lower().startswith("http://"),
        "connect_timeout": timedelta(milliseconds=settings.connect_timeout_ms),
        "read_timeout": timedelta(milliseconds=settings.read_timeout_ms),
        "timeout": timedelta(milliseconds=settings.request_timeout_ms),
    }
    if certificate_pem:
        client["root_certificate"] = certificate_pem
    return client


def classify(error: Exception, location: StoreLocation, key: str | None) -> Exception:
    """What an error of the library means; the texts are those of obstore 0.10 to 0.12."""
    text = str(error)
    status_match, code_match = _STATUS.search(text), _CODE.search(text)
    status = int(status_match[1]) if status_match else 0
    code = code_match[1] if code_match else ""
    where = location.where
    uri = location.uri if key is None else location.object_uri(key)
    said = f"{status} {code}".strip()
    if isinstance(error, exceptions.PreconditionError) or status == 412:
        return ObjectChangedError(uri)
    if isinstance(error, exceptions.InvalidPathError):
        name = re.search(r'[Pp]ath "((?:[^"\\]|\\.){0,300})', text)
        return LoadFailed(
            f"{location.uri} refused: the name of one of its objects is unsafe: "
            f"{name[1] if name else ''!r} would leave the artifact's folder"
        )
    if code in _NO_BUCKET:
        return LoadFailed(f"{uri}: there is no bucket {location.bucket!r} at {where}")
    if isinstance(error, FileNotFoundError) or status == 404:
        return LoadFailed(f"{uri} does not exist at {where}")
    if code == "RequestTimeTooSkewed":
        return LoadFailed(f"{uri}: {where} refused: the clock of this machine is wrong")
    hint = (
        "; no credentials were given: name a storage key, or set the store's environment variables"
        if location.credentials.anonymous
        else ""
    )
    refused = (exceptions.PermissionDeniedError, exceptions.UnauthenticatedError)
    if status in (401, 403) or code in _REFUSED or isinstance(error, refused):
        return LoadFailed(
            f"{uri}: {where} refused access with {location.credentials_from} ({said}){hint}"
        )
    if code in _ELSEWHERE or status in (301, 307) or "incorrectly configured region" in text:
        region = getattr(location, "region", "")
        return LoadFailed(
            f"{uri}: the bucket is not in region {region!r} ({said}); "
            f"set 'region' in {location.credentials_from}"
        )
    if status in (408, 429) or status >= 500:
        return TransientSourceError(f"{where} answered {said}")
    if status >= 400:
        return LoadFailed(f"{uri}: {where} refused the request ({said}){hint}")
    if "certificate" in text.lower() or "UnknownIssuer" in text:
        return LoadFailed(
            f"{uri}: the TLS certificate of {where} is not trusted or does not match; put the CA "
            "into 'certificate' of the storage key"
            + (", or into AWS_CA_BUNDLE" if uri.startswith("s3:") else "")
        )
    if isinstance(error, ValueError):
        return LoadFailed(f"{uri}: the settings of {location.credentials_from} do not work")
    return TransientSourceError(f"{where} cannot be reached or broke off ({_kind(text)})")


def settings_wrong(location: StoreLocation) -> LoadFailed:
    """A store that cannot even be set up. The library's words may quote a secret."""
    return LoadFailed(
        f"{location.uri}: the settings of {location.credentials_from} do not work: a key, a "
        "certificate or an address there cannot be read"
    )


def _kind(text: str) -> str:
    kind = re.search(r"\bkind: (\w+)", text)
    match kind[1] if kind else "":
        case "Connect":
            return "no connection"
        case "Timeout":
            return "time-out"
        case _:
            return "connection lost"
