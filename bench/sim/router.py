"""A router in virtual time: ``router.dispatch`` for what is not a plain hit.

A plain hit (one copy, its instance answers) is carried out by ``bench.sim.cluster`` in place;
everything else comes here: choosing among copies, attempts that fail, misses. The view is the
production ``ClusterView``, fed by a watch of the simulated store.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import TYPE_CHECKING, Final

from bench.sim.leader import SimLeader
from bench.sim.store import Change, Gone, take_in
from bench.sim.uses import FOLD_MS, UseCounts
from bench.sim.waiting import Flight, Waiting
from bench.sim.world import World
from mesh.core import routing
from mesh.core.cache_table import Copy
from mesh.core.errors import MeshError, ResourceExhausted, Unavailable
from mesh.core.outliers import Outliers
from mesh.core.retry_budget import RetryBudget
from mesh.core.types import InstanceRecord
from mesh.core.view import ClusterView

if TYPE_CHECKING:
    from bench.sim.instance import SimInstance

WATCH_MS: Final = 100.0
MAX_OVERLOADS: Final = 2


class Failure(Enum):
    """How an attempt ended without an answer (``mesh.wire.relay.Failure``)."""

    CONNECT = "connect"
    LOST = "lost"
    SILENT = "silent"
    NOT_HERE = "not-here"
    DRAINING = "draining"
    OVERLOADED = "overloaded"


# The instance may have begun with it: sending it again is work done twice.
_CHARGED: Final = frozenset({Failure.LOST, Failure.SILENT, Failure.OVERLOADED})
_IN_VAIN: Final = frozenset({Failure.LOST, Failure.SILENT})


class Request:
    """A request that was not one plain hit: what it tried, and what it waits for."""

    __slots__ = (
        "began",
        "excluded",
        "failures",
        "flight",
        "misses",
        "model_id",
        "over",
        "overloads",
        "parks",
        "rested",
        "unreachable",
    )

    def __init__(self, model_id: str, began: float) -> None:
        self.model_id = model_id
        self.began = began
        self.failures = 0  # attempts that were delivered, or should have been, and got no answer
        self.misses = 0
        self.parks = 0
        self.rested = False
        self.overloads = 0
        self.excluded: set[str] = set()
        self.unreachable: set[str] = set()
        self.flight: Flight | None = None
        self.over = False


class SimRouter:
    """``number`` is below 16 and tells routers apart in the numbers of misses."""

    def __init__(self, world: World, number: int) -> None:
        self.world = world
        self.number = number
        self.alive = True
        self.view = ClusterView()
        self.waiting = Waiting(self)
        self.open: dict[Request, None] = {}
        self.hung: dict[str, dict[Request, None]] = {}  # on instances that do not answer
        self.outliers = Outliers(world.policy)
        self.budget = RetryBudget(world.policy, world.engine.now_ms)
        self.parked: dict[Request, None] = {}
        self.leader: SimLeader | None = None
        self._watching = False
        self._asked: set[str] = set()  # instances whose answer a PING waits for
        self.uses = UseCounts(len(world.numbers), world.policy.use_half_life_ms)
        world.store.fill(self.view)
        self._fold()
        self.watch = world.store.watch(world.settings.watch_ms, self._take_in)

    def _take_in(self, changes: Sequence[Change]) -> None:
        touched = take_in(self.view, changes)
        for _, write in changes:
            if isinstance(write, Gone) and write.family is InstanceRecord:
                self.outliers.forget(write.name)
        if self.leader is not None:
            self.leader.wake(touched)
        self.waiting.view_changed()

    # ---- life -------------------------------------------------------------------------------

    @property
    def leads(self) -> bool:
        return self.leader is not None

    def lead(self) -> None:
        self.leader = SimLeader(self)

    def crash(self) -> tuple[Request, ...]:
        """What its clients were waiting for, and will ask another one for."""
        self.alive = False
        self.world.store.close_watch(self.watch)
        self.parked.clear()
        lost = tuple(self.open)
        for request in lost:
            request.over = True
        self.open.clear()
        return lost

    def use_score(self, model_id: str) -> float:
        """Through this router."""
        return self.uses.score(self.world.numbers[model_id], self.world.engine.now_ms)

    def _fold(self) -> None:
        if self.alive:
            self.uses.fold(self.world.engine.now_ms)
            self.world.engine.after(FOLD_MS, self._fold)

    # ---- requests ---------------------------------------------------------------------------

    def lost(self, model_id: str, instance_id: str) -> None:
        """A plain hit's instance has died before it answered."""
        request = Request(model_id, self.world.engine.time - self.world.settings.service_ms)
        self.open[request] = None
        if self.alive:
            self._failed(request, instance_id, Failure.LOST)
        else:
            self._over(request)
            self.world.routers[0].request(model_id, request.began)

    def request(self, model_id: str, began: float | None = None) -> Request:
        request = Request(model_id, self.world.engine.time if began is None else began)
        self.open[request] = None
        self.world.stats.not_plain += 1
        if self.world.settings.deadline_ms:
            self.world.engine.after(self.world.settings.deadline_ms, self._deadline, request)
        self._again(request)
        return request

    def _again(self, request: Request) -> None:
        loaded_on = self.view.loaded_on(request.model_id)
        chosen = self._pick(request, self._usable(loaded_on))
        if request.overloads and (chosen is None or request.overloads >= MAX_OVERLOADS):
            self._fail(request, "overloaded", ResourceExhausted("every copy is at its limit"))
        elif chosen is not None:
            self._attempt(request, chosen)
        else:
            self._miss(request)

    def _usable(self, loaded_on: Sequence[str]) -> Sequence[str]:
        """Those that may answer; one whose time is over gets a request as a probe."""
        outliers, now_ms = self.outliers, self.world.engine.now_ms
        if outliers.passed_over.isdisjoint(loaded_on):
            return loaded_on
        for instance_id in loaded_on:
            if outliers.wants_probe(instance_id, now_ms):
                outliers.probe_sent(instance_id, now_ms)
                return (instance_id,)
        usable = [i for i in loaded_on if i not in outliers.passed_over]
        return usable or [i for i in loaded_on if i not in outliers.down]

    def _pick(self, request: Request, candidates: Sequence[str]) -> str | None:
        if len(candidates) == 1 and candidates[0] not in request.excluded:
            return candidates[0]
        inflight = {}
        for instance_id in candidates:
            copy = self.world.instances[instance_id].serving.get(request.model_id)
            inflight[instance_id] = copy.use.in_flight if copy is not None else 0
        found = routing.route(
            candidates, inflight, draw=self.world.random.random(), exclude=request.excluded
        )
        return found.instance_id if found is not None else None

    def _attempt(self, request: Request, instance_id: str) -> None:
        world = self.world
        instance = world.instances[instance_id]
        copy = instance.serving.get(request.model_id)
        if copy is not None:
            policy = world.policy
            limit = policy.default_max_concurrency + policy.max_queued_per_copy
            if copy.use.in_flight >= limit:
                self._later(request, instance_id, Failure.OVERLOADED)
            else:
                self._answer(request, instance, copy)
        elif not instance.alive:
            world.engine.after(
                world.settings.connect_ms, self._failed, request, instance_id, Failure.CONNECT
            )
        elif instance.stopped:
            self.hung.setdefault(instance_id, {})[request] = None
            self.unanswered(instance_id)
        else:
            failure = Failure.DRAINING if instance.refusing else Failure.NOT_HERE
            self._later(request, instance_id, failure)

    def _later(self, request: Request, instance_id: str, failure: Failure) -> None:
        delay_ms = 2 * self.world.settings.network_ms
        self.world.engine.after(delay_ms, self._failed, request, instance_id, failure)

    def _answer(self, request: Request, instance: SimInstance, copy: Copy) -> None:
        world = self.world
        world.checks.answers(instance, copy)
        use = copy.use
        use.in_flight += 1
        use.uses += 1
        use.last_used_at_ms = world.engine.now_ms
        instance.requests += 1
        ends_at = world.engine.time + world.settings.service_ms
        world.engine.ends.append((ends_at, self._answered, (request, instance, copy)))

    def _answered(self, request: Request, instance: SimInstance, copy: Copy) -> None:
        if not instance.alive:
            self._failed(request, instance.instance_id, Failure.LOST)
            return
        instance.request_ended(copy)
        if request.over or not self.alive:
            return
        if self.outliers.standings:
            self.outliers.answered(instance.instance_id, self.world.engine.now_ms)
        self._over(request)
        waited_ms = self.world.engine.time - request.began - self.world.settings.service_ms
        self.world.stats.answered(request.misses, waited_ms)

    def _failed(self, request: Request, instance_id: str, failure: Failure) -> None:
        if request.over or not self.alive:
            return
        request.excluded.add(instance_id)
        if failure is Failure.NOT_HERE:
            self.view.delete_copy(request.model_id, instance_id)
        elif failure is Failure.OVERLOADED:
            request.overloads += 1
        else:
            request.unreachable.add(instance_id)
            self._held_against(instance_id, failure)
            request.failures += failure in _IN_VAIN
        stats, now_ms = self.world.stats, self.world.engine.now_ms
        stats.retries[failure.value] += 1
        if request.failures >= self.world.policy.hops_max:
            self._fail(request, "hops_exhausted", Unavailable("too many attempts"))
        elif failure in _CHARGED and not self.budget.take(stats.requests, now_ms):
            self._fail(request, "retry_budget", Unavailable("too many retries"))
        else:
            self._again(request)

    def _miss(self, request: Request) -> None:
        request.misses += 1
        if request.misses > self.world.policy.hops_max and not request.rested:
            self._park(request)
            return
        request.rested = False
        down = self.outliers.down.intersection(self.view.loaded_on(request.model_id))
        try:
            self.waiting.wait(request, request.unreachable | down)
        except MeshError as error:
            self._not_loaded(request, error)

    def load_ended(self, request: Request, result: str | MeshError) -> None:
        if isinstance(result, MeshError):
            self._not_loaded(request, result)
        elif result in self.outliers.down:
            self._park(request)
        else:
            request.excluded.discard(result)
            request.unreachable.discard(result)
            self._again(request)

    def _not_loaded(self, request: Request, error: MeshError) -> None:
        loaded_on = self.view.loaded_on(request.model_id)
        full = isinstance(error, ResourceExhausted)
        if not full and not self.outliers.down.isdisjoint(loaded_on):
            self._park(request)
        else:
            self._fail(request, "queue_full" if full else "load_failed", error)

    # ---- waiting for an instance that is back (``router.waiting_room``) ---------------------

    def _park(self, request: Request) -> None:
        policy, engine = self.world.policy, self.world.engine
        if len(self.parked) >= policy.max_waiting_total:
            self._fail(request, "queue_full", ResourceExhausted("too many wait for instances"))
            return
        waits_ms = policy.load_timeout_ms + policy.queue_timeout_ms
        if engine.time - request.began > waits_ms and not self.world.settings.deadline_ms:
            self._fail(request, "parked", Unavailable("could not be reached in time"))
            return
        pause_ms = policy.placement_retry_ms << min(request.parks, 16)
        request.parks += 1
        self.world.stats.parked += 1
        self.parked[request] = None
        engine.after(min(pause_ms, policy.placement_retry_max_ms), self._rested, request)

    def _rested(self, request: Request) -> None:
        if request in self.parked and self.alive:
            self._resume(request)

    def _resume(self, request: Request) -> None:
        self.parked.pop(request, None)
        if request.over:
            return
        self.waiting.leave(request)
        request.excluded.clear()
        request.unreachable.clear()
        request.rested = True
        self._again(request)

    def _is_back(self, instance_id: str) -> None:
        """Whoever waits for a model that it has need not wait."""
        waiting = [r for flight in self.waiting.flights.values() for r in flight.waiters]
        for request in [*self.parked, *waiting]:
            if instance_id in self.view.loaded_on(request.model_id) and (
                request in self.parked or request.flight is not None
            ):
                self._resume(request)

    def _fail(self, request: Request, reason: str, error: MeshError) -> None:
        if not request.over:
            self._over(request)
            broken = request.model_id in self.world.troubles.fail_always
            self.world.stats.failed(reason, error, broken=broken)
            self.world.trace.note("fail", request.model_id, reason, error.code.name)

    def _over(self, request: Request) -> None:
        request.over = True
        del self.open[request]

    def _deadline(self, request: Request) -> None:
        if not request.over:
            self.waiting.leave(request)
            self.parked.pop(request, None)
            self._fail(request, "deadline", Unavailable("deadline exceeded"))

    # ---- instances that do not answer -------------------------------------------------------

    def avoided(self) -> frozenset[str]:
        return self.outliers.avoided

    def _held_against(self, instance_id: str, failure: Failure) -> None:
        now_ms = self.world.engine.now_ms
        if failure is Failure.CONNECT:
            self.outliers.connect_failed(instance_id, now_ms)
        elif failure is Failure.LOST:  # SILENT has been noticed already
            self.outliers.failed(instance_id, now_ms, known=len(self.view.instances))
        self._watch()

    def _watch(self) -> None:
        if not self._watching and self.outliers.standings:
            self._watching = True
            self.world.engine.after(WATCH_MS, self._look)

    def _look(self) -> None:
        """What ``router.peers`` does every 100 ms."""
        self._watching = False
        if not self.alive:
            return
        now_ms = self.world.engine.now_ms
        self.outliers.tick(now_ms)
        self.budget.note(self.world.stats.requests, now_ms)
        for instance_id in self.outliers.to_connect(now_ms):
            if self.world.instances[instance_id].alive:
                self.outliers.heard(instance_id)
                self._is_back(instance_id)
            else:
                self.outliers.connect_failed(instance_id, now_ms)
        self._watch()

    def unanswered(self, instance_id: str) -> None:
        """Something on that connection waits for an answer: a PING will tell."""
        if instance_id not in self._asked:
            self._asked.add(instance_id)
            policy = self.world.policy
            wait_ms = policy.ping_after_ms + policy.ping_timeout_ms
            self.world.engine.after(wait_ms, self._ping_over, instance_id)

    def stopped(self, instance_id: str) -> None:
        """An instance has been stopped: what it was asked before waits for an answer."""
        if instance_id in self.waiting.calls:
            self.unanswered(instance_id)

    def _ping_over(self, instance_id: str) -> None:
        self._asked.discard(instance_id)
        instance = self.world.instances[instance_id]
        if not self.alive or not (instance.stopped and instance.alive):
            return
        policy = self.world.policy
        self.outliers.fell_silent(instance_id, policy.ping_after_ms + policy.ping_timeout_ms)
        self.waiting.unreachable(instance_id, "it does not answer")
        for request in self.hung.pop(instance_id, {}):
            self._failed(request, instance_id, Failure.SILENT)
        self._watch()

    def back(self, instance: SimInstance) -> None:
        """It goes on: its PING is answered, and so is what still waits there."""
        self.outliers.heard(instance.instance_id)
        for request in self.hung.pop(instance.instance_id, {}):
            if not request.over:
                copy = instance.serving.get(request.model_id)
                if copy is not None:
                    self._answer(request, instance, copy)
                else:
                    self._later(request, instance.instance_id, Failure.NOT_HERE)
        self._is_back(instance.instance_id)

    def died(self, instance_id: str) -> None:
        """Its connections are reset."""
        self.outliers.lost_sight(instance_id, self.world.engine.now_ms)
        self.waiting.unreachable(instance_id, "connection reset")
        for request in self.hung.pop(instance_id, {}):
            self._failed(request, instance_id, Failure.LOST)
