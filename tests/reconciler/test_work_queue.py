"""The schedule as a table and against a dumb one; the queue in virtual time."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import looptime
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.reconciler.kube_errors import ApiAway, Request
from mesh.reconciler.kube_resources import PODS
from mesh.reconciler.work_queue import (
    BASE_MS,
    LONGEST_MS,
    Again,
    Handler,
    Schedule,
    WorkQueue,
    backoff_ms,
)


def test_a_key_is_due_once_however_often_it_is_added() -> None:
    schedule: Schedule[str] = Schedule()
    for key in ("a", "b", "a", "a"):
        schedule.add(key)
    assert [schedule.take(0) for _ in range(3)] == ["a", "b", None]


def test_a_key_is_never_worked_on_twice_at_once_and_once_more_when_it_changed() -> None:
    schedule: Schedule[str] = Schedule()
    schedule.add("a")
    assert schedule.take(0) == "a"
    schedule.add("a")
    schedule.add("a")
    assert schedule.take(0) is None
    schedule.done("a")
    assert schedule.take(0) == "a"
    schedule.done("a")
    assert schedule.take(0) is None
    assert len(schedule) == 0


def test_the_earlier_of_two_times_counts() -> None:
    schedule: Schedule[str] = Schedule()
    schedule.add_at("a", 100)
    schedule.add_at("a", 50)
    schedule.add_at("a", 70)
    assert (schedule.take(49), schedule.next_due_ms()) == (None, 50)
    assert schedule.take(50) == "a"
    schedule.done("a")
    assert schedule.next_due_ms() is None
    assert schedule.take(1_000) is None


def test_a_change_brings_a_delayed_key_forward_and_the_delay_is_gone() -> None:
    schedule: Schedule[str] = Schedule()
    schedule.add_failed("a", 0, draw=1.0)
    schedule.add("a")
    assert schedule.take(0) == "a"
    schedule.done("a")
    assert schedule.next_due_ms() is None
    assert schedule.take(10_000) is None


def test_failures_back_off_by_key_until_they_are_forgotten() -> None:
    schedule: Schedule[str] = Schedule()
    assert [schedule.add_failed("a", 0, draw=1.0) for _ in range(4)] == [5, 10, 20, 40]
    assert schedule.add_failed("b", 0, draw=1.0) == BASE_MS
    assert schedule.failures("a") == 4
    schedule.forget("a")
    assert schedule.add_failed("a", 0, draw=1.0) == BASE_MS
    assert schedule.add_failed("a", 0, draw=1.0, at_least_ms=5_000) == 5_000


@given(failures=st.integers(1, 10_000), draw=st.floats(0, 1))
def test_a_backoff_is_never_none_nor_longer_than_a_minute(failures: int, draw: float) -> None:
    assert 1 <= backoff_ms(failures, draw) <= LONGEST_MS
    assert backoff_ms(failures, draw) <= backoff_ms(failures + 1, 1.0)


class Dumb:
    """The same by looking through everything."""

    def __init__(self) -> None:
        self.ready: list[int] = []
        self.working: set[int] = set()
        self.again: set[int] = set()
        self.due: dict[int, int] = {}

    def add(self, key: int) -> None:
        self.due.pop(key, None)
        if key in self.working:
            self.again.add(key)
        elif key not in self.ready:
            self.ready.append(key)

    def add_at(self, key: int, due_ms: int) -> None:
        if key not in self.ready and key not in self.again:
            self.due[key] = min(due_ms, self.due.get(key, due_ms))

    def take_any(self, now_ms: int) -> set[int]:
        """What may come next: keys that became due together have no order among them."""
        for key in [key for key, due in self.due.items() if due <= now_ms]:
            self.add(key)
        return set(self.ready) - self.working

    def took(self, key: int) -> None:
        self.ready.remove(key)
        self.working.add(key)

    def done(self, key: int) -> None:
        self.working.discard(key)
        if key in self.again:
            self.again.discard(key)
            self.add(key)


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(0, 4), st.just(0)),
        st.tuples(st.just("at"), st.integers(0, 4), st.integers(0, 30)),
        st.tuples(st.just("done"), st.integers(0, 4), st.just(0)),
        st.tuples(st.just("take"), st.just(0), st.integers(0, 10)),
    ),
    max_size=60,
)


@given(steps=STEPS)
def test_the_schedule_gives_what_a_dumb_one_gives(steps: list[tuple[str, int, int]]) -> None:
    fast: Schedule[int] = Schedule()
    dumb = Dumb()
    now_ms = 0
    for step, key, number in steps:
        match step:
            case "add":
                fast.add(key)
                dumb.add(key)
            case "at":
                fast.add_at(key, now_ms + number)
                dumb.add_at(key, now_ms + number)
            case "done" if key in dumb.working:
                fast.done(key)
                dumb.done(key)
            case "take":
                now_ms += number
                allowed = dumb.take_any(now_ms)
                taken = fast.take(now_ms)
                assert (taken is None) == (not allowed)
                if taken is not None:
                    assert taken in allowed
                    dumb.took(taken)
        assert len(fast) == len(dumb.ready) + len(dumb.working)
        assert fast.next_due_ms() == min(dumb.due.values(), default=None)


def virtual(test: Callable[[], Awaitable[None]]) -> Callable[[], None]:
    """In a loop whose clock jumps to the next timer."""

    @functools.wraps(test)
    def run() -> None:
        loop = looptime.new_event_loop()
        try:
            loop.run_until_complete(test())
        finally:
            loop.close()

    return run


@asynccontextmanager
async def running(handler: Handler[str], workers: int = 2) -> AsyncIterator[WorkQueue[str]]:
    queue: WorkQueue[str] = WorkQueue(handler, workers=workers)
    task = asyncio.create_task(queue.run())
    try:
        yield queue
    finally:
        task.cancel()
        await asyncio.wait([task])


def away(retry_after_s: float = 0.0) -> ApiAway:
    return ApiAway(Request("get", PODS), "not there", retry_after_s=retry_after_s)


@virtual
async def test_a_failing_key_is_tried_again_and_hinders_no_other() -> None:
    tries: list[str] = []
    whole = asyncio.Event()

    async def handle(key: str) -> None:
        tries.append(key)
        if key == "bad" and tries.count("bad") < 4:
            raise ValueError("no")
        if key == "bad":
            whole.set()

    async with running(handle) as queue:
        queue.add("bad")
        queue.add("good")
        await whole.wait()
        assert tries == ["bad", "good", "bad", "bad", "bad"]
        assert queue.failed_total == 3
        await asyncio.sleep(0)
        assert queue.schedule.failures("bad") == 0


@virtual
async def test_a_busy_server_is_left_alone_as_long_as_it_asked() -> None:
    began = asyncio.get_running_loop().time()
    tries: list[float] = []
    whole = asyncio.Event()

    async def handle(_: str) -> None:
        tries.append(asyncio.get_running_loop().time() - began)
        if len(tries) == 1:
            raise away(retry_after_s=7.0)
        whole.set()

    async with running(handle) as queue:
        queue.add("a")
        await whole.wait()
    assert tries[1] >= 7.0


@virtual
async def test_a_handler_may_ask_to_be_called_again_later() -> None:
    began = asyncio.get_running_loop().time()
    tries: list[float] = []
    whole = asyncio.Event()

    async def handle(_: str) -> Again | None:
        tries.append(asyncio.get_running_loop().time() - began)
        if len(tries) == 1:
            return Again(60.0)
        whole.set()
        return None

    async with running(handle) as queue:
        queue.add("a")
        await whole.wait()
        assert queue.failed_total == 0
    assert tries[1] == pytest.approx(60.0, abs=0.1)


@virtual
async def test_no_more_than_workers_at_once_and_each_key_by_one() -> None:
    at_work: list[str] = []
    most = 0
    twice = False
    handled = asyncio.Semaphore(0)

    async def handle(key: str) -> None:
        nonlocal most, twice
        twice = twice or key in at_work
        at_work.append(key)
        most = max(most, len(at_work))
        if key == "a" and handled.locked():
            queue.add("a")  # changed while it is worked on
        await asyncio.sleep(1)
        at_work.remove(key)
        handled.release()

    async with running(handle, workers=3) as queue:
        for key in "abcdefg":
            queue.add(key)
        for _ in range(8):
            await handled.acquire()
    assert (most, twice) == (3, False)


@virtual
async def test_ending_the_queue_ends_its_handlers() -> None:
    started, ended = asyncio.Event(), asyncio.Event()

    async def handle(_: str) -> None:
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    async with running(handle) as queue:
        queue.add("a")
        await started.wait()
    assert ended.is_set()


@virtual
async def test_an_idle_queue_has_no_timer() -> None:
    handled = asyncio.Event()

    async def handle(_: str) -> None:
        handled.set()

    async with running(handle) as queue:
        queue.add("a")
        await handled.wait()
        for _ in range(3):  # the worker ends, and the queue looks what else there is
            await asyncio.sleep(0)
        loop = asyncio.get_running_loop()
        assert [timer for timer in loop._scheduled if not timer.cancelled()] == []  # type: ignore[attr-defined]
