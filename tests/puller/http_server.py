"""A file server whose every promise can be left out or broken, on a real socket."""

from __future__ import annotations

import contextlib
import hashlib
import ssl
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from aiohttp import web


@dataclass
class FileServer:
    files: dict[str, bytes] = field(default_factory=dict)
    redirects: dict[str, str] = field(default_factory=dict)
    statuses: dict[str, int] = field(default_factory=dict)  # answered instead of the file
    ranges: bool = True
    etags: bool = True
    length: bool = True  # Content-Length, where it is no range
    last_modified: str = ""
    needs_header: tuple[str, str] | None = None
    claims_bytes: int | None = None  # in Content-Range, instead of the truth
    cut_after_bytes: int | None = None  # of each body; the connection breaks then
    cuts_left: int = 0
    extra_headers: dict[str, str] = field(default_factory=dict)
    requests: list[web.Request] = field(default_factory=list)

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.requests.append(request)
        path = request.path
        if path in self.redirects:
            return web.Response(status=302, headers={"Location": self.redirects[path]})
        if self.needs_header and request.headers.get(self.needs_header[0]) != self.needs_header[1]:
            return web.Response(status=401)
        if path in self.statuses:
            return web.Response(status=self.statuses[path], text="a body that nobody shows")
        if path not in self.files:
            return web.Response(status=404)
        return await self._send(request, self.files[path])

    async def _send(self, request: web.Request, data: bytes) -> web.StreamResponse:
        headers = dict(self.extra_headers)
        if self.etags:
            headers["ETag"] = f'"{hashlib.sha256(data).hexdigest()[:20]}"'
        if self.last_modified:
            headers["Last-Modified"] = self.last_modified
        status, body = 200, data
        asked = request.headers.get("Range")
        if asked and self.ranges:
            first, _, last = asked.removeprefix("bytes=").partition("-")
            if int(first) >= len(data):
                return web.Response(status=416, headers={"Content-Range": f"bytes */{len(data)}"})
            end = min(int(last) + 1, len(data))
            status, body = 206, data[int(first) : end]
            total = self.claims_bytes or len(data)
            headers["Content-Range"] = f"bytes {first}-{end - 1}/{total}"
        response = web.StreamResponse(status=status, headers=headers)
        if self.length:
            response.content_length = len(body)
        else:
            response.enable_chunked_encoding()
        await response.prepare(request)
        with contextlib.suppress(ConnectionError):
            if self.cut_after_bytes is not None and self.cuts_left and len(body) > 1:
                self.cuts_left -= 1
                await response.write(body[: self.cut_after_bytes])
                assert request.transport is not None
                request.transport.close()
            else:
                await response.write(body)
                await response.write_eof()
        return response

    @contextlib.asynccontextmanager
    async def serving(self, tls: ssl.SSLContext | None = None) -> AsyncIterator[str]:
        server = web.Server(self.handle)
        runner = web.ServerRunner(server, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=tls)
        await site.start()
        try:
            host, port = runner.addresses[0][:2]
            yield f"{'https' if tls else 'http'}://{host}:{port}"
        finally:
            await runner.cleanup()
