"""TCP proxies for tests that are not asyncio: in a thread with a loop of its own."""

from __future__ import annotations

import asyncio
import threading
from types import TracebackType
from typing import Self

from tests.store.tcp_proxy import TcpProxy


class ThreadedProxy:
    """A ``TcpProxy`` whose every call may come from any thread."""

    def __init__(self, target: str, listen: str = "127.0.0.1:0") -> None:
        self._proxy = TcpProxy(target, listen)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    @property
    def endpoint(self) -> str:
        return self._proxy.endpoint

    def cut(self) -> None:
        """Drop every connection and refuse new ones, until ``mend``."""
        self._loop.call_soon_threadsafe(self._proxy.cut)

    def mend(self) -> None:
        self._loop.call_soon_threadsafe(self._proxy.mend)

    def delay(self, seconds: float) -> None:
        """From now on everything arrives so much later."""
        self._loop.call_soon_threadsafe(setattr, self._proxy, "delay_s", seconds)

    def __enter__(self) -> Self:
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._proxy.__aenter__(), self._loop).result(10)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        end = self._proxy.__aexit__(kind, error, trace)
        asyncio.run_coroutine_threadsafe(end, self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()
