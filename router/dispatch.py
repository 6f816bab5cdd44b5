"""Which copy answers a call, and what happens when an attempt fails.

``Dispatcher`` is called by the relay in the event loop, synchronously, up to tens of thousands of
times a second, so the hit path is one look-up in the hot table (``router.routes``), one comparison
and one ``forward``. It decides by the view alone and never waits for the store. Everything slow is
elsewhere: loads in ``router.loads``, names that the view does not know in ``router.names``.

A call whose attempt failed goes to another copy; without one its model is loaded elsewhere; and
while the only copy is on an instance that does not answer, it waits for that or for a load,
whichever comes first (``router.waiting_room``). Waiting is bounded by the call's deadline, or by
load time-out plus queue time-out; what is bounded by ``hops_max`` is only how often a call is
delivered in vain. What was delivered and is sent again is charged to the retry budget.

It fails a call with NOT_FOUND (no such model), RESOURCE_EXHAUSTED (copies or queues are full),
UNAVAILABLE (``hops_max`` attempts or the retry budget are used up, or it waited too long), or with
the cause of a load that failed. An exception of its own would be a defect: the relay's loop does
not expect one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from time import monotonic
from typing import Final

from mesh.core.errors import (
    Code,
    InvalidArgument,
    MeshError,
    NotFound,
    ResourceExhausted,
    Unavailable,
)
from mesh.core.policy import Policy
from mesh.core.retry_budget import RetryBudget
from mesh.core.view import ClusterView
from mesh.decision_log import DecisionLog
from mesh.metrics import RouterMetrics
from mesh.wire.relay import Failure, Upstream
from router.calls import Call
from router.journey import Journey
from router.loads import Loads
from router.names import NameLookup
from router.peers import Peers
from router.routes import CopyRoute, RouteEntry, RouteTable, pick
from router.waiting_room import WaitingRoom

# When all copies are busy a slot comes free within a model's run time: milliseconds to seconds.
OVERLOAD_RETRY_MS: Final = 100
# An attempt that found nothing alive may well find something once the view has caught up.
UNAVAILABLE_RETRY_MS: Final = 500
# One copy that is overloaded is bad luck, two are load: then the client has to slow down.
MAX_OVERLOADS: Final = 2
# A call that ended by its deadline says something of the instance only when it had so long.
TELLING_S: Final = 1.0
# One give-up of a kind is noted in so long: a thousand calls may fail for the same reason.
NOTE_S: Final = 0.1

_IN_VAIN: Final = frozenset({Failure.LOST, Failure.SILENT, Failure.REFUSED})
# The instance may have begun with it: sending it again is work done twice.
_CHARGED: Final = frozenset({Failure.LOST, Failure.SILENT, Failure.OVERLOADED})
# The instance said so itself: it answers, whatever else is held against it.
_REFUSALS: Final = frozenset({Failure.NOT_HERE, Failure.DRAINING})
_NO_ANSWER: Final = frozenset({Code.CANCELLED, Code.DEADLINE_EXCEEDED, Code.UNAVAILABLE})


def wall_clock_ms() -> int:
    return time.time_ns() // 1_000_000


def copy_of(call: Call) -> CopyRoute:
    """The copy that a call was last forwarded to, for a carrier that has to know more of it."""
    context = call.context
    copy = context if type(context) is CopyRoute else context.copy
    assert copy is not None  # only asked between ``forward`` and the end of that attempt
    return copy


class Dispatcher:
    """Implements ``mesh.wire.relay.Dispatcher``; also used by ``router.gateway``."""

    def __init__(
        self,
        view: ClusterView,
        peers: Peers,
        loads: Loads,
        names: NameLookup,
        metrics: RouterMetrics,
        *,
        policy: Policy,
        draw: Callable[[], float],
        decisions: DecisionLog | None = None,
        now_ms: Callable[[], int] = wall_clock_ms,
    ) -> None:
        self._view = view
        self._peers = peers
        self._loads = loads
        self._names = names
        self._metrics = metrics
        self._policy = policy
        self._draw = draw
        self._decisions = decisions
        self._table = RouteTable(view, peers, policy=policy, now_ms=now_ms)
        self._entries = self._table.entries
        self._standings = peers.outliers.standings
        self._budget = RetryBudget(policy, _steady_ms())
        self._room = WaitingRoom(view, policy, self._resume)
        self._noted_s: dict[str, float] = {}
        # Counts that only grow; what others want to know is made of them when they ask.
        self._routed = 0
        self._ended = 0
        self._missed = 0  # calls that found no copy at once, or no model
        self._hits_told = 0  # moved into the metrics when they are read, not by every request
        peers.on_watch = self._watched
        peers.on_back = self._back

    def use_policy(self, policy: Policy) -> None:
        self._policy = policy
        self._table.use_policy(policy)
        self._budget.use_policy(policy)
        self._room.use_policy(policy)

    # ---- called by the relay ----------------------------------------------------------------

    def route(self, call: Call) -> None:
        """The name is known: forward, wait for a load, or fail."""
        self._routed += 1
        entry = self._entries.get(call.model_name)
        if entry is None or entry.epoch != self._view.routes_epoch:
            entry = self._table.refresh(call.model_name)
            if entry is None:
                self._unknown(call)
                return
            if entry.probes and self._probe(call, entry):
                return
        copies = entry.copies
        if not copies:
            self._miss(self._journey(call), entry)
            return
        copy = copies[0] if len(copies) == 1 else pick(copies, self._draw())
        copy.inflight += 1
        call.context = copy
        call.forward(copy.upstream, entry.model_id_field)

    def check_vmodel(self, name: str, known: Callable[[MeshError | None], None]) -> None:
        """Whether the name is a vmodel's and not only a model's own."""
        view = self._view

        def read(error: MeshError | None) -> None:
            if name not in view.vmodels and (error is None or isinstance(error, NotFound)):
                text = f"vmodel not found: {name[:200]!r}"
                if name in view.models:
                    text += " is a model's own id; say vModelId: false of this method to take it"
                error = NotFound(text)
            if error is not None:
                self._metrics.counter("errors", "unknown_model")
            known(error)

        if name in view.vmodels or name in view.models:
            read(None)
        else:
            self._names.look_up(name, read)

    def failed(self, call: Call, upstream: Upstream, failure: Failure) -> None:
        """An attempt ended before a byte of the reply was passed on: elsewhere, or the end."""
        journey = self._journey(call)
        copy = journey.copy
        journey.copy = None
        if copy is None:  # a carrier that reports twice would count twice
            return
        copy.inflight -= 1
        journey.excluded.add(copy.instance_id)
        if failure is Failure.NOT_HERE:
            # Until the store tells of a newer copy there. It may be asked to load it again.
            self._view.delete_copy(copy.model_id, copy.instance_id)
        elif failure is Failure.OVERLOADED:
            journey.overloads += 1
        else:
            journey.unreachable.add(copy.instance_id)
            if failure is Failure.CONNECT:
                self._peers.connect_failed(copy.instance_id)
            elif failure in _IN_VAIN:
                journey.failures += 1
                if failure is Failure.LOST:  # silence was noticed already, a refusal is an answer
                    self._peers.attempt_failed(copy.instance_id)
        if self._standings and failure in _REFUSALS:
            self._peers.answered(copy.instance_id)
        if journey.failures >= self._policy.hops_max:
            self._fail(call, "hops_exhausted", self._gave_up(journey, copy, failure))
        elif failure in _CHARGED and not self._budget.take(self._routed, _steady_ms()):
            self._metrics.counter("retries_refused")
            self._fail(call, "retry_budget", self._no_budget(journey, copy, failure))
        else:
            self._metrics.counter("retries", failure.value)
            self._again(journey)

    def done(self, call: Call, code: int, now_s: float) -> None:
        """The call is over, whatever came of it."""
        context = call.context
        self._ended += 1
        if type(context) is CopyRoute:
            context.inflight -= 1
            context.used_s = now_s
            context.uses += 1
            model_id = context.model_id
            if code or self._standings:
                self._note_end(context, code, now_s - call.started_s)
        elif context is None:
            model_id = ""
        else:
            model_id = self._end(context, code, now_s)
        call.context = None
        self._metrics.request_done(
            call.head.path,
            code,
            (now_s - call.started_s) * 1_000.0,
            call.request_bytes,
            call.response_bytes,
            model_id,
            call.model_name,
        )

    # ---- read by others ---------------------------------------------------------------------

    @property
    def inflight(self) -> int:
        """Calls of clients that have not ended."""
        return self._routed - self._ended

    @property
    def waiting(self) -> int:
        """Calls that wait for an instance to answer again (not those that wait for a load)."""
        return len(self._room)

    @property
    def retries_left(self) -> int:
        """What the retry budget allows now."""
        return self._budget.left(self._routed, _steady_ms())

    def inflight_on(self, model_id: str, instance_id: str) -> int:
        return self._table.inflight_on(model_id, instance_id)

    def last_used_s(self, model_id: str) -> float:
        """When this router last had an answer of the model, also of a copy that is gone; 0.0: not
        known."""
        return self._table.last_used_s(model_id)

    def use_score(self, model_id: str) -> float:
        """How much the model was used through this router (``mesh.core.usage``)."""
        return self._table.use_score(model_id)

    def table_size(self) -> tuple[int, int]:
        """(names, copies) in the hot table."""
        return self._table.size()

    def publish_counters(self) -> None:
        """Move what the hit path counted into the metrics; called before they are rendered."""
        hits = self._routed - self._missed
        self._metrics.add("hits", hits - self._hits_told)
        self._hits_told = hits

    def prune(self) -> None:
        """Forget what is gone, a slice at a time; to be called every few seconds."""
        self._table.prune()

    # ---- instances that do not answer --------------------------------------------------------

    def _note_end(self, copy: CopyRoute, code: int, took_s: float) -> None:
        """What the end of a call tells of the instance."""
        if code not in _NO_ANSWER:
            self._peers.answered(copy.instance_id)
        elif code == Code.DEADLINE_EXCEEDED and took_s >= TELLING_S:
            self._peers.attempt_failed(copy.instance_id)

    def _probe(self, call: Call, entry: RouteEntry) -> bool:
        """Whether this call goes to an instance that was passed over, to see if it answers."""
        now_ms = _steady_ms()
        for copy in entry.probes:
            if self._peers.outliers.wants_probe(copy.instance_id, now_ms):
                self._peers.outliers.probe_sent(copy.instance_id, now_ms)
                copy.inflight += 1
                call.context = copy
                call.forward(copy.upstream, entry.model_id_field)
                return True
        return False

    def _watched(self, now_s: float) -> None:
        """Behind each look at the connections."""
        self._budget.note(self._routed, int(now_s * 1_000))
        self._room.look(now_s)

    def _back(self, instance_id: str) -> None:
        """An instance answers again: those that wait for it need not wait for a load."""
        self._room.wake(instance_id)

    # ---- everything that is not a plain hit -------------------------------------------------

    def _journey(self, call: Call) -> Journey:
        context = call.context
        if type(context) is Journey:
            return context
        journey = Journey(call)
        if type(context) is CopyRoute:
            journey.copy = context
            journey.model_id = context.model_id
        else:
            self._missed += 1
        call.context = journey
        return journey

    def _again(self, journey: Journey) -> None:
        """Route a call that has a past."""
        call = journey.call
        entry = self._table.refresh(call.model_name)
        if entry is None:
            self._unknown(call)
            return
        journey.model_id = entry.model_id
        copies = [copy for copy in entry.copies if copy.instance_id not in journey.excluded]
        if journey.overloads and (not copies or journey.overloads >= MAX_OVERLOADS):
            self._fail(
                call,
                "overloaded",
                ResourceExhausted(
                    f"every copy of model {call.model_name!r} that was tried is at its limit of "
                    "requests: slow down, or register it with more copies",
                    retry_after_ms=OVERLOAD_RETRY_MS,
                ),
            )
        elif copies:
            copy = copies[0] if len(copies) == 1 else pick(copies, self._draw())
            copy.inflight += 1
            journey.copy = copy
            call.forward(copy.upstream, entry.model_id_field)
        else:
            self._miss(journey, entry)

    def _miss(self, journey: Journey, entry: RouteEntry) -> None:
        """No copy to go to: have one loaded, and wait for it."""
        call = journey.call
        journey.model_id = entry.model_id
        journey.misses += 1
        if journey.misses == 1:
            self._metrics.counter("misses")
        elif journey.misses > self._policy.hops_max and not journey.rested:
            self._park(journey)  # loaded and gone again, several times: not as fast as it can
            return
        journey.rested = False
        since_s = monotonic()

        def ended(result: str | MeshError) -> None:
            journey.waiter = None
            self._room.leave(journey)
            self._metrics.observe("cache_miss", (monotonic() - since_s) * 1_000.0)
            if isinstance(result, MeshError):
                self._not_loaded(journey, result)
            elif result in self._peers.outliers.down:
                self._park(journey)
            else:
                # A load that has just ended there counts more than an attempt that failed before.
                journey.excluded.discard(result)
                journey.unreachable.discard(result)
                self._again(journey)

        down = self._peers.outliers.down.intersection(entry.loaded_on)
        try:
            journey.waiter = self._loads.wait(
                entry.model_id,
                ended,
                has_deadline=call.deadline_s != math.inf,
                exclude=journey.unreachable | down,
            )
        except MeshError as error:
            self._not_loaded(journey, error)
        else:
            self._room.enter(journey)

    def _not_loaded(self, journey: Journey, error: MeshError) -> None:
        """No load, and no other place: but an instance that is down may come back with its copy."""
        loaded_on = self._view.loaded_on(journey.model_id)
        full = isinstance(error, ResourceExhausted)
        if not full and not self._peers.outliers.down.isdisjoint(loaded_on):
            self._park(journey)
        else:
            self._fail(journey.call, "queue_full" if full else "load_failed", error)

    def _resume(self, journey: Journey) -> None:
        """Its wait is over, or need not go on. What stood in the way may be gone."""
        if journey.waiter is not None:
            self._loads.leave(journey.waiter)
            journey.waiter = None
        journey.excluded.clear()
        journey.unreachable.clear()
        journey.rested = True
        self._again(journey)

    def _park(self, journey: Journey) -> None:
        """Wait until an instance is back, or a while."""
        error = self._room.park(journey)
        if error is not None:
            self._fail(journey.call, "queue_full", error)

    def _unknown(self, call: Call) -> None:
        """A name that the view does not know: the store has the last word, within bounds."""
        journey = self._journey(call)
        name = call.model_name
        if not name:
            text = "the request names no model: set model_name, or the header mm-model-id"
            self._fail(call, "unknown_model", InvalidArgument(text))
            return

        def known(error: MeshError | None) -> None:
            if journey.over:
                return
            if error is None and self._table.refresh(name) is not None:
                self._again(journey)
            else:
                self._fail(call, "unknown_model", error or self._names.not_found(name))

        self._names.look_up(name, known)

    def _end(self, journey: Journey, code: int, now_s: float) -> str:
        """Let go of what a call that is over still holds; returns its model's id."""
        journey.over = True
        copy = journey.copy
        if copy is not None:
            copy.inflight -= 1
            copy.used_s = now_s
            copy.uses += 1
            journey.copy = None
            if self._standings and code not in _NO_ANSWER:
                self._peers.answered(copy.instance_id)
        self._room.leave(journey)
        if journey.waiter is not None:
            self._loads.leave(journey.waiter)
            journey.waiter = None
        return journey.model_id

    # ---- failing ----------------------------------------------------------------------------

    def _fail(self, call: Call, reason: str, error: MeshError) -> None:
        self._metrics.counter("errors", reason)
        call.fail(error)

    def _gave_up(self, journey: Journey, copy: CopyRoute, failure: Failure) -> MeshError:
        text = (
            f"model {journey.call.model_name!r}: {journey.failures} attempts failed, the last on "
            f"instance {copy.instance_id!r} ({failure.value})"
        )
        self._note_give_up("hops_exhausted", copy, text)
        return Unavailable(text, retry_after_ms=UNAVAILABLE_RETRY_MS)

    def _no_budget(self, journey: Journey, copy: CopyRoute, failure: Failure) -> MeshError:
        text = (
            f"model {journey.call.model_name!r} failed on instance {copy.instance_id!r} "
            f"({failure.value}) and is not sent elsewhere: too many requests are being retried"
        )
        self._note_give_up("retry_budget", copy, text)
        return Unavailable(text, retry_after_ms=UNAVAILABLE_RETRY_MS)

    def _note_give_up(self, reason: str, copy: CopyRoute, detail: str) -> None:
        now_s = monotonic()
        if self._decisions is not None and now_s - self._noted_s.get(reason, 0.0) >= NOTE_S:
            self._noted_s[reason] = now_s
            self._decisions.note(
                "give_up",
                reason,
                model_id=copy.model_id,
                instance_id=copy.instance_id,
                detail=detail,
            )


def _steady_ms() -> int:
    return int(monotonic() * 1_000)
