"""Loads that requests wait for: one per model in this router, shared by all who wait.

The steps are ``mesh.core.loads``'; this module carries them out: it counts a placement as pending
in the view, calls the instance, tells the view what came of it and releases the waiting requests
in the order in which they came. A waiter that leaves never cancels a load. A load that has no
place right now pauses until the view changes or its time comes, as long as somebody waits for it.

Bounds: ``Policy.max_waiting_per_model`` and ``max_waiting_total`` waiters (RESOURCE_EXHAUSTED past
them), those of ``mesh.core.loads`` for each load and, for a place, each waiter, and for a waiter
without a deadline the load time-out plus ``Policy.queue_timeout_ms`` (then UNAVAILABLE). A waiter
with a deadline is ended by whoever carries its call. A change of the view wakes paused loads in
slices, so that many of them cost others no pause.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Coroutine
from itertools import islice
from typing import Any, Final, assert_never

from mesh.core import loads as core
from mesh.core.errors import Internal, MeshError, ResourceExhausted, Unavailable
from mesh.core.nowhere import RUNTIME_STARTING
from mesh.core.placement import Placement
from mesh.core.policy import Policy
from mesh.core.types import LoadPriority
from mesh.core.view import ClusterView
from mesh.decision_log import DecisionLog
from mesh.metrics import RouterMetrics
from router.load_calls import LoadCalls
from router.peers import Peers

log = logging.getLogger(__name__)

# A queue that is full now has moved on when some load has ended.
QUEUE_RETRY_MS: Final = 1_000
# Paused loads that look again in one turn of the loop: a look costs up to a millisecond.
WAKE_SLICE: Final = 32
REFUSALS_NOTED_MS: Final = 1_000

# Called once with the instance that has the copy, or with the error.
Ended = Callable[[str | MeshError], None]


class Waiter:
    """One request in a load's queue."""

    __slots__ = ("asked_at_ms", "ended", "flight", "timer")

    def __init__(self, flight: _Flight, ended: Ended, asked_at_ms: int) -> None:
        self.flight: _Flight | None = flight
        self.ended = ended
        self.asked_at_ms = asked_at_ms
        self.timer: asyncio.TimerHandle | None = None


class _Flight:
    """One load under way, or waiting for a place."""

    __slots__ = ("last_used_at_ms", "model_id", "noted_wait", "pause", "task", "waiters")

    def __init__(self, model_id: str, last_used_at_ms: int) -> None:
        self.model_id = model_id
        self.last_used_at_ms = last_used_at_ms
        self.waiters: dict[Waiter, None] = {}  # in the order in which they came
        self.task: asyncio.Task[None] | None = None
        self.pause: asyncio.Future[None] | None = None  # while it waits for a place
        self.noted_wait = ""  # the reason, so that a long wait is not noted at each look

    def wake(self) -> None:
        if self.pause is not None and not self.pause.done():
            self.pause.set_result(None)


def _score_unknown(model_id: str) -> float:
    return 0.0


def _nobody_told(model_id: str) -> None:
    return


async def _told(
    asking: Coroutine[Any, Any, core.Answer], ended: Callable[[core.Answer], None]
) -> None:
    ended(await asking)


class Loads:
    """Not for more than one event loop. ``now_ms`` is the wall clock's reading; ``avoid`` names
    the instances that seem not to answer now; ``use_score`` is ``mesh.core.usage``'s;
    ``starved`` hears of each model that requests wait for and that no pod runs, at each look."""

    def __init__(
        self,
        view: ClusterView,
        peers: Peers,
        metrics: RouterMetrics,
        *,
        policy: Policy,
        now_ms: Callable[[], int],
        decisions: DecisionLog | None = None,
        avoid: Callable[[], Collection[str]] = tuple,
        use_score: Callable[[str], float] = _score_unknown,
        starved: Callable[[str], None] = _nobody_told,
    ) -> None:
        self._view = view
        self._metrics = metrics
        self._starved = starved
        self._policy = policy
        self._now_ms = now_ms
        self._decisions = decisions
        self._avoid = avoid
        self._calls = LoadCalls(
            view, peers, metrics, policy=policy, now_ms=now_ms, use_score=use_score
        )
        self._flights: dict[str, _Flight] = {}
        self._paused: dict[_Flight, None] = {}  # the one first that has paused the longest
        self._to_wake = 0  # so many of them have not looked since the view changed
        self._waking: asyncio.TimerHandle | None = None
        self._refused_ms: dict[str, int] = {}  # by reason: when a refusal was last noted
        self._background: set[asyncio.Task[object]] = set()
        self._waiting = 0

    @property
    def waiting(self) -> int:
        """Requests that wait for a load."""
        return self._waiting

    @property
    def under_way(self) -> tuple[str, ...]:
        """Models that are being loaded for this router."""
        return tuple(self._flights)

    def use_policy(self, policy: Policy) -> None:
        """From now on; loads under way go on under it too."""
        self._policy = policy
        self._calls.use_policy(policy)

    def view_changed(self) -> None:
        """Loads that wait for a place look again, soon: many changes come as one."""
        self._to_wake = len(self._paused)
        if self._paused and self._waking is None:
            delay_s = self._policy.placement_retry_ms / 1_000
            self._waking = asyncio.get_running_loop().call_later(delay_s, self._wake)

    def _wake(self) -> None:
        count = min(WAKE_SLICE, self._to_wake)
        for flight in tuple(islice(self._paused, count)):
            del self._paused[flight]
            flight.wake()
        self._to_wake = min(self._to_wake - count, len(self._paused))
        loop = asyncio.get_running_loop()
        self._waking = loop.call_later(0, self._wake) if self._to_wake > 0 else None

    # ---- waiting ----------------------------------------------------------------------------

    def wait(
        self,
        model_id: str,
        ended: Ended,
        *,
        has_deadline: bool,
        exclude: Collection[str] = (),
        last_used_at_ms: int = 0,
    ) -> Waiter:
        """Have the model loaded (or join the load) and call ``ended`` once when that is over.

        ``exclude`` are instances that the request could not reach. ``ended`` is never called from
        within this call. Raises what makes a load impossible or not wanted now: the cause of a
        recorded failure, no place for it, or ResourceExhausted when too many wait.
        """
        flight = self._flights.get(model_id)
        asked_at_ms = self._now_ms()
        waiting_here = len(flight.waiters) if flight is not None else 0
        if self._waiting >= self._policy.max_waiting_total:
            raise ResourceExhausted(
                f"{self._waiting} requests wait for models to be loaded: try again later",
                retry_after_ms=QUEUE_RETRY_MS,
            )
        if waiting_here >= self._policy.max_waiting_per_model:
            raise ResourceExhausted(
                f"{waiting_here} requests wait for model {model_id!r} to be loaded: "
                "try again later",
                retry_after_ms=QUEUE_RETRY_MS,
            )
        if flight is None:
            flight = self._start(model_id, exclude, last_used_at_ms, awaited=True)
        waiter = Waiter(flight, ended, asked_at_ms)
        flight.waiters[waiter] = None
        self._waiting += 1
        if not has_deadline:
            timeout_ms = self._calls.timeout_ms(model_id)
            loop = asyncio.get_running_loop()
            waiter.timer = loop.call_later(timeout_ms / 1_000, self._expire, waiter, timeout_ms)
        return waiter

    def leave(self, waiter: Waiter) -> None:
        """The request went away. The load goes on."""
        flight = waiter.flight
        if flight is None:
            return
        waiter.flight = None
        del flight.waiters[waiter]
        self._waiting -= 1
        if waiter.timer is not None:
            waiter.timer.cancel()
        if not flight.waiters:
            flight.wake()  # nobody waits for a place any more

    async def load(self, model_id: str, *, last_used_at_ms: int = 0) -> str:
        """Have the model loaded and return the instance. Cancelling it cancels no load."""
        loaded_on = self._view.loaded_on(model_id)
        if loaded_on:
            return loaded_on[0]
        ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()

        def tell(result: str | MeshError) -> None:
            if ended.done():
                return
            if isinstance(result, MeshError):
                ended.set_exception(result)
            else:
                ended.set_result(result)

        waiter = self.wait(model_id, tell, has_deadline=False, last_used_at_ms=last_used_at_ms)
        try:
            return await ended
        finally:
            self.leave(waiter)

    def begin(self, model_id: str, *, last_used_at_ms: int = 0) -> None:
        """Have the model loaded; nobody waits, neither for the load nor for a place. Raises what
        makes it impossible now."""
        if model_id not in self._flights and not self._view.loaded_on(model_id):
            self._start(model_id, (), last_used_at_ms, awaited=False)

    async def close(self) -> None:
        """End all waiting with UNAVAILABLE. Loads go on in their instances."""
        if self._waking is not None:
            self._waking.cancel()
            self._waking = None
        tasks = [flight.task for flight in self._flights.values() if flight.task is not None]
        for task in (*tasks, *self._background):
            task.cancel()
        await asyncio.gather(*tasks, *self._background, return_exceptions=True)

    # ---- single calls, also the leader's ----------------------------------------------------

    async def ask(
        self,
        model_id: str,
        instance_id: str,
        *,
        size_bytes: int | None,
        last_used_at_ms: int = 0,
        priority: LoadPriority = LoadPriority.AWAITED,
        pin: bool = False,
        reason: str = "",
    ) -> core.Answer:
        """One Load call. ``size_bytes`` is None for a load that somebody else has claimed already.

        The view is told what came of it: a copy becomes routable at once, a failure is known.
        """
        return await self._calls.load(
            model_id,
            instance_id,
            size_bytes=size_bytes,
            last_used_at_ms=last_used_at_ms,
            priority=priority,
            pin=pin,
            reason=reason,
        )

    def ask_soon(
        self,
        model_id: str,
        placement: Placement,
        *,
        priority: LoadPriority,
        reason: str = "",
        pin: bool = False,
        ended: Callable[[core.Answer], None] | None = None,
    ) -> None:
        """``ask`` in the background, counted as pending from now on; the view tells the rest.

        For loads that nobody waits for: of a minimum of copies, or ahead of the first request.
        ``reason`` is why there is to be a copy; the placement's is why it is to be there.
        ``ended`` hears the answer.
        """
        self._note_placement(model_id, placement.instance_id, placement.reason, placement)
        self._view.add_pending(
            model_id,
            placement.instance_id,
            size_bytes=placement.size_bytes,
            now_ms=self._now_ms(),
        )
        asking = self.ask(
            model_id,
            placement.instance_id,
            size_bytes=placement.size_bytes,
            last_used_at_ms=self._view.last_used_at_ms(model_id),
            priority=priority,
            pin=pin,
            reason=reason or placement.reason,
        )
        self._in_background(asking if ended is None else _told(asking, ended))

    def _in_background(self, work: Coroutine[Any, Any, object]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def unload(self, model_id: str, instance_id: str, reason: str = "") -> bool:
        """Drop one copy once its requests have ended; whether it was there. Raises MeshError."""
        return await self._calls.unload(model_id, instance_id, reason)

    def unload_soon(
        self, model_id: str, instance_ids: Collection[str], reason: str = "deleted"
    ) -> None:
        """Unload copies in the background; unless told otherwise, of a model that was deleted.

        What fails here is done by the leader's sweep, which unloads copies of no model.
        """
        for instance_id in instance_ids:
            self._in_background(self._try_unload(model_id, instance_id, reason))

    async def _try_unload(self, model_id: str, instance_id: str, reason: str) -> None:
        try:
            await self.unload(model_id, instance_id, reason)
        except MeshError as error:
            log.info("unload %s on %s: %s", model_id, instance_id, error.message)

    # ---- a load -----------------------------------------------------------------------------

    def _start(
        self, model_id: str, exclude: Collection[str], last_used_at_ms: int, *, awaited: bool
    ) -> _Flight:
        """Decide the first step here and now, so that what is impossible costs no task."""
        state, step = core.first_step(
            self._view,
            model_id,
            now_ms=self._now_ms(),
            policy=self._policy,
            exclude=exclude,
            avoid=self._avoid(),
        )
        if isinstance(step, core.GiveUp) or (isinstance(step, core.Wait) and not awaited):
            self._note_refusal(step, model_id)
            raise step.error()
        flight = _Flight(model_id, last_used_at_ms)
        self._flights[model_id] = flight
        flight.task = asyncio.get_running_loop().create_task(self._run(flight, state, step))
        return flight

    async def _run(self, flight: _Flight, state: core.LoadState, step: core.Step) -> None:
        result: str | MeshError = Unavailable(
            "the router is shutting down", retry_after_ms=QUEUE_RETRY_MS
        )
        try:
            result = await self._steps(flight, state, step)
        except Exception as error:  # a defect: those who wait must hear of it all the same
            log.exception("load of %s", flight.model_id)
            result = Internal(f"model {flight.model_id!r} could not be loaded: {error!r}")
        finally:
            self._release(flight, result)

    async def _steps(
        self, flight: _Flight, state: core.LoadState, step: core.Step
    ) -> str | MeshError:
        model_id = flight.model_id
        outcome: core.Outcome
        while True:
            match step:
                case core.Release():
                    return step.instance_id
                case core.GiveUp():
                    self._note("give_up", step.reason, model_id, step.detail)
                    if step.waited:
                        self._end_patient(flight, state.waiting_since_ms or 0, step)
                    if not step.waited or not flight.waiters:
                        return step.error()
                    outcome = core.Waited(next(iter(flight.waiters)).asked_at_ms)
                case core.Wait():
                    await self._pause(flight, step)
                    if not flight.waiters:
                        return step.error()
                    outcome = core.Waited(next(iter(flight.waiters)).asked_at_ms)
                case core.AskLoad():
                    self._note_placement(model_id, step.instance_id, step.reason, step.placement)
                    outcome = await self.ask(
                        model_id,
                        step.instance_id,
                        size_bytes=None if step.placement is None else step.size_bytes,
                        last_used_at_ms=flight.last_used_at_ms,
                        reason=step.reason,
                    )
                case _:
                    assert_never(step)
            state, step = core.next_step(
                state,
                outcome,
                self._view,
                now_ms=self._now_ms(),
                policy=self._policy,
                avoid=self._avoid(),
            )

    async def _pause(self, flight: _Flight, step: core.Wait) -> None:
        """Until the view has changed, the step's time has come, or nobody waits any more."""
        if not flight.waiters:
            return
        if step.reason == RUNTIME_STARTING:
            self._starved(flight.model_id)
        if flight.noted_wait != step.reason:
            flight.noted_wait = step.reason
            self._note("wait", step.reason, flight.model_id, step.detail)
        loop = asyncio.get_running_loop()
        flight.pause = loop.create_future()
        self._paused[flight] = None
        timer = loop.call_later(step.retry_ms / 1_000, flight.wake)
        try:
            await flight.pause
        finally:
            timer.cancel()
            flight.pause = None
            self._paused.pop(flight, None)

    def _end_patient(self, flight: _Flight, since_ms: int, step: core.GiveUp) -> None:
        """Fail those who have waited for a place as long as they may, and no others."""
        before_ms = self._now_ms() - core.patience_ms(step.reason, self._policy)
        error = step.error()
        for waiter in tuple(flight.waiters):
            if max(waiter.asked_at_ms, since_ms) > before_ms:
                return  # as do all who came after it
            if waiter.flight is not None:
                self.leave(waiter)
                waiter.ended(error)

    def _note_placement(
        self, model_id: str, instance_id: str, reason: str, placement: Placement | None
    ) -> None:
        self._metrics.counter("placements", reason)
        if self._decisions is not None:
            self._decisions.note(
                "place",
                reason,
                model_id=model_id,
                instance_id=instance_id,
                runner_up=(placement.runner_up or "") if placement is not None else "",
                detail=placement.detail if placement is not None else "",
            )

    def _note_refusal(self, step: core.GiveUp | core.Wait, model_id: str) -> None:
        """Of requests that are refused at once one a second and reason is noted: a broken model
        may be asked for thousands of times."""
        now_ms = self._now_ms()
        if now_ms - self._refused_ms.get(step.reason, 0) >= REFUSALS_NOTED_MS:
            self._refused_ms[step.reason] = now_ms
            self._note("give_up", step.reason, model_id, step.detail)

    def _note(self, kind: str, reason: str, model_id: str, detail: str) -> None:
        if self._decisions is not None:
            level = logging.WARNING if kind == "give_up" else logging.INFO
            self._decisions.note(kind, reason, model_id=model_id, detail=detail, level=level)

    def _release(self, flight: _Flight, result: str | MeshError) -> None:
        # First, so that a waiter that comes back starts a new load instead of joining this one.
        del self._flights[flight.model_id]
        for waiter in tuple(flight.waiters):
            if waiter.flight is not None:  # it may leave while others are being released
                self.leave(waiter)
                waiter.ended(result)

    def _expire(self, waiter: Waiter, timeout_ms: int) -> None:
        flight = waiter.flight
        if flight is None:
            return
        self.leave(waiter)
        waiter.ended(
            Unavailable(
                f"model {flight.model_id!r} was not loaded within {timeout_ms} ms: try again",
                retry_after_ms=QUEUE_RETRY_MS,
            )
        )
