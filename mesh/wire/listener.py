"""A listening socket that accepts many connections a turn of the event loop.

uvloop's own server accepts one a turn, so that in a storm of new connections the last ones wait
behind the work of all before them: 1,000 at once cost some of them a second.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from collections.abc import Callable
from typing import Final

log = logging.getLogger(__name__)

_BACKLOG: Final = 4_096
_ACCEPTS_PER_TURN: Final = 256
# After accept failed for want of descriptors or memory: the pause before the next try.
_PAUSE_S: Final = 0.1


class Listener:
    """One listening socket. ``factory`` makes the protocol of each connection."""

    def __init__(
        self,
        sock: socket.socket,
        factory: Callable[[], asyncio.BaseProtocol],
        *,
        ssl_context: ssl.SSLContext | None = None,
        ssl_handshake_timeout_s: float | None = None,
    ) -> None:
        self._sock = sock
        self._factory = factory
        self._ssl_context = ssl_context
        self._handshake_timeout_s = ssl_handshake_timeout_s if ssl_context else None
        self._loop = asyncio.get_running_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self._resume: asyncio.TimerHandle | None = None
        self.closed = False
        sock.setblocking(False)
        self._loop.add_reader(sock, self._accept)

    @property
    def port(self) -> int:
        """0 for a Unix socket."""
        name = self._sock.getsockname()
        return int(name[1]) if isinstance(name, tuple) else 0

    @property
    def connecting(self) -> int:
        """Connections that were accepted and are not up yet (TLS)."""
        return len(self._tasks)

    def _accept(self, most: int = _ACCEPTS_PER_TURN) -> None:
        for _ in range(most):
            try:
                accepted, _address = self._sock.accept()
            except ConnectionAbortedError:  # this one went away while it waited
                continue
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                log.warning("cannot accept connections: %s; trying again shortly", error)
                self._loop.remove_reader(self._sock)
                self._resume = self._loop.call_later(_PAUSE_S, self._go_on)
                return
            accepted.setblocking(False)
            task = self._loop.create_task(self._connect(accepted))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def _go_on(self) -> None:
        self._resume = None
        if not self.closed:
            self._loop.add_reader(self._sock, self._accept)

    async def _connect(self, accepted: socket.socket) -> None:
        try:
            await self._loop.connect_accepted_socket(
                self._factory,
                accepted,
                ssl=self._ssl_context,
                ssl_handshake_timeout=self._handshake_timeout_s,
            )
        except (OSError, TimeoutError) as error:  # a handshake that failed: the peer's affair
            log.debug("connection refused: %s", error)
            accepted.close()

    def close(self) -> None:
        """Take all that waits in the backlog, which closing would reset, and listen no more.

        A connection that comes between the last accept and the close is still reset: some
        microseconds, unless the machine's ``net.ipv4.tcp_migrate_req`` hands it to another process
        that listens on the same port.
        """
        if self.closed:
            return
        self.closed = True
        if self._resume is not None:
            self._resume.cancel()
        else:
            self._loop.remove_reader(self._sock)
        self._accept(_BACKLOG + 1)
        if self._resume is not None:
            self._resume.cancel()
        self._sock.close()


async def bind_tcp(host: str, port: int, *, reuse_port: bool) -> list[socket.socket]:
    """Listening sockets on every address of ``host``, all on one port. Raises OSError."""
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(
        host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )
    sockets: list[socket.socket] = []
    try:
        for family, kind, protocol, _, address in dict.fromkeys(found):
            sock = socket.socket(family, kind, protocol)
            sockets.append(sock)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if reuse_port:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            if port == 0 and len(sockets) > 1:
                address = (address[0], sockets[0].getsockname()[1], *address[2:])
            try:
                sock.bind(address)
            except OSError as error:
                text = error.strerror or str(error)
                raise OSError(error.errno, f"cannot listen on {host}:{port}: {text}") from None
            sock.listen(_BACKLOG)
    except OSError:
        for sock in sockets:
            sock.close()
        raise
    return sockets


def bind_unix(path: str) -> socket.socket:
    """A listening Unix socket. Raises OSError."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.bind(path)
        sock.listen(_BACKLOG)
    except OSError:
        sock.close()
        raise
    return sock
