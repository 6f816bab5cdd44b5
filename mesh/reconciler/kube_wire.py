"""HTTP to the API server: one aiohttp session, time-outs, throttling, credentials renewed.

Fails with ``kube_errors`` only. Nothing is retried here but a 429 that names a time within the
call's own time-out, and a 401 once with fresh credentials. Knows no verbs' meaning: that is
``kube``'s.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Final, Protocol
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import aiohttp
import orjson

from mesh.reconciler.kube_errors import ApiAway, ApiError, Request, error_of
from mesh.reconciler.kube_resources import Obj

JSON: Final = "application/json"
USER_AGENT: Final = "mesh-controller"
WRITES: Final = frozenset({"create", "update", "patch", "delete"})
# A server that died without a word is noticed on an idle watch after 30 s + 3 x 10 s.
_KEEPALIVE: Final = (("TCP_KEEPIDLE", 30), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3))
# Beyond what the server was asked to end a watch after: then it is not the server's clock.
_WATCH_MARGIN_S: Final = 15.0
# Kept open between calls; the API server closes its side later (90 s).
_IDLE_CONNECTION_S: Final = 30.0


@dataclass(frozen=True, slots=True)
class Limits:
    """What bounds a client."""

    call_timeout_s: float = 15.0
    # As client-go's reflector, which draws from 5 to 10 minutes.
    watch_timeout_s: float = 420.0
    page_size: int = 500
    writes_in_flight: int = 16


class Configuration(Protocol):
    """What is needed of ``kubernetes.aio.client.Configuration``."""

    host: str
    ssl_ca_cert: str | None
    cert_file: str | None
    key_file: str | None
    verify_ssl: bool
    tls_server_name: str | None
    proxy: str | None

    async def auth_settings(self) -> dict[str, dict[str, Any]]: ...


class Wire:
    """One session. ``refresh`` reads the configuration's credentials anew."""

    def __init__(
        self, configuration: Configuration, refresh: Callable[[], Awaitable[None]], limits: Limits
    ) -> None:
        # Answers by (verb, plural, HTTP status); status 0 where none came.
        self.calls_total: Counter[tuple[str, str, int]] = Counter()
        self._configuration = configuration
        self._refresh = refresh
        self._limits = limits
        self._proxy = configuration.proxy or _proxy_of_environment(configuration.host)
        self._renewing = asyncio.Lock()
        self._writes = asyncio.Semaphore(limits.writes_in_flight)
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                limit=0,  # a watch keeps its connection: a limit would starve the other calls
                ssl=_tls_of(configuration),
                keepalive_timeout=_IDLE_CONNECTION_S,
                socket_factory=_keepalive_socket,
            ),
        )

    async def close(self) -> None:
        """Breaks what is under way."""
        await self._session.close()

    async def call(
        self,
        method: str,
        request: Request,
        *,
        path: str = "",
        query: dict[str, str] | None = None,
        body: Obj | None = None,
        content_type: str = JSON,
        urgent: bool = False,
    ) -> Obj:
        """One JSON answer. A write waits for its turn first, unless it is urgent; the time-out
        starts afterwards."""
        path = path or request.resource.path(request.namespace, request.name, request.subresource)
        data = orjson.dumps(body) if body is not None else None
        queues = request.verb in WRITES and not urgent
        gate = self._writes if queues else contextlib.nullcontext()
        async with gate:
            with self._as_api_errors(request):
                async with asyncio.timeout(self._limits.call_timeout_s) as limit:
                    while True:
                        response = await self._send(
                            method, request, path, query or {}, data, content_type
                        )
                        async with response:
                            if response.ok:
                                return await self._answer(request, response)
                            error = await self._refusal(request, response)
                        await _wait_if_told(error, limit.when())
        raise AssertionError("the loop ends by return or raise")

    async def stream(
        self, request: Request, query: dict[str, str], on_open: Callable[[], None] | None = None
    ) -> AsyncGenerator[bytes]:
        """The lines of a watch; ``on_open`` is called once it is accepted. Close it."""
        path = request.resource.path(request.namespace)
        async with contextlib.AsyncExitStack() as stack:
            with self._as_api_errors(request):
                async with asyncio.timeout(self._limits.call_timeout_s):
                    silence_s = self._limits.watch_timeout_s + _WATCH_MARGIN_S
                    response = await self._send("GET", request, path, query, silence_s=silence_s)
                    await stack.enter_async_context(response)
                    if not response.ok:
                        raise await self._refusal(request, response)
            self._count(request, response.status)
            if on_open is not None:
                on_open()
            async for line in self._lines(request, response):
                yield line

    async def _send(
        self,
        method: str,
        request: Request,
        path: str,
        query: dict[str, str],
        data: bytes | None = None,
        content_type: str = JSON,
        silence_s: float | None = None,
    ) -> aiohttp.ClientResponse:
        """The head of an answer; a 401 is asked again once, with credentials read anew."""
        if self._session.closed:
            raise ApiAway(request, "this client is closed")
        for last in (False, True):
            credentials = await self._credentials()
            headers = {"Accept": JSON, "Content-Type": content_type, "User-Agent": USER_AGENT}
            response = await self._session.request(
                method,
                self._configuration.host + path,
                params=query,
                data=data,
                headers=headers | credentials,
                proxy=self._proxy or None,
                server_hostname=self._configuration.tls_server_name or None,
                allow_redirects=False,
                timeout=aiohttp.ClientTimeout(total=None, sock_read=silence_s),
            )
            if last or response.status != HTTPStatus.UNAUTHORIZED:
                break
            self._count(request, response.status)
            response.release()
            await self._renew(credentials)
        return response

    async def _credentials(self) -> dict[str, str]:
        settings = (await self._configuration.auth_settings()).values()
        return {setting["key"]: str(setting["value"]).strip() for setting in settings}

    async def _renew(self, refused: dict[str, str]) -> None:
        """Once for all calls that were refused with the same credentials."""
        async with self._renewing:
            if await self._credentials() == refused:
                await self._refresh()

    async def _lines(
        self, request: Request, response: aiohttp.ClientResponse
    ) -> AsyncIterator[bytes]:
        """The stream cut into lines, each as long as its object is (up to some megabytes)."""
        rest: list[bytes] = []
        chunks = response.content.iter_any()
        while True:
            with self._as_api_errors(request, "nothing came, not even the end that was asked for"):
                chunk = await anext(chunks, None)
            if chunk is None:
                return
            *lines, tail = chunk.split(b"\n")
            for line in lines:
                whole = b"".join((*rest, line))
                rest.clear()
                if whole:
                    yield whole
            if tail:
                rest.append(tail)

    async def _answer(self, request: Request, response: aiohttp.ClientResponse) -> Obj:
        text = await response.read()
        self._count(request, response.status)
        try:
            answer: Obj = orjson.loads(text)
        except orjson.JSONDecodeError as error:
            # A captive portal or a proxy, not an API server.
            raise ApiAway(request, "the answer is not JSON", status=response.status) from error
        return answer

    async def _refusal(self, request: Request, response: aiohttp.ClientResponse) -> ApiError:
        text = await response.text(errors="replace")
        self._count(request, response.status)
        body: Any = text
        with contextlib.suppress(orjson.JSONDecodeError):
            body = orjson.loads(text)
        retry_after = response.headers.get("Retry-After")
        return error_of(request, response.status, body, retry_after=retry_after)

    @contextlib.contextmanager
    def _as_api_errors(self, request: Request, late: str = "") -> Iterator[None]:
        try:
            yield
        except TimeoutError as error:
            self._count(request, 0)
            late = late or f"no answer within {self._limits.call_timeout_s:g} s"
            raise ApiAway(request, late) from error
        except (aiohttp.ClientError, OSError) as error:
            self._count(request, 0)
            raise ApiAway(request, str(error) or type(error).__name__) from error

    def _count(self, request: Request, status: int) -> None:
        self.calls_total[request.verb, request.resource.plural, status] += 1


async def _wait_if_told(error: ApiError, deadline_s: float | None) -> None:
    """Waits as a 429 asks, where that is in time; else raises. It says that nothing was done."""
    if not isinstance(error, ApiAway) or error.status != HTTPStatus.TOO_MANY_REQUESTS:
        raise error
    now_s = asyncio.get_running_loop().time()
    if not error.retry_after_s or deadline_s is None or now_s + error.retry_after_s > deadline_s:
        raise error
    await asyncio.sleep(error.retry_after_s)


def _tls_of(configuration: Configuration) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=configuration.ssl_ca_cert or None)
    if configuration.cert_file:
        context.load_cert_chain(configuration.cert_file, keyfile=configuration.key_file or None)
    if not configuration.verify_ssl:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def _proxy_of_environment(url: str) -> str:
    parts = urlsplit(url)
    if proxy_bypass(parts.hostname or ""):
        return ""
    return getproxies().get(parts.scheme, "")


def _keepalive_socket(address: Any) -> socket.socket:
    family, kind, protocol, *_ = address
    made = socket.socket(family=family, type=kind, proto=protocol)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEPALIVE:
        option = getattr(socket, name, None)
        if option is not None:
            made.setsockopt(socket.IPPROTO_TCP, option, value)
    return made
