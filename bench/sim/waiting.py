"""Loads that requests wait for: ``router.loads`` and ``router.load_calls`` on the virtual clock.

One load a model and router, its steps ``mesh.core.loads``'. The view is told what came of each
call, as in production. A call to an instance that has gone fails when the connection does.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Final, assert_never

from bench.sim.messages import Wish
from mesh.core import loads as core
from mesh.core.errors import Code, MeshError, ResourceExhausted, Unavailable
from mesh.core.placement import Placement
from mesh.core.types import LoadPriority
from mesh.instance.answers import LoadAnswer, LoadOutcome

if TYPE_CHECKING:
    from bench.sim.router import Request, SimRouter

WAKE_SLICE: Final = 256
Ended = Callable[["Request", str | MeshError], None]


class Flight:
    """One load under way for this router."""

    __slots__ = ("miss", "model_id", "paused", "pauses", "state", "waiters")

    def __init__(self, model_id: str, miss: int, state: core.LoadState) -> None:
        self.model_id = model_id
        self.miss = miss
        self.state = state
        self.waiters: dict[Request, int] = {}  # request -> asked_at_ms, in that order
        self.paused = False
        self.pauses = 0  # so that a time-out of an earlier pause is known as such


class Call:
    """One Load call on its way."""

    __slots__ = ("done", "instance_id", "model_id", "over")

    def __init__(self, model_id: str, instance_id: str, done: Callable[[core.Answer], None]):
        self.model_id = model_id
        self.instance_id = instance_id
        self.done = done
        self.over = False


class Waiting:
    """``Loads`` of one router."""

    def __init__(self, router: SimRouter) -> None:
        self._router = router
        self._world = router.world
        self.flights: dict[str, Flight] = {}
        self.calls: dict[str, dict[Call, None]] = {}  # by instance
        self.waiting = 0
        self._paused: dict[Flight, None] = {}
        self._waking = False
        self._next_miss = 0

    # ---- waiting ----------------------------------------------------------------------------

    def wait(self, request: Request, exclude: Collection[str]) -> None:
        """Raises as ``router.loads`` does; else ``request.ended`` hears of the end."""
        policy, model_id = self._world.policy, request.model_id
        flight = self.flights.get(model_id)
        if self.waiting >= policy.max_waiting_total:
            raise ResourceExhausted("too many requests wait for models to be loaded")
        if flight is not None and len(flight.waiters) >= policy.max_waiting_per_model:
            raise ResourceExhausted(f"too many requests wait for model {model_id!r}")
        now_ms = self._world.engine.now_ms
        if flight is None:
            flight = self._start(model_id, exclude)
        flight.waiters[request] = now_ms
        request.flight = flight
        self.waiting += 1
        if not self._world.settings.deadline_ms:
            self._world.engine.after(self._timeout_ms(model_id), self._expire, request, flight)

    def leave(self, request: Request) -> None:
        flight = request.flight
        if flight is None:
            return
        request.flight = None
        del flight.waiters[request]
        self.waiting -= 1
        if not flight.waiters:
            self._wake(flight)

    def _expire(self, request: Request, flight: Flight) -> None:
        if request.flight is flight:
            self.leave(request)
            text = f"model {request.model_id!r} was not loaded in time"
            self._router.load_ended(request, Unavailable(text))

    def _timeout_ms(self, model_id: str) -> int:
        model = self._router.view.models.get(model_id)
        stated = model.load_timeout_ms if model is not None else None
        policy = self._world.policy
        return (stated or policy.load_timeout_ms) + policy.queue_timeout_ms

    # ---- steps ------------------------------------------------------------------------------

    def _start(self, model_id: str, exclude: Collection[str]) -> Flight:
        router = self._router
        state, step = core.first_step(
            router.view,
            model_id,
            now_ms=self._world.engine.now_ms,
            policy=self._world.policy,
            exclude=exclude,
            avoid=router.avoided(),
        )
        if isinstance(step, core.GiveUp):
            raise step.error()
        self._next_miss += 1
        flight = Flight(model_id, router.number + self._next_miss * 16, state)
        self.flights[model_id] = flight
        self._world.engine.after(0.0, self._take, flight, state, step)
        return flight

    def _take(self, flight: Flight, state: core.LoadState, step: core.Step) -> None:
        if not self._router.alive:
            return
        while True:
            flight.state = state
            match step:
                case core.Release():
                    self._release(flight, step.instance_id)
                    return
                case core.GiveUp():
                    self._world.stats.gave_up[step.reason] += 1
                    if step.waited:
                        self._end_patient(flight, state.waiting_since_ms or 0, step.error())
                    if not step.waited or not flight.waiters:
                        self._release(flight, step.error())
                        return
                    outcome = core.Waited(next(iter(flight.waiters.values())))
                case core.Wait():
                    self._pause(flight, step)
                    return
                case core.AskLoad():
                    self._ask_step(flight, step)
                    return
                case _:
                    assert_never(step)
            state, step = self._next(state, outcome)

    def _next(
        self, state: core.LoadState, outcome: core.Outcome
    ) -> tuple[core.LoadState, core.Step]:
        return core.next_step(
            state,
            outcome,
            self._router.view,
            now_ms=self._world.engine.now_ms,
            policy=self._world.policy,
            avoid=self._router.avoided(),
        )

    def _ask_step(self, flight: Flight, step: core.AskLoad) -> None:
        self._world.stats.placements[step.reason] += 1
        self._world.checks.asked(self._router, flight.model_id, step.instance_id, step.placement)
        self.ask(
            flight.model_id,
            step.instance_id,
            size_bytes=None if step.placement is None else step.size_bytes,
            miss=flight.miss,
            done=lambda outcome: self._answered(flight, outcome),
        )

    def _answered(self, flight: Flight, outcome: core.Outcome) -> None:
        state, step = self._next(flight.state, outcome)
        self._take(flight, state, step)

    def _release(self, flight: Flight, result: str | MeshError) -> None:
        del self.flights[flight.model_id]
        for request in tuple(flight.waiters):
            if request.flight is flight:
                self.leave(request)
                self._router.load_ended(request, result)

    # ---- waiting for a place ----------------------------------------------------------------

    def _pause(self, flight: Flight, step: core.Wait) -> None:
        self._world.stats.waits[step.reason] += 1
        flight.paused = True
        flight.pauses += 1
        self._paused[flight] = None
        if not flight.waiters:
            self._world.engine.after(0.0, self._wake, flight)
            return
        self._world.engine.after(step.retry_ms, self._pause_over, flight, flight.pauses, step)

    def _pause_over(self, flight: Flight, pauses: int, _step: core.Wait) -> None:
        if flight.pauses == pauses:
            self._wake(flight)

    def _wake(self, flight: Flight) -> None:
        if not flight.paused or not self._router.alive:
            return
        flight.paused = False
        self._paused.pop(flight, None)
        if not flight.waiters:
            self._release(flight, Unavailable("nobody waits any more"))
            return
        state, step = self._next(flight.state, core.Waited(next(iter(flight.waiters.values()))))
        self._take(flight, state, step)

    def view_changed(self) -> None:
        if self._paused and not self._waking:
            self._waking = True
            self._world.engine.after(self._world.policy.placement_retry_ms, self._wake_all)

    def _wake_all(self) -> None:
        self._waking = False
        for flight in tuple(self._paused):
            self._wake(flight)

    def _end_patient(self, flight: Flight, since_ms: int, error: MeshError) -> None:
        before_ms = self._world.engine.now_ms - self._world.policy.placement_wait_ms
        for request, asked_at_ms in tuple(flight.waiters.items()):
            if max(asked_at_ms, since_ms) > before_ms:
                return
            if request.flight is flight:
                self.leave(request)
                self._router.load_ended(request, error)

    # ---- single calls -----------------------------------------------------------------------

    def ask(
        self,
        model_id: str,
        instance_id: str,
        *,
        size_bytes: int | None,
        miss: int,
        done: Callable[[core.Answer], None],
        priority: LoadPriority = LoadPriority.AWAITED,
        pin: bool = False,
    ) -> None:
        world, view = self._world, self._router.view
        now_ms = world.engine.now_ms
        if size_bytes is not None:
            view.add_pending(model_id, instance_id, size_bytes=size_bytes, now_ms=now_ms)
        wish = Wish(
            model_id,
            view.revision,
            miss=miss,
            known=view.models.get(model_id),
            last_used_at_ms=now_ms
            if priority is LoadPriority.AWAITED
            else view.last_used_at_ms(model_id),
            priority=priority,
            use_score=self._router.use_score(model_id),
            pin=pin,
        )
        call = Call(model_id, instance_id, done)
        self.calls.setdefault(instance_id, {})[call] = None
        world.engine.after(world.settings.network_ms, self._arrives, call, wish)

    def ask_soon(
        self,
        model_id: str,
        placement: Placement,
        *,
        priority: LoadPriority,
        reason: str = "",
        pin: bool = False,
        ended: Callable[[core.Answer], None] = lambda _: None,
    ) -> None:
        """Nobody waits; the view tells the rest."""
        self._world.stats.placements[placement.reason] += 1
        self._world.checks.asked(self._router, model_id, placement.instance_id, placement)
        self._next_miss += 1
        self.ask(
            model_id,
            placement.instance_id,
            size_bytes=placement.size_bytes,
            miss=self._router.number + self._next_miss * 16,
            done=ended,
            priority=priority,
            pin=pin,
        )

    def _arrives(self, call: Call, wish: Wish) -> None:
        instance = self._world.instances.get(call.instance_id)
        if instance is None or not instance.alive:
            self._world.engine.after(
                self._world.settings.connect_ms, self._fail, call, "connection refused"
            )
            return
        if instance.stopped:
            self._router.unanswered(call.instance_id)

        def answer(said: LoadAnswer) -> None:
            self._world.engine.after(self._world.settings.network_ms, self._hears, call, said)

        instance.deliver(instance.load, wish, answer)

    def unreachable(self, instance_id: str, why: str) -> None:
        """The connection is gone, and all calls on it."""
        for call in tuple(self.calls.get(instance_id, ())):
            self._fail(call, why)

    def _fail(self, call: Call, why: str) -> None:
        if self._end(call):
            call.done(core.Unreachable(call.instance_id, why))

    def _end(self, call: Call) -> bool:
        if call.over or not self._router.alive:
            return False
        call.over = True
        calls = self.calls[call.instance_id]
        del calls[call]
        if not calls:
            del self.calls[call.instance_id]
        self._router.view.drop_pending(call.model_id, call.instance_id)
        return True

    def _hears(self, call: Call, said: LoadAnswer) -> None:
        view, world = self._router.view, self._world
        if call.over or not self._router.alive:
            return
        model_id, instance_id = call.model_id, call.instance_id
        now_ms = world.engine.now_ms
        outcome: core.Answer
        match said.outcome:
            case LoadOutcome.LOADED:
                view.mark_loaded(
                    model_id,
                    instance_id,
                    size_bytes=said.size_bytes,
                    copy_revision=said.copy_revision,
                    now_ms=now_ms,
                )
                outcome = core.Loaded(instance_id)
            case LoadOutcome.CLAIMED_ELSEWHERE:
                outcome = core.ClaimedElsewhere(instance_id, said.claimed_instance_id)
            case LoadOutcome.FAILED:
                code = said.code if said.code is not Code.OK else Code.UNAVAILABLE
                view.put_failure(
                    core.failure_record(
                        model_id,
                        instance_id,
                        code,
                        said.message,
                        now_ms=now_ms,
                        policy=world.policy,
                    )
                )
                outcome = core.Failed(instance_id, code, said.message)
            case LoadOutcome.REJECTED:
                outcome = core.Rejected(instance_id, said.message)
            case _:
                assert_never(said.outcome)
        self._end(call)
        call.done(outcome)
