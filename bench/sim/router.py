"""A router in virtual time: ``router.dispatch`` for what is not a plain hit.

A plain hit (one copy, its instance answers) is carried out by ``bench.sim.cluster`` in place;
everything else comes here: choosing among copies, attempts that fail, misses. The view is the
production ``ClusterView``, fed by a watch of the simulated store.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import TYPE_CHECKING, Final

from bench.sim.store import Change, take_in
from bench.sim.waiting import Flight, Waiting
from bench.sim.world import World
from mesh.core import routing
from mesh.core.cache_table import Copy
from mesh.core.errors import MeshError, ResourceExhausted, Unavailable
from mesh.core.view import ClusterView

if TYPE_CHECKING:
    from bench.sim.instance import SimInstance

SUSPECT_MS: Final = 1_000.0
MAX_OVERLOADS: Final = 2


class Failure(Enum):
    """How an attempt ended without an answer (``mesh.wire.relay.Failure``)."""

    CONNECT = "connect"
    LOST = "lost"
    NOT_HERE = "not-here"
    DRAINING = "draining"
    OVERLOADED = "overloaded"


class Request:
    """A request that was not one plain hit: what it tried, and what it waits for."""

    __slots__ = (
        "attempts",
        "began",
        "excluded",
        "flight",
        "misses",
        "model_id",
        "over",
        "overloads",
        "unreachable",
    )

    def __init__(self, model_id: str, began: float) -> None:
        self.model_id = model_id
        self.began = began
        self.attempts = 0
        self.misses = 0
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
        self.touched: set[str] = set()  # since the leader looked
        self._suspects: dict[str, float] = {}
        self._silent: set[str] = set()
        self._asked: set[str] = set()  # instances whose answer a PING waits for
        world.store.fill(self.view)
        self.watch = world.store.watch(world.settings.watch_ms, self._take_in)

    def _take_in(self, changes: Sequence[Change]) -> None:
        touched = take_in(self.view, changes)
        self.touched |= touched & self.view.models_with_minimum()
        self.waiting.view_changed()

    def use_score(self, model_id: str) -> float:
        return 0.0

    # ---- requests ---------------------------------------------------------------------------

    def request(self, model_id: str) -> Request:
        request = Request(model_id, self.world.engine.time)
        self.open[request] = None
        self.world.stats.not_plain += 1
        if self.world.settings.deadline_ms:
            self.world.engine.after(self.world.settings.deadline_ms, self._deadline, request)
        self._again(request)
        return request

    def _again(self, request: Request) -> None:
        avoided = self.avoided()
        loaded_on = self.view.loaded_on(request.model_id)
        trusted = [i for i in loaded_on if i not in avoided] or loaded_on
        chosen = self._pick(request, trusted)
        if request.overloads and (chosen is None or request.overloads >= MAX_OVERLOADS):
            self._fail(request, "overloaded", ResourceExhausted("every copy is at its limit"))
        elif chosen is not None:
            self._attempt(request, chosen)
        else:
            self._miss(request)

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
        request.attempts += 1
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
        if request.over:
            return
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
            if failure is Failure.CONNECT:
                self._suspects[instance_id] = self.world.engine.time + SUSPECT_MS
        self.world.stats.retries[failure.value] += 1
        if request.attempts >= self.world.policy.hops_max:
            self._fail(request, "hops_exhausted", Unavailable("too many attempts"))
            return
        self._again(request)

    def _miss(self, request: Request) -> None:
        request.misses += 1
        if request.misses > self.world.policy.hops_max:
            self._fail(request, "hops_exhausted", Unavailable("loaded and gone again"))
            return
        try:
            self.waiting.wait(request, request.unreachable)
        except MeshError as error:
            full = isinstance(error, ResourceExhausted)
            self._fail(request, "queue_full" if full else "load_failed", error)

    def load_ended(self, request: Request, result: str | MeshError) -> None:
        if isinstance(result, MeshError):
            self._fail(request, "load_failed", result)
            return
        request.excluded.discard(result)
        request.unreachable.discard(result)
        self._again(request)

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
            self._fail(request, "deadline", Unavailable("deadline exceeded"))

    # ---- instances that do not answer -------------------------------------------------------

    def avoided(self) -> frozenset[str]:
        now = self.world.engine.time
        if self._suspects:
            self._suspects = {i: until for i, until in self._suspects.items() if until > now}
        return frozenset(self._silent.union(self._suspects))

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
        self._silent.add(instance_id)
        self.waiting.unreachable(instance_id, "it does not answer")
        for request in self.hung.pop(instance_id, {}):
            self._failed(request, instance_id, Failure.LOST)

    def back(self, instance: SimInstance) -> None:
        """It goes on: its PING is answered, and so is what still waits there."""
        self._silent.discard(instance.instance_id)
        for request in self.hung.pop(instance.instance_id, {}):
            if not request.over:
                copy = instance.serving.get(request.model_id)
                if copy is not None:
                    self._answer(request, instance, copy)
                else:
                    self._later(request, instance.instance_id, Failure.NOT_HERE)

    def died(self, instance_id: str) -> None:
        """Its connections are reset."""
        self._silent.discard(instance_id)
        self.waiting.unreachable(instance_id, "connection reset")
        for request in self.hung.pop(instance_id, {}):
            self._failed(request, instance_id, Failure.LOST)
