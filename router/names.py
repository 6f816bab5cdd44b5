"""Names that the view does not know: asked of the store, within bounds.

A watch lags by milliseconds, so a model that was registered through another router a moment ago may
be missing here. The store has the last word, but a flood of unknown names must not become a flood
of reads: one read a name at a time, ``MAX_READS`` at once, and a name that was not there is not
asked for again for ``NEGATIVE_TTL_S``. Past the bound the view's word counts.

What is found is put into the view, where the watch will confirm it. While the store is away an
unknown name is UNAVAILABLE, not NOT_FOUND: it may be registered and this router cut off.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Final

from mesh import registry
from mesh.core.errors import InvalidArgument, MeshError, NotFound, Unavailable
from mesh.core.view import ClusterView
from mesh.store.api import KVStore, StoreUnavailable

log = logging.getLogger(__name__)

# Reads of the store at once. Each is one round trip; a flood beyond is answered from the view.
MAX_READS: Final = 32
# Calls that may wait for one name's read.
MAX_WAITING_PER_NAME: Final = 1_024
# How long "not there" is believed. The watch ends it sooner, because the view is asked first.
NEGATIVE_TTL_S: Final = 1.0
MAX_NEGATIVE: Final = 10_000
READ_TIMEOUT_S: Final = 2.0
STORE_AWAY_RETRY_MS: Final = 1_000

Known = Callable[[MeshError | None], None]


class NameLookup:
    """``clock`` gives monotonic seconds."""

    def __init__(self, store: KVStore, view: ClusterView, *, clock: Callable[[], float]) -> None:
        self._store = store
        self._view = view
        self._clock = clock
        self._absent: dict[str, float] = {}  # name -> when to ask again; oldest first
        self._waiting: dict[str, list[Known]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self.reads = 0  # for tests and the curious

    def look_up(self, name: str, known: Known) -> None:
        """Call ``known`` with None when the view has the name now, else with the error.

        At once when the answer is at hand, later when the store has to be read.
        """
        until_s = self._absent.get(name)
        if until_s is not None:
            if self._clock() < until_s:
                known(self.not_found(name))
                return
            del self._absent[name]
        waiting = self._waiting.get(name)
        if waiting is not None and len(waiting) < MAX_WAITING_PER_NAME:
            waiting.append(known)
        elif waiting is not None or len(self._waiting) >= MAX_READS:
            known(self.not_found(name))
        else:
            self._waiting[name] = [known]
            task = asyncio.get_running_loop().create_task(self._read_and_tell(name))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def find(self, name: str) -> None:
        """Return when the view has the name. Raises what ``look_up`` tells."""
        told: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def known(error: MeshError | None) -> None:
            if told.done():
                return
            if error is None:
                told.set_result(None)
            else:
                told.set_exception(error)

        self.look_up(name, known)
        await told

    @staticmethod
    def not_found(name: str) -> NotFound:
        shown = name if len(name) <= registry.MAX_NAME_CHARS else name[:80] + "..."
        return NotFound(f"model not found: {shown!r} is not registered")

    async def close(self) -> None:
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _read_and_tell(self, name: str) -> None:
        error: MeshError | None = Unavailable("the router is shutting down")
        try:
            error = await self._answer(name)
        finally:
            for known in self._waiting.pop(name):
                known(error)

    async def _answer(self, name: str) -> MeshError | None:
        self.reads += 1
        try:
            async with asyncio.timeout(READ_TIMEOUT_S):
                found = await self._read(name)
        except (StoreUnavailable, TimeoutError):
            return Unavailable(
                f"model {name!r} is not known to this router, and the store cannot be asked now",
                retry_after_ms=STORE_AWAY_RETRY_MS,
            )
        except InvalidArgument:  # no key can have that name
            found = False
        except MeshError as error:  # a record that nobody can read
            log.error("name %r: %s", name, error.message)
            return error
        if found:
            return None
        while len(self._absent) >= MAX_NEGATIVE:
            del self._absent[next(iter(self._absent))]
        self._absent[name] = self._clock() + NEGATIVE_TTL_S
        return self.not_found(name)

    async def _read(self, name: str) -> bool:
        """Whether the name means a model now; then the view knows both."""
        alias = await self._store.get(registry.vmodel_key(name))
        model_id = name
        if alias is not None:
            vmodel = registry.decode_vmodel(name, alias.value)
            self._view.put_vmodel(vmodel)
            model_id = vmodel.active_model_id
            if model_id in self._view.models:
                return True
        model = await self._store.get(registry.model_key(model_id))
        if model is None:
            return False
        self._view.put_model(registry.decode_model(model_id, model.value))
        return True
