"""An HTTP listener for operators: /metrics, /livez, /readyz, /drained. Nothing else.

/drained answers when the process has drained, or never: a model server beside a serving pod is kept
by it until the pod's last request has ended (a preStop hook in its container).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

from aiohttp import web


class Rendered(Protocol):
    def render(self) -> tuple[bytes, str]:
        """(the page of /metrics, its content type)"""


class HealthListener:
    """``not_ready()`` says why the process is not ready; "" when it is."""

    def __init__(self, metrics: Rendered, not_ready: Callable[[], str]) -> None:
        self._metrics = metrics
        self._not_ready = not_ready
        self._drained = asyncio.Event()
        self._runner: web.AppRunner | None = None

    async def start(self, host: str, port: int) -> int:
        """Listen; returns the port. Raises OSError when the address is taken."""
        app = web.Application()
        app.router.add_get("/metrics", self._render)
        app.router.add_get("/livez", self._livez)
        app.router.add_get("/readyz", self._readyz)
        app.router.add_get("/drained", self._answer_drained)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)
        await runner.setup()
        self._runner = runner
        await web.TCPSite(runner, host, port).start()
        bound: int = runner.addresses[0][1]
        return bound

    async def close(self) -> None:
        """Whoever waits for /drained is answered first."""
        self._drained.set()
        if self._runner is not None:
            await self._runner.cleanup()

    async def _render(self, _: web.Request) -> web.Response:
        body, content_type = self._metrics.render()
        return web.Response(body=body, headers={"Content-Type": content_type})

    async def _livez(self, _: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def _readyz(self, _: web.Request) -> web.Response:
        why = self._not_ready()
        return web.Response(text=f"{why or 'ok'}\n", status=503 if why else 200)

    async def _answer_drained(self, _: web.Request) -> web.Response:
        await self._drained.wait()
        return web.Response(text="drained\n")
