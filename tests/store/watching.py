"""What a consumer of a watch ends up believing: the snapshot, then every change."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from types import TracebackType
from typing import Self

from mesh.store.api import Changes, Delete, KVStore, Put, Snapshot

WAIT_S = 60.0


class Watching:
    """Follows a prefix in a task and keeps both the events and the resulting state."""

    def __init__(self, store: KVStore, prefix: str = "") -> None:
        self.state: dict[str, bytes] = {}
        self.events: list[Put | Delete] = []
        self.snapshots = 0
        self.revision = 0
        self._watch: AsyncIterator[Snapshot | Changes] = store.watch(prefix)
        self._moved = asyncio.Condition()
        self._task: asyncio.Task[None] | None = None
        self.ended = False

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._follow())
        await self.until(lambda: self.snapshots > 0)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._task is not None
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _follow(self) -> None:
        async for step in self._watch:
            async with self._moved:
                self._take(step)
                self._moved.notify_all()
        async with self._moved:
            self.ended = True
            self._moved.notify_all()

    def _take(self, step: Snapshot | Changes) -> None:
        assert step.revision >= self.revision or isinstance(step, Snapshot)
        if isinstance(step, Snapshot):
            self.snapshots += 1
            self.state = {item.key: item.value for item in step.items}
        else:
            for event in step.events:
                assert self.revision < event.mod_revision <= step.revision
                self.events.append(event)
                if isinstance(event, Put):
                    self.state[event.key] = event.value
                else:
                    self.state.pop(event.key, None)
        self.revision = step.revision

    async def until(self, reached: Callable[[], bool]) -> None:
        """Fails with what is known when it is not reached in time, or the watch broke."""
        assert self._task is not None
        async with self._moved:
            waiter = asyncio.ensure_future(self._moved.wait_for(reached))
            try:
                async with asyncio.timeout(WAIT_S):
                    await waiter
            except TimeoutError:
                if self._task.done():
                    self._task.result()
                raise AssertionError(
                    f"not reached; {len(self.events)} events, {len(self.state)} keys, "
                    f"{self.snapshots} snapshots"
                ) from None
