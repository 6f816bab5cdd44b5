"""The router's HTTP listeners (REST, metrics) and its TLS contexts.

Owns sockets and their ends, nothing of what is answered. A certificate that cannot be read fails
with FailedPrecondition that names the file.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

import orjson
from aiohttp import web

from mesh.core.errors import FailedPrecondition, MeshError
from mesh.wire.listener import Listener, bind_tcp
from router.readiness import State
from router.settings import TlsFiles

HTTP2: Final = "h2"
HTTP1: Final = "http/1.1"
_TLS_S: Final = 10.0
_LATE_S: Final = 0.1


def tls_context(files: TlsFiles, protocol: str) -> ssl.SSLContext:
    """A server's context that offers one application protocol. TLS 1.2 and later."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols([protocol])
    try:
        context.load_cert_chain(files.cert, files.key)
    except (OSError, ssl.SSLError) as error:
        raise FailedPrecondition(
            f"TLS: cannot use certificate {files.cert} with key {files.key}: {error}"
        ) from error
    if files.client_ca is not None:
        _trust(context, files.client_ca)
    return context


def _trust(context: ssl.SSLContext, authorities: Path) -> None:
    try:
        context.load_verify_locations(authorities)
    except (OSError, ssl.SSLError) as error:
        raise FailedPrecondition(f"TLS: cannot use authorities {authorities}: {error}") from error
    context.verify_mode = ssl.CERT_REQUIRED


class HttpListener:
    """One aiohttp application on one port."""

    def __init__(self, application: web.Application, *, drain_timeout_s: float) -> None:
        application.on_response_prepare.append(self._tell)
        # A client that goes away cancels its handler, and with it what the mesh does for it.
        self._runner = web.AppRunner(
            application,
            access_log=None,
            handler_cancellation=True,
            shutdown_timeout=drain_timeout_s,
        )
        self._listeners: list[Listener] = []
        self._leaving = False

    async def start(
        self,
        host: str,
        port: int,
        *,
        reuse_port: bool = False,
        ssl_context: ssl.SSLContext | None = None,
    ) -> int:
        """Listen; returns the port. Raises OSError when the address is taken."""
        await self._runner.setup()
        assert self._runner.server is not None
        for sock in await bind_tcp(host, port, reuse_port=reuse_port):
            self._listeners.append(
                Listener(
                    sock,
                    self._runner.server,
                    ssl_context=ssl_context,
                    ssl_handshake_timeout_s=_TLS_S,
                )
            )
        return self._listeners[-1].port

    def leave(self) -> None:
        """From now on each answer is the last one of its connection: clients with a pool of
        connections make their next one elsewhere, before these are closed."""
        self._leaving = True

    async def _tell(self, request: web.Request, response: web.StreamResponse) -> None:
        if self._leaving:
            response.force_close()
            response.headers["Connection"] = "close"

    async def drain(self) -> None:
        """Stop accepting, answer what came meanwhile and what is in flight, then close."""
        self.leave()
        if self._listeners:
            for listener in self._listeners:
                listener.close()
            # Requests behind connections that waited in the backlog are read in this time.
            await asyncio.sleep(_LATE_S)
            self._listeners.clear()
        await self._runner.cleanup()


def operations(
    render_metrics: Callable[[], tuple[bytes, str]],
    state: Callable[[], State],
    decisions: Callable[[Mapping[str, str]], bytes],
) -> web.Application:
    """``/metrics``, ``/livez`` and ``/readyz`` (200 or 503, and why as JSON), and what other
    routers ask: ``/decisions``."""

    async def metrics(_: web.Request) -> web.Response:
        body, content_type = render_metrics()
        return web.Response(body=body, headers={"Content-Type": content_type})

    async def live(_: web.Request) -> web.Response:
        return web.json_response({"live": True})

    async def ready(_: web.Request) -> web.Response:
        now = state()
        body = orjson.dumps(now.document())
        status = 200 if now.ready else 503
        return web.Response(body=body, status=status, content_type="application/json")

    async def decided(request: web.Request) -> web.Response:
        try:
            body = decisions(request.query)
        except MeshError as error:
            return web.Response(status=400, text=error.message)
        return web.Response(body=body, content_type="application/json")

    app = web.Application()
    app.router.add_get("/decisions", decided)
    app.router.add_get("/metrics", metrics)
    app.router.add_get("/livez", live)
    app.router.add_get("/readyz", ready)
    return app
