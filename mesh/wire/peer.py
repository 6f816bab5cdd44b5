"""Connections to one peer: made when needed, re-made when they break, several when one is full.

Owns back-off and the waiting room for a connection. Decides nothing about calls: ``acquire``
answers through a callback with a connection that can take a stream, or with the reason why not.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections import deque
from collections.abc import Callable
from typing import Final

from mesh.wire.connection import Connection
from mesh.wire.head import RequestHead
from mesh.wire.limits import INSIDE, Limits
from mesh.wire.outbound import Outbound
from mesh.wire.stream import Stream
from mesh.wire.transport import Link, Pump, connect, pump_of

_CONNECT_TIMEOUT_S: Final = 3.0
_CONNECTIONS_MAX: Final = 8
_WAITING_MAX: Final = 8_192
# After a failed connect the next one is refused at once for so long, doubling up to the maximum.
_BACKOFF_START_S: Final = 0.02
_BACKOFF_MAX_S: Final = 2.0

OnReady = Callable[[Outbound | None, str], None]


class Peer:
    """``address`` is ``host:port`` or ``unix:/path``."""

    def __init__(
        self,
        address: str,
        *,
        limits: Limits = INSIDE,
        ssl_context: ssl.SSLContext | None = None,
    ) -> None:
        self.address = address
        self.limits = limits
        self._ssl_context = ssl_context
        self.current: Outbound | None = None  # where the next stream goes, if it still can
        self._links: list[Link] = []
        self._waiting: deque[OnReady] = deque()
        self._connecting: asyncio.Task[None] | None = None
        self._backoff_s = 0.0
        self._refuse_until_s = 0.0
        self._last_error = ""
        self.closed = False

    def acquire(self, on_ready: OnReady) -> None:
        """Call back with a connection that can open a stream, or with None and the reason."""
        conn = self.usable()
        if conn is not None:
            on_ready(conn, "")
        elif self.closed:
            on_ready(None, "closed")
        elif len(self._waiting) >= _WAITING_MAX:
            on_ready(None, "too many calls wait for a connection")
        elif self._connecting is None and len(self._links) >= _CONNECTIONS_MAX:
            on_ready(None, f"all {_CONNECTIONS_MAX} connections are full")
        elif self._connecting is None and time.monotonic() < self._refuse_until_s:
            on_ready(None, self._last_error)
        else:
            self._waiting.append(on_ready)
            if self._connecting is None:
                loop = asyncio.get_running_loop()
                self._connecting = loop.create_task(self._connect(pump_of(loop)))

    def usable(self) -> Outbound | None:
        """A connection that can open a stream now."""
        conn = self.current
        if conn is not None and conn.can_open:
            return conn
        for link in self._links:
            if link.conn.can_open:
                self.current = link.conn
                return link.conn
        self.current = None
        return None

    async def _connect(self, pump: Pump) -> None:
        try:
            async with asyncio.timeout(_CONNECT_TIMEOUT_S):
                link = await connect(
                    pump,
                    self.address,
                    lambda now_s: Connection(self, self.limits, client=True, now_s=now_s),
                    ssl_context=self._ssl_context,
                    on_down=self._on_down,
                )
        except (OSError, TimeoutError, ValueError) as error:  # ValueError: not an address
            self._connecting = None
            text = "timed out" if isinstance(error, TimeoutError) else str(error)
            self._failed(f"cannot connect to {self.address}: {text}")
            return
        self._links.append(link)
        if self.closed:
            link.close()
        elif link.transport is None:  # gone before we came to look
            self._on_down(link, link.conn.error.message if link.conn.error else "closed")
        # The streams start when the peer's SETTINGS are there (``on_settings``).

    def _failed(self, reason: str) -> None:
        self._last_error = reason
        self._backoff_s = min(_BACKOFF_MAX_S, max(_BACKOFF_START_S, self._backoff_s * 2))
        self._refuse_until_s = time.monotonic() + self._backoff_s
        self._answer(None, reason)

    def _answer(self, conn: Outbound | None, reason: str) -> None:
        waiting, self._waiting = self._waiting, deque()
        for on_ready in waiting:
            if conn is not None and not conn.can_open:
                self.acquire(on_ready)
            else:
                on_ready(conn, reason)

    def _on_down(self, link: Link, reason: str) -> None:
        if link in self._links:
            self._links.remove(link)
        if self.current is link.conn:
            self.current = None
        if self._connecting is not None and not link.conn.settings_seen:
            self._connecting = None
            self._failed(f"connection to {self.address} broke: {reason}")

    # Owner of the connections.
    def new_stream(
        self, conn: Outbound, stream_id: int, head: RequestHead, end: bool
    ) -> Stream | None:
        return None  # a server opens no streams

    def on_settings(self, conn: Outbound) -> None:
        if self.closed:
            return
        self._backoff_s = 0.0
        self._connecting = None
        self.current = conn
        self._answer(conn, "")

    def on_goaway(self, conn: Outbound) -> None:
        """New calls go to a new connection; this one closes when its last call has ended."""
        if self.current is conn:
            self.current = None
        if not conn.streams:
            self._close_link_of(conn)

    def _close_link_of(self, conn: Outbound) -> None:
        for link in self._links:
            if link.conn is conn:
                link.close()
                return

    def close(self) -> None:
        """No new calls. Connections close when their last call has ended (see ``sweep``)."""
        self.closed = True
        if self._connecting is not None:
            self._connecting.cancel()
            self._connecting = None
        self._answer(None, "closed")
        for link in list(self._links):
            if not link.conn.streams:
                link.close()
            else:
                link.conn.start_drain()

    def stream_ended(self, conn: Outbound) -> None:
        """A call on ``conn`` has ended: a connection on its way out closes with its last call."""
        if (self.closed or conn.going_away) and not conn.streams and not conn.closed:
            self._close_link_of(conn)

    def abort(self) -> None:
        """Close everything now; calls in flight are lost."""
        self.close()
        for link in list(self._links):
            link.close()
