"""Tells whoever starts pods (the controller) that requests wait for one: ``demand/<runtime>``.

The value names the model that was asked for last, and when. A runtime's key is written at most once
in ``REPEAT_MS``, however many requests wait; whoever starts pods deletes it when it has been met. A
write that fails is only logged: the requests look again, and each look tells anew.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Final

from mesh import registry
from mesh.core.demand import demand_of
from mesh.core.errors import MeshError
from mesh.core.policy import Policy
from mesh.core.view import ClusterView
from mesh.store.api import KVStore

log = logging.getLogger(__name__)

REPEAT_MS: Final = 5_000


class Demands:
    """``now_ms`` is the wall clock's reading."""

    def __init__(
        self, store: KVStore, view: ClusterView, *, policy: Policy, now_ms: Callable[[], int]
    ) -> None:
        self._store = store
        self._view = view
        self._policy = policy
        self._now_ms = now_ms
        self._told_ms: dict[str, int] = {}  # by runtime: when its key was written last
        self._writes: set[asyncio.Task[None]] = set()

    def tell(self, model_id: str) -> None:
        """Requests wait for this model, and no pod that could run it is there."""
        model = self._view.models.get(model_id)
        if model is None:
            return
        now_ms = self._now_ms()
        demand = demand_of(self._view, model, now_ms=now_ms, policy=self._policy)
        runtime = self._view.runtime_for(model.model_type, demand.required)
        if runtime is None or now_ms - self._told_ms.get(runtime.name, -REPEAT_MS) < REPEAT_MS:
            return
        self._told_ms[runtime.name] = now_ms
        task = asyncio.get_running_loop().create_task(self._write(runtime.name, model_id, now_ms))
        self._writes.add(task)
        task.add_done_callback(self._writes.discard)

    async def _write(self, runtime: str, model_id: str, now_ms: int) -> None:
        try:
            await self._store.put(
                registry.demand_key(runtime), registry.encode_demand(model_id, now_ms)
            )
        except MeshError as error:
            self._told_ms.pop(runtime, None)
            log.warning("demand for the runtime %s was not written: %s", runtime, error.message)

    async def close(self) -> None:
        for task in self._writes:
            task.cancel()
        await asyncio.gather(*self._writes, return_exceptions=True)
