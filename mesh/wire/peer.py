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
from dataclasses import dataclass
from enum import Enum
from typing import Final

from mesh.wire import frames
from mesh.wire.connection import Connection
from mesh.wire.head import RequestHead
from mesh.wire.limits import INSIDE, Limits, Patience
from mesh.wire.outbound import Outbound
from mesh.wire.stream import Stream
from mesh.wire.transport import Link, Pump, connect, pump_of

_CONNECT_TIMEOUT_S: Final = 3.0
_CONNECTIONS_MAX: Final = 8
# After a failed connect the next one is refused at once for so long, doubling up to the maximum.
_BACKOFF_START_S: Final = 0.02
_BACKOFF_MAX_S: Final = 2.0

_PING: Final = frames.ping(b"mesh-you")


class Unconnected(Enum):
    """Why there is no connection for a call."""

    FAILED = "failed"  # refused, timed out or broken while it was made
    SILENT = "silent"  # the peer accepts, but says nothing
    FULL = "full"  # as many calls are on it, or wait for it, as may be
    CLOSED = "closed"  # by us


@dataclass(frozen=True, slots=True)
class NoConnection:
    why: Unconnected
    reason: str


OnReady = Callable[[Outbound | NoConnection], None]


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
        self._waiting: deque[tuple[float, OnReady]] = deque()  # since when
        self._connecting: asyncio.Task[None] | None = None
        self._connecting_since_s = 0.0
        self._backoff_s = 0.0
        self._refuse_until_s = 0.0
        self._last_error = ""
        self.closed = False
        # Since then nothing has come from the peer although it was asked; 0.0: it answers.
        self.silent_since_s = 0.0
        self.look_at_s = 0.0  # nothing can be new for ``watch`` before
        self._watched_s = 0.0
        self._fair_from_s = 0.0  # before that this process itself was held up

    def acquire(self, on_ready: OnReady) -> None:
        """Call back with a connection that can open a stream, or with the reason why not."""
        now_s = time.monotonic()
        conn = self.usable()
        if conn is not None:
            on_ready(conn)
        elif self.closed:
            on_ready(NoConnection(Unconnected.CLOSED, "closed"))
        elif len(self._waiting) >= self.limits.max_waiting_for_connection:
            text = f"{len(self._waiting)} calls wait for a connection to {self.address}"
            on_ready(NoConnection(Unconnected.FULL, text))
        elif self._connecting is None and len(self._links) >= _CONNECTIONS_MAX:
            text = f"all {_CONNECTIONS_MAX} connections to {self.address} are full"
            on_ready(NoConnection(Unconnected.FULL, text))
        elif self._connecting is None and now_s < self._refuse_until_s:
            on_ready(NoConnection(Unconnected.FAILED, self._last_error))
        else:
            self._waiting.append((now_s, on_ready))
            if self._connecting is None:
                self._begin_connecting(now_s)

    def usable(self) -> Outbound | None:
        """A connection that can open a stream now."""
        conn = self.current
        if conn is not None and conn.can_open:
            return conn
        for link in self._links:
            if link.conn.can_open and not link.conn.silent:
                self.current = link.conn
                return link.conn
        self.current = None
        return None

    def _begin_connecting(self, now_s: float) -> None:
        self._connecting_since_s = now_s
        loop = asyncio.get_running_loop()
        self._connecting = loop.create_task(self._connect(pump_of(loop)))

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
        self._answer(NoConnection(Unconnected.FAILED, reason))

    def _answer(self, found: Outbound | NoConnection) -> None:
        waiting, self._waiting = self._waiting, deque()
        for _, on_ready in waiting:
            if isinstance(found, Outbound) and not found.can_open:
                self.acquire(on_ready)
            else:
                on_ready(found)

    # ---- liveness -----------------------------------------------------------------------------

    @property
    def heard_s(self) -> float:
        """When something last came from the peer, on any connection; 0.0: never."""
        return max((x.conn.last_read_s for x in self._links if x.conn.settings_seen), default=0.0)

    def watch(self, now_s: float, patience: Patience) -> None:
        """Ask what is quiet with a PING, and note what does not answer.

        Anything that was read is an answer. Tells nobody: see ``silent_since_s`` and ``relieve``.
        To be called every 100 ms or so from ``look_at_s`` on, which is now while it is in doubt.
        """
        if now_s - self._watched_s > patience.late_s + patience.ping_after_s:
            self._fair_from_s = now_s
        self._watched_s = now_s
        fair_s = self._fair_from_s
        calm = self._connecting is None and not self.silent_since_s
        for link in self._links:
            conn = link.conn
            asked_s = conn.ping_sent_s
            if not asked_s:
                wait_s = patience.ping_after_s if conn.streams else patience.idle_ping_s
                if now_s - conn.last_read_s < wait_s or not conn.settings_seen or conn.closed:
                    continue
                conn.ping_sent_s = now_s
                conn.control(_PING)
            elif conn.last_read_s >= asked_s:
                conn.ping_sent_s = 0.0
                conn.silent = False
            elif now_s - max(asked_s, fair_s) >= patience.ping_timeout_s:
                self._fell_silent(asked_s, now_s)
                if now_s - asked_s >= patience.silent_close_s:
                    link.abort()
            calm = False
        if calm:
            self.look_at_s = now_s + patience.ping_after_s
            return
        self.look_at_s = now_s
        connecting = self._connecting is not None
        if connecting and now_s - max(self._connecting_since_s, fair_s) >= patience.connect_s:
            self._fell_silent(self._connecting_since_s, now_s)
        if self.silent_since_s and (
            self.heard_s >= self.silent_since_s or not (self._links or connecting)
        ):
            self.silent_since_s = 0.0
        if self.silent_since_s and not connecting:
            self._try_second_way(now_s, patience)

    def _try_second_way(self, now_s: float, patience: Patience) -> None:
        """What a new connection brings is an answer of the peer like any other."""
        due_s = max(self._refuse_until_s, self.silent_since_s + patience.second_way_s)
        if now_s >= due_s and not self.closed and len(self._links) < _CONNECTIONS_MAX:
            self._begin_connecting(now_s)

    def _fell_silent(self, asked_s: float, now_s: float) -> None:
        """Nothing was heard since ``asked_s``: that holds for all connections that say nothing."""
        if self.heard_s < asked_s:
            self.silent_since_s = self.silent_since_s or asked_s
        for link in self._links:
            conn = link.conn
            if conn.settings_seen and conn.last_read_s < asked_s and not conn.silent:
                conn.silent = True
                if not conn.ping_sent_s:  # so that it is seen to answer
                    conn.ping_sent_s = now_s
                    conn.control(_PING)
                if self.current is conn:
                    self.current = None

    @property
    def troubled(self) -> bool:
        """``relieve`` may have something to do."""
        return bool(self._waiting) or any(link.conn.silent for link in self._links)

    def relieve(self, now_s: float, patience: Patience) -> None:
        """Let calls go elsewhere that are on a connection that is silent, or wait for one too
        long. To be called behind ``watch``, when those who route know what is silent."""
        for link in tuple(self._links):
            if link.conn.silent:
                for stream in tuple(link.conn.streams.values()):
                    stream.on_silent()
        waiting = self._waiting
        while waiting and now_s - max(waiting[0][0], self._fair_from_s) >= patience.connect_s:
            _, on_ready = waiting.popleft()
            text = f"no connection to {self.address} within {patience.connect_s:g} s"
            on_ready(NoConnection(Unconnected.SILENT, text))

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
        self._answer(conn)

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
        self._answer(NoConnection(Unconnected.CLOSED, "closed"))
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
