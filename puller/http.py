"""http:// and https://: one file, by ``aiohttp``: the only file of the puller that imports it.

The first request asks for the first byte alone, so that one answer tells size, version and whether
ranges are served (a HEAD would be refused by many who sign their links). A version is the ETag,
else the time of the last change; where there is neither, every fetch is a version of its own.

Redirects are followed a few times, never from https to http, and only to the entry's own address
do its headers and its client certificate go. Link-local addresses are refused, by whatever name:
there a cloud keeps the credentials of its machines. Errors name the file without its query, which
may be a signature.
"""

from __future__ import annotations

import contextlib
import ipaddress
import re
import secrets
import ssl
import tempfile
from collections.abc import AsyncIterator
from typing import Any, Final
from urllib.parse import unquote

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.resolver import ThreadedResolver
from yarl import URL

from mesh.core.errors import LoadFailed
from puller.disk import Chunk
from puller.location import HttpLocation
from puller.manifest import Manifest, RemoteObject, single_manifest
from puller.settings import PullerSettings
from puller.source import ObjectChangedError, TransientSourceError

_REDIRECTS: Final = frozenset({301, 302, 303, 307, 308})
_REDIRECTS_MAX: Final = 5
_BUFFER_BYTES: Final = 1 << 18
_RANGE: Final = re.compile(r"bytes (?:(\d+)-(\d+)|\*)/(\d+)")
_PACKED: Final = (".gz", ".tgz")  # some servers call these "encoded"


def open_http(location: HttpLocation, settings: PullerSettings) -> HttpSource:
    """Blocks: reads the system's certificates."""
    own = _tls(location, location.certificate_pem)
    if location.client_certificate_pem:
        # The library takes them from a file only; it is this user's alone, and gone at once.
        with tempfile.NamedTemporaryFile("w", suffix=".pem") as file:
            file.write(f"{location.client_certificate_pem}\n{location.client_key_pem}\n")
            file.flush()
            try:
                own.load_cert_chain(file.name)
            except (ssl.SSLError, ValueError):
                raise LoadFailed(
                    f"client_certificate and client_key of {location.credentials_from} cannot be "
                    "read as PEM, or do not belong together"
                ) from None
    return HttpSource(location, settings, own, _tls(location, ""))


def _tls(location: HttpLocation, certificate_pem: str) -> ssl.SSLContext:
    context = ssl.create_default_context()
    if certificate_pem:
        try:
            context.load_verify_locations(cadata=certificate_pem)
        except (ssl.SSLError, ValueError):
            raise LoadFailed(
                f"'certificate' of {location.credentials_from} cannot be read as PEM"
            ) from None
    return context


class HttpSource:
    """``puller.source.RemoteSource`` for one URL."""

    def __init__(
        self,
        location: HttpLocation,
        settings: PullerSettings,
        own_tls: ssl.SSLContext,
        other_tls: ssl.SSLContext,
    ) -> None:
        self._location = location
        self._settings = settings
        self._url = URL(location.url, encoded=True)
        self._own_tls = own_tls
        self._other_tls = other_tls
        self._session: aiohttp.ClientSession | None = None

    async def manifest(self) -> Manifest:
        name = unquote(self._url.raw_path).rstrip("/").rpartition("/")[2]
        if not name:
            raise LoadFailed(
                f"{self._location.uri} names no file: over http an artifact is one file or one "
                "archive (.zip, .tar, .tar.gz, .tgz), because there are no listings"
            )
        async with self._answer({"Range": "bytes=0-0"}, empty_is_fine=True) as reply:
            size_bytes, ranges = self._size(reply)
            source = RemoteObject(name, size_bytes, _version(reply), ranges)
        return single_manifest(source, self._location.uri)

    async def read(self, source: RemoteObject, start: int, end: int | None) -> AsyncIterator[Chunk]:
        headers = {}
        if source.ranges and end is not None:
            headers["Range"] = f"bytes={start}-{end - 1}"
        async with self._answer(headers) as reply:
            if not _known(_version(reply)) or not _known(source.etag):
                pass  # there is nothing to compare
            elif _version(reply) != source.etag:
                raise ObjectChangedError(self._location.uri)
            if headers:
                self._check_range(reply, source, start)
            elif source.size_bytes is not None and self._size(reply)[0] not in (
                None,
                source.size_bytes,
            ):
                raise ObjectChangedError(self._location.uri)
            gathered = bytearray()
            async for piece in self._pieces(reply):
                gathered += piece
                if len(gathered) >= self._settings.chunk_bytes:
                    yield gathered
                    gathered = bytearray()
            if gathered:
                yield gathered

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    def _check_range(self, reply: aiohttp.ClientResponse, source: RemoteObject, start: int) -> None:
        if reply.status != 206:
            raise TransientSourceError(
                f"{self._location.where} served a range before and now does not"
            )
        match = _RANGE.fullmatch(reply.headers.get("Content-Range", "").strip())
        if match is None or match[1] is None or int(match[1]) != start:
            raise TransientSourceError(f"{self._location.where} sent another range than asked for")
        if int(match[3]) != source.size_bytes:
            raise ObjectChangedError(self._location.uri)

    def _size(self, reply: aiohttp.ClientResponse) -> tuple[int | None, bool]:
        """(size if the server tells, whether it serves ranges)."""
        match = _RANGE.fullmatch(reply.headers.get("Content-Range", "").strip())
        if reply.status in (206, 416) and match is not None:
            return int(match[3]), True
        if reply.status == 206:
            raise TransientSourceError(f"{self._location.where} sent a range without its place")
        return reply.content_length, False

    async def _pieces(self, reply: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
        try:
            async for piece in reply.content.iter_any():
                yield piece
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise self._broken(error) from None

    @contextlib.asynccontextmanager
    async def _answer(
        self, headers: dict[str, str], *, empty_is_fine: bool = False
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """The reply after all redirects, if it is one that has the file."""
        url = self._url
        for _ in range(_REDIRECTS_MAX + 1):
            reply = await self._send(url, headers)
            try:
                if reply.status in _REDIRECTS:
                    url = self._redirected(url, reply)
                    continue
                self._check_status(reply, url, empty_is_fine=empty_is_fine)
                yield reply
                return
            finally:
                reply.close()
        raise LoadFailed(f"{self._location.uri}: more than {_REDIRECTS_MAX} redirects")

    async def _send(self, url: URL, headers: dict[str, str]) -> aiohttp.ClientResponse:
        if url.host is None or _is_link_local(url.host):
            raise self._link_local()
        own = url.origin() == self._url.origin()
        try:
            return await self._opened().get(
                url,
                headers={**(self._location.headers if own else {}), **headers},
                ssl=self._own_tls if own else self._other_tls,
                allow_redirects=False,
            )
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            raise self._broken(error) from None

    def _redirected(self, url: URL, reply: aiohttp.ClientResponse) -> URL:
        try:
            target = url.join(URL(reply.headers.get("Location", ""), encoded=True))
        except ValueError:
            target = URL()
        where = f"{target.scheme}://{target.host}" if target.host else "nowhere"
        if target.scheme not in ("http", "https") or not target.host:
            raise LoadFailed(f"{self._location.uri} redirects to {where}, which is not followed")
        if (url.scheme, target.scheme) == ("https", "http"):
            raise LoadFailed(
                f"{self._location.uri} redirects to {where}: from https to http is not followed"
            )
        return target.with_user(None)

    def _check_status(
        self, reply: aiohttp.ClientResponse, url: URL, *, empty_is_fine: bool
    ) -> None:
        status = reply.status
        uri, where = self._location.uri, f"{url.scheme}://{url.raw_authority}"
        if status in (200, 206) or (status == 416 and empty_is_fine):
            encoding = reply.headers.get("Content-Encoding", "identity").lower()
            if encoding == "identity" or self._url.raw_path.endswith(_PACKED):
                return
            raise LoadFailed(
                f"{uri}: {where} sends it as {encoding!r}, although that was not asked for"
            )
        if status in (412, 416):
            raise ObjectChangedError(uri)
        if status in (401, 403, 407):
            hint = "" if self._location.headers else "; no headers were given: use a storage key"
            raise LoadFailed(
                f"{uri}: {where} refused access with {self._location.credentials_from} "
                f"({status}){hint}"
            )
        if status in (404, 410):
            raise LoadFailed(f"{uri} does not exist at {where} ({status})")
        if status in (408, 425, 429) or status >= 500:
            raise TransientSourceError(f"{where} answered {status}")
        raise LoadFailed(f"{uri}: {where} refused the request ({status})")

    def _broken(self, error: Exception) -> Exception:
        where = self._location.where
        if isinstance(error, aiohttp.ClientSSLError | ssl.SSLError):
            if isinstance(error, aiohttp.ClientConnectorCertificateError):
                return LoadFailed(
                    f"{self._location.uri}: the TLS certificate of {where} is not trusted or does "
                    "not match; put the CA into 'certificate' of a storage key of type http"
                )
            return LoadFailed(
                f"{self._location.uri}: no TLS connection with {where}; does it ask for a client "
                "certificate, or speak plain http?"
            )
        if isinstance(error, _LinkLocalError):
            return self._link_local()
        if isinstance(error, TimeoutError):
            return TransientSourceError(f"{where} cannot be reached or broke off (time-out)")
        if isinstance(error, aiohttp.ClientConnectorError):
            if isinstance(error.os_error, _LinkLocalError):
                return self._link_local()
            return TransientSourceError(f"{where} cannot be reached (no connection)")
        if isinstance(error, aiohttp.InvalidURL | ValueError):
            return LoadFailed(f"{self._location.uri} cannot be asked for: its address is wrong")
        return TransientSourceError(f"{where} cannot be reached or broke off (connection lost)")

    def _link_local(self) -> LoadFailed:
        return LoadFailed(
            f"{self._location.uri} refused: it leads to a link-local address, where no model is"
        )

    def _opened(self) -> aiohttp.ClientSession:
        if self._session is None:
            settings = self._settings
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(
                    limit=settings.parallelism, resolver=_Resolver(), use_dns_cache=False
                ),
                timeout=aiohttp.ClientTimeout(
                    total=None,
                    sock_connect=settings.connect_timeout_ms / 1000,
                    sock_read=settings.read_timeout_ms / 1000,
                ),
                headers={"Accept-Encoding": "identity", "User-Agent": "modelmesh-py"},
                cookie_jar=aiohttp.DummyCookieJar(),
                auto_decompress=False,
                read_bufsize=_BUFFER_BYTES,
                trust_env=False,  # it would also read passwords from a .netrc
            )
        return self._session


class _LinkLocalError(OSError):
    pass


class _Resolver(AbstractResolver):
    """The system's, without link-local answers."""

    def __init__(self) -> None:
        self._inner = ThreadedResolver()

    async def resolve(self, host: str, port: int = 0, family: Any = 0) -> list[ResolveResult]:
        found = await self._inner.resolve(host, port, family)
        if any(_is_link_local(one["host"]) for one in found):
            raise _LinkLocalError(f"{host} is link-local")
        return found

    async def close(self) -> None:
        await self._inner.close()


def _is_link_local(host: str) -> bool:
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False  # a name
    mapped = getattr(address, "ipv4_mapped", None)
    return address.is_link_local or (mapped is not None and mapped.is_link_local)


def _version(reply: aiohttp.ClientResponse) -> str:
    """Never looks like an S3 ETag: nobody says that an ETag here is an MD5."""
    etag = reply.headers.get("ETag", "")
    if etag:
        return f"etag:{etag}"
    changed = reply.headers.get("Last-Modified", "")
    return f"last-modified:{changed}" if changed else f"unknown:{secrets.token_hex(8)}"


def _known(version: str | None) -> bool:
    return version is not None and not version.startswith("unknown:")
