"""What is to be reconciled next: each key once, one worker to a key, failures further and further
apart.

``Schedule`` decides and takes the time from its caller; ``WorkQueue`` runs the work. As client-go's
rate-limited queue: a key that is added while it is worked on is worked on once more afterwards, a
key that waits out a failure is brought forward by a change, and an idle queue has no timer.
"""

from __future__ import annotations

import asyncio
import heapq
import logging
import random
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Hashable
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

from mesh.core.errors import MeshError
from mesh.reconciler.kube_errors import ApiAway, ApiConflict, ApiError

logger = logging.getLogger(__name__)

K = TypeVar("K", bound=Hashable)

BASE_MS: Final = 5
# client-go waits up to 1,000 s; people watch a cluster that came back.
LONGEST_MS: Final = 60_000
# A conflict means that somebody else was quicker, not that something is wrong.
_LONGEST_CONFLICT_MS: Final = 1_000
# Never all at the same moment: at least this part of the delay, the rest is drawn.
_LEAST_OF_DELAY: Final = 0.5


def backoff_ms(
    failures: int, draw: float, base_ms: int = BASE_MS, longest_ms: int = LONGEST_MS
) -> int:
    """Before try ``failures`` + 1 (``failures`` from 1); ``draw`` from 0 to 1."""
    doubled = base_ms << min(failures - 1, 30)
    longest = min(doubled, longest_ms)
    return max(1, round(longest * (_LEAST_OF_DELAY + (1 - _LEAST_OF_DELAY) * draw)))


class Schedule(Generic[K]):
    """Which key is due. Not safe for concurrent use; times are milliseconds of any one clock."""

    def __init__(self) -> None:
        self._ready: deque[K] = deque()
        self._waiting_for_turn: set[K] = set()  # what is in ``_ready``
        self._working: set[K] = set()
        self._again: set[K] = set()  # added while being worked on
        self._due_ms: dict[K, int] = {}
        self._heap: list[tuple[int, int, K]] = []  # an entry counts while ``_due_ms`` agrees
        self._sequence = 0  # keys need no order
        self._failures: dict[K, int] = {}

    def __len__(self) -> int:
        """Keys that are ready or being worked on; those that wait for a time do not count."""
        return len(self._ready) + len(self._working)

    @property
    def ready(self) -> int:
        return len(self._ready)

    @property
    def delayed(self) -> int:
        return len(self._due_ms)

    @property
    def failed(self) -> Collection[K]:
        """Keys whose last try failed."""
        return self._failures.keys()

    def failures(self, key: K) -> int:
        """In a row, so far."""
        return self._failures.get(key, 0)

    def add(self, key: K) -> None:
        """Due now; a later time that it waited for is dropped."""
        self._due_ms.pop(key, None)
        if key in self._working:
            self._again.add(key)
        elif key not in self._waiting_for_turn:
            self._waiting_for_turn.add(key)
            self._ready.append(key)

    def add_at(self, key: K, due_ms: int) -> None:
        """Due then; the earlier of two times counts. Nothing where it is due already."""
        if key in self._waiting_for_turn or key in self._again:
            return
        known = self._due_ms.get(key)
        if known is not None and known <= due_ms:
            return
        self._due_ms[key] = due_ms
        self._sequence += 1
        heapq.heappush(self._heap, (due_ms, self._sequence, key))

    def add_failed(
        self,
        key: K,
        now_ms: int,
        draw: float,
        at_least_ms: int = 0,
        longest_ms: int = LONGEST_MS,
    ) -> int:
        """Due after its backoff, which is returned in milliseconds."""
        failures = self._failures[key] = self._failures.get(key, 0) + 1
        delay_ms = max(backoff_ms(failures, draw, BASE_MS, longest_ms), at_least_ms)
        self.add_at(key, now_ms + delay_ms)
        return delay_ms

    def retry_failed(self) -> None:
        """What waits out a failure is due now: its cause may be over."""
        for key in [key for key in self._failures if key in self._due_ms]:
            self.add(key)

    def forget(self, key: K) -> None:
        """Its failures are over."""
        self._failures.pop(key, None)

    def take(self, now_ms: int) -> K | None:
        """The next key, which is the caller's until ``done``."""
        self._move_due(now_ms)
        if not self._ready:
            return None
        key = self._ready.popleft()
        self._waiting_for_turn.discard(key)
        self._working.add(key)
        return key

    def done(self, key: K) -> None:
        self._working.discard(key)
        if key in self._again:
            self._again.discard(key)
            self.add(key)

    def next_due_ms(self) -> int | None:
        """When ``take`` may have something that it has not now."""
        while self._heap:
            due_ms, _, key = self._heap[0]
            if self._due_ms.get(key) == due_ms:
                return due_ms
            heapq.heappop(self._heap)
        return None

    def _move_due(self, now_ms: int) -> None:
        while (due_ms := self.next_due_ms()) is not None and due_ms <= now_ms:
            _, _, key = heapq.heappop(self._heap)
            self.add(key)


@dataclass(frozen=True, slots=True)
class Again:
    """What a handler returns when there is more to do for its key later."""

    after_s: float


# Reconciles one key. An exception is a failure (backoff); Again is a success.
Handler = Callable[[K], Awaitable[Again | None]]


class WorkQueue(Generic[K]):
    """Runs a handler for each key, up to ``workers`` at once. Run ``run()`` as a task.

    A handler that fails is logged and tried again after its key's backoff, or after what the API
    server asked for where that is longer. Cancelling ``run`` cancels the handlers and waits.
    """

    def __init__(self, handler: Handler[K], *, workers: int = 8, name: str = "queue") -> None:
        self.schedule: Schedule[K] = Schedule()
        self.failed_total = 0
        self.handled_total = 0
        self._handler = handler
        self._workers = workers
        self._name = name
        self._tasks: set[asyncio.Task[None]] = set()
        self._moved = asyncio.Event()

    def add(self, key: K) -> None:
        self.schedule.add(key)
        self._moved.set()

    def add_after(self, key: K, after_s: float) -> None:
        self.schedule.add_at(key, _now_ms() + round(after_s * 1_000))
        self._moved.set()

    def retry_failed(self) -> None:
        """Try again now what has failed: its cause may be over."""
        self.schedule.retry_failed()
        self._moved.set()

    async def run(self) -> None:
        """Until cancelled."""
        try:
            while True:
                self._moved.clear()
                self._start_workers()
                await self._wait_moved()
        finally:
            for task in self._tasks:
                task.cancel()
            if self._tasks:
                await asyncio.wait(self._tasks)

    def _start_workers(self) -> None:
        while len(self._tasks) < self._workers:
            key = self.schedule.take(_now_ms())
            if key is None:
                return
            task = asyncio.create_task(self._work(key), name=f"{self._name} {key}")
            self._tasks.add(task)
            task.add_done_callback(self._ended)

    async def _wait_moved(self) -> None:
        due_ms = self.schedule.next_due_ms()
        if due_ms is None or len(self._tasks) >= self._workers:
            await self._moved.wait()
            return
        try:
            async with asyncio.timeout(max(0, due_ms - _now_ms()) / 1_000):
                await self._moved.wait()
        except TimeoutError:
            return

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._moved.set()

    async def _work(self, key: K) -> None:
        try:
            again = await self._handler(key)
        except Exception as error:  # whatever it is, the other keys go on
            self.failed_total += 1
            asked_s = error.retry_after_s if isinstance(error, ApiAway) else 0.0
            longest_ms = _LONGEST_CONFLICT_MS if isinstance(error, ApiConflict) else LONGEST_MS
            delay_ms = self.schedule.add_failed(
                key, _now_ms(), random.random(), round(asked_s * 1_000), longest_ms
            )
            _log_failure(self._name, key, error, delay_ms)
        else:
            self.schedule.forget(key)
            if again is not None:
                self.add_after(key, again.after_s)
        finally:
            self.handled_total += 1
            self.schedule.done(key)


def _log_failure(name: str, key: object, error: Exception, delay_ms: int) -> None:
    # What the API server refuses explains itself; anything else is a defect and shows where. A
    # conflict is how two writers meet, and no fault.
    known = isinstance(error, ApiError | MeshError)
    logger.log(
        logging.DEBUG if isinstance(error, ApiConflict) else logging.WARNING,
        "%s: %s failed, again in %.1f s: %s",
        name,
        key,
        delay_ms / 1_000,
        error if known else repr(error),
        exc_info=None if known else error,
    )


def _now_ms() -> int:
    return round(asyncio.get_running_loop().time() * 1_000)
