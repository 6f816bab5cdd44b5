"""The way of requests to one isolated model, which outlives the processes that answer them.

A request that comes while there is no process waits for the next one, within its deadline. One
whose process dies is answered when it is known why: the connection breaks before the kernel has
told. Decides nothing about processes; ``up``, ``down`` and ``refuse`` tell it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from time import monotonic
from typing import Final

from mesh.core.errors import Code
from mesh.wire.client import Begun, Channel, ClientStream, NotSent, Reply, RpcError, _Call
from mesh.wire.limits import INSIDE
from mesh.wire.messages import Metadata
from mesh.wire.peer import Peer

OnEnd = Callable[[Reply | RpcError], None]

# From a broken connection to the kernel's word on the process; after that it has not died at all.
_CAUSE_WAIT_S: Final = 3.0
# Somebody who is told to come back later: about as long as a small model takes to return.
_RETRY_AFTER_MS: Final = 1_000


class WorkerEnded(RpcError):
    """``lost``: the model is not here any more, and does not come back."""

    def __init__(
        self, code: Code, message: str, *, lost: bool = False, retry_after_ms: int | None = None
    ) -> None:
        super().__init__(code, message)
        self.lost = lost
        self.retry_after_ms = retry_after_ms


class _Life:
    """One process's time. ``held`` wait for the cause of its end."""

    __slots__ = ("cause", "held")

    def __init__(self) -> None:
        self.cause: WorkerEnded | None = None
        self.held: list[Callable[[], None]] = []

    def end(self, cause: WorkerEnded) -> None:
        self.cause = cause
        held, self.held = self.held, []
        for tell in held:
            tell()


def _broken(error: RpcError) -> bool:
    """It says something about the connection and not about the call: no trailers came."""
    return error.code is Code.UNAVAILABLE and not error.trailers


class _Request(Begun):
    """One unary call: waiting for a process, on its way, or held until it is known why it broke."""

    __slots__ = (
        *("_block", "_channel", "_deadline_s", "_inner", "_life", "_message", "_on_end"),
        *("_over", "_path", "_timer"),
    )

    def __init__(
        self,
        channel: WorkerChannel,
        path: str,
        message: bytes,
        block: bytes,
        deadline_s: float,
        on_end: OnEnd,
    ) -> None:
        super().__init__()
        self._channel = channel
        self._path = path
        self._message = message
        self._block = block
        self._deadline_s = deadline_s
        self._on_end = on_end
        self._inner: Begun | None = None
        self._life: _Life | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._over = False

    def send(self, life: _Life) -> None:
        if self._over:
            return
        self._stop_timer()
        self._life = life
        self._inner = Channel.begin(
            self._channel,
            self._path,
            self._message,
            self._block,
            self._deadline_s,
            self._answered,
        )

    def wait(self, longest_s: float) -> None:
        left_s = self._deadline_s - monotonic()
        late = self._channel.not_back(left_s < longest_s)
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(max(0.0, min(left_s, longest_s)), self.finish, late)

    def _answered(self, outcome: Reply | RpcError) -> None:
        life = self._life
        assert life is not None
        if not isinstance(outcome, RpcError) or not _broken(outcome):
            self.finish(outcome)
        elif life.cause is not None:
            self._explained(outcome)
        else:
            life.held.append(lambda: self._explained(outcome))
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(_CAUSE_WAIT_S, self.finish, outcome)

    def _explained(self, outcome: RpcError) -> None:
        if self._over:
            return
        self._stop_timer()
        if isinstance(outcome, NotSent):  # nobody has seen it: the next process may have it
            self._channel.again(self)
            return
        assert self._life is not None and self._life.cause is not None
        self.finish(self._life.cause)

    def finish(self, outcome: Reply | RpcError) -> None:
        if not self._over:
            self._over = True
            self._stop_timer()
            self._channel.left()
            self._on_end(outcome)

    def cancel(self) -> None:
        if not self._over:
            self._over = True
            self._stop_timer()
            self._channel.left()
            if self._inner is not None:
                self._inner.cancel()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class _Stream(ClientStream):
    """Errors are told as for unary calls."""

    def __init__(
        self, channel: WorkerChannel, path: str, metadata: Metadata, timeout_s: float | None
    ) -> None:
        super().__init__(channel, path, metadata, timeout_s)
        self._worker_channel = channel
        self._inside = True
        channel.entered()

    async def __aiter__(self) -> AsyncIterator[bytes]:
        try:
            async for message in super().__aiter__():
                yield message
        except RpcError as error:
            raise await self._worker_channel.explained(error) from None

    async def send(self, message: bytes) -> None:
        try:
            await super().send(message)
        except RpcError as error:
            raise await self._worker_channel.explained(error) from None

    def cancel(self) -> None:
        super().cancel()
        if self._inside:
            self._inside = False
            self._worker_channel.left()


class WorkerChannel(Channel):
    """``on_busy`` is called when the first request comes in."""

    def __init__(
        self,
        model_id: str,
        *,
        max_message_bytes: int,
        wait_s: float,
        on_busy: Callable[[], None],
    ) -> None:
        super().__init__("unix:", limits=replace(INSIDE, max_message_bytes=max_message_bytes))
        self._model_id = model_id
        self._wait_s = wait_s
        self._on_busy = on_busy
        self._life: _Life | None = None
        self._last: _Life | None = None
        self._refusal: WorkerEnded | None = None
        self._why = ""
        self._waiting: list[_Request] = []
        self._up: list[asyncio.Future[None]] = []
        self.in_flight = 0

    # ---- what becomes of the process ----

    def up(self, address: str) -> None:
        """A process has the model and answers there."""
        self.peer = Peer(address, limits=self._limits)
        self._prefixes.clear()
        self._life = self._last = _Life()
        self._wake()
        waiting, self._waiting = self._waiting, []
        for request in waiting:
            request.send(self._life)

    def down(self, cause: WorkerEnded) -> None:
        """The process is gone; another will come."""
        life, self._life = self._life, None
        self._why = cause.message
        self.peer.abort()
        if life is not None:
            life.end(cause)

    def refuse(self, cause: WorkerEnded) -> None:
        """None will come: from now on, and for those who wait."""
        self._refusal = cause
        self.down(cause)
        self._wake()
        waiting, self._waiting = self._waiting, []
        for request in waiting:
            request.finish(cause)

    def _wake(self) -> None:
        waiters, self._up = self._up, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    # ---- requests ----

    def entered(self) -> None:
        self.in_flight += 1
        if self.in_flight == 1:
            self._on_busy()

    def left(self) -> None:
        self.in_flight -= 1

    def begin(
        self, path: str, message: bytes, block: bytes, deadline_s: float, on_end: OnEnd
    ) -> Begun:
        self.entered()
        request = _Request(self, path, message, block, deadline_s, on_end)
        if self._life is not None:
            request.send(self._life)
        else:
            self.again(request)
        return request

    def again(self, request: _Request) -> None:
        """It waits for the next process, or hears that none comes."""
        if self._refusal is not None:
            asyncio.get_running_loop().call_soon(request.finish, self._refusal)
        elif self._life is not None:
            request.send(self._life)
        else:
            self._waiting.append(request)
            request.wait(self._wait_s)

    def not_back(self, deadline: bool) -> WorkerEnded:
        text = f"model {self._model_id!r} is being brought back; {self._why}"
        if deadline:
            return WorkerEnded(Code.DEADLINE_EXCEEDED, f"the deadline passed: {text}")
        return WorkerEnded(Code.UNAVAILABLE, text, retry_after_ms=_RETRY_AFTER_MS)

    async def open(self, path: str, metadata: Metadata, timeout_s: float | None) -> _Call:
        if self._life is None:
            left_s = self._wait_s if timeout_s is None else min(timeout_s, self._wait_s)
            begun_s = monotonic()
            await self._until_up(left_s, deadline=timeout_s is not None and timeout_s <= left_s)
            if timeout_s is not None:
                timeout_s = max(0.0, timeout_s - (monotonic() - begun_s))
        return await super().open(path, metadata, timeout_s)

    async def _until_up(self, longest_s: float, *, deadline: bool) -> None:
        try:
            async with asyncio.timeout(longest_s):
                while self._life is None:
                    if self._refusal is not None:
                        raise self._refusal
                    waiter = asyncio.get_running_loop().create_future()
                    self._up.append(waiter)
                    await waiter
        except TimeoutError:
            raise self.not_back(deadline) from None

    def stream(
        self, path: str, *, metadata: Metadata = (), timeout_s: float | None = None
    ) -> ClientStream:
        return _Stream(self, path, metadata, timeout_s)

    async def explained(self, error: RpcError) -> RpcError:
        """The cause of a broken connection, when the kernel has told."""
        life = self._last
        if life is None or isinstance(error, WorkerEnded) or not _broken(error):
            return error
        if life.cause is None:
            told: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            life.held.append(lambda: None if told.done() else told.set_result(None))
            try:
                async with asyncio.timeout(_CAUSE_WAIT_S):
                    await told
            except TimeoutError:
                return error
        return life.cause or error
