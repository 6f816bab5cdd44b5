"""Unloads of an external runtime's models, tried until they succeed or there is no hope.

A model counts in the pod's books until its runtime has said that it is gone, so a failed unload is
tried again, ``tries`` times in all and ``retry_s`` apart; a load that comes meanwhile has one of
them tried at once, because it may need that room. Everything runs in the event loop.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from mesh.core.errors import Code, Internal
from mesh.runtimes.external_calls import Management
from mesh.wire.client import RpcError

log = logging.getLogger(__name__)


class _Pending:
    __slots__ = ("nudged", "over", "tried")

    def __init__(self) -> None:
        self.nudged = asyncio.Event()
        self.tried: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.over = False


class Unloads:
    """``lost`` hears of every error of a connection."""

    def __init__(
        self,
        management: Management,
        *,
        tries: int,
        retry_s: float,
        timeout_s: float,
        lost: Callable[[RpcError], None],
    ) -> None:
        self._management = management
        self._tries = tries
        self._retry_s = retry_s
        self._timeout_s = timeout_s
        self._lost = lost
        self._pending: dict[str, _Pending] = {}  # those that failed, the oldest first
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def pending(self) -> tuple[str, ...]:
        """Models whose unload has failed and is tried again."""
        return tuple(self._pending)

    async def unload(self, model_id: str) -> None:
        """Return when it is gone. Raises Internal when the last try has failed."""
        failure = await self._try(model_id)
        if failure is not None:
            await self._retry(model_id, failure)

    async def unload_soon(self, model_id: str) -> None:
        """Try once now; what fails is tried again behind the caller's back."""
        failure = await self._try(model_id)
        if failure is None:
            return
        task = asyncio.get_running_loop().create_task(self._retry_and_log(model_id, failure))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def make_way(self, model_id: str) -> None:
        """Before a load: one retry of the oldest; or of this model's own, whose retries end then,
        or they would unload what is about to be loaded. They go on when this is cancelled."""
        own = self._pending.get(model_id)
        oldest = own or next(iter(self._pending.values()), None)
        if oldest is None:
            return
        if own is not None:
            own.over = True
        oldest.nudged.set()
        try:
            await asyncio.wait({oldest.tried})
        except asyncio.CancelledError:
            oldest.over = False
            raise

    def nudge_all(self) -> None:
        """The runtime answers again."""
        for pending in self._pending.values():
            pending.nudged.set()

    async def close(self) -> None:
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _retry_and_log(self, model_id: str, failure: RpcError) -> None:
        try:
            await self._retry(model_id, failure)
        except Internal as error:
            log.error("%s", error.message)

    async def _retry(self, model_id: str, failure: RpcError) -> None:
        log.warning("unloading model %r failed and is tried again: %s", model_id, failure.message)
        pending = self._pending[model_id] = _Pending()
        loop = asyncio.get_running_loop()
        try:
            for _ in range(self._tries - 1):
                try:
                    async with asyncio.timeout(self._retry_s):
                        await pending.nudged.wait()
                except TimeoutError:
                    pass
                pending.nudged.clear()
                again = await self._try(model_id)
                told, pending.tried = pending.tried, loop.create_future()
                if not told.done():
                    told.set_result(None)
                if again is None or pending.over:
                    return
                failure = again
        finally:
            if not pending.tried.done():
                pending.tried.set_result(None)
            if self._pending.get(model_id) is pending:
                del self._pending[model_id]
        raise Internal(
            f"the runtime at {self._management.address} did not unload model {model_id!r} in "
            f"{self._tries} tries; its memory may be in use still: {failure.message}"
        )

    async def _try(self, model_id: str) -> RpcError | None:
        try:
            await self._management.unload(model_id, self._timeout_s)
        except RpcError as error:
            if error.code is Code.NOT_FOUND:
                return None
            self._lost(error)
            return error
        return None
