"""Which copy answers a call: the hot table, and what happens when an attempt fails.

``Dispatcher`` is called by the relay in the event loop, synchronously, up to tens of thousands of
times a second, so the hit path is one look-up, one comparison and one ``forward``. The table is
filled on first use and never told of changes: each entry remembers the view's ``routes_epoch`` and
is checked again when that has moved on; only what really changed is rebuilt.

It decides by the view alone and never waits for the store. Everything slow is elsewhere: loads in
``router.loads``, names that the view does not know in ``router.names``.

It fails a call with NOT_FOUND (no such model), RESOURCE_EXHAUSTED (copies or queues are full),
UNAVAILABLE (``hops_max`` attempts are used up), or with the cause of a load that failed. An
exception of its own would be a defect: the relay's loop does not expect one.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterable, Sequence
from time import monotonic
from typing import Final, TypeVar

from mesh.core import routing
from mesh.core.errors import InvalidArgument, MeshError, ResourceExhausted, Unavailable
from mesh.core.policy import Policy
from mesh.core.view import ClusterView, Resolved
from mesh.metrics import RouterMetrics
from mesh.wire.hpack import encode_literal
from mesh.wire.relay import Failure, Upstream
from router.calls import Call
from router.loads import Loads, Waiter
from router.names import NameLookup
from router.peers import Peers

# When all copies are busy a slot comes free within a model's run time: milliseconds to seconds.
OVERLOAD_RETRY_MS: Final = 100
# An attempt that found nothing alive may well find something once the view has caught up.
UNAVAILABLE_RETRY_MS: Final = 500
# An instance that could not be connected to is passed over for so long where another copy answers:
# its lease is not over yet, and with nothing in flight on it it would look like the best choice.
SUSPECT_S: Final = 1.0
# Names and copies that one call of ``prune`` looks at: about a millisecond.
PRUNE_SLICE: Final = 2_000
# One copy that is overloaded is bad luck, two are load: then the client has to slow down.
MAX_OVERLOADS: Final = 2


_T = TypeVar("_T")


class CopyRoute:
    """One LOADED copy as this router sees it. ``inflight`` counts this router's calls on it."""

    __slots__ = ("inflight", "instance_id", "model_id", "upstream", "used_s")

    def __init__(self, model_id: str, instance_id: str, upstream: Upstream) -> None:
        self.model_id = model_id
        self.instance_id = instance_id
        self.upstream = upstream
        self.inflight = 0
        self.used_s = 0.0  # ``time.monotonic`` of the last answer; 0.0: none yet

    def __repr__(self) -> str:
        return f"CopyRoute({self.model_id} on {self.instance_id}, inflight={self.inflight})"


class ModelRoutes:
    """The copies of a model that calls were sent to, and when one that is gone last answered."""

    __slots__ = ("copies", "past_used_s")

    def __init__(self) -> None:
        self.copies: tuple[CopyRoute, ...] = ()
        self.past_used_s = 0.0

    def keep(self, copies: tuple[CopyRoute, ...]) -> None:
        """Let go of the others, but for when they were used."""
        self.past_used_s = self.used_s()
        self.copies = copies

    def used_s(self) -> float:
        return max(self.past_used_s, *(copy.used_s for copy in self.copies), 0.0)


class RouteEntry:
    """What one name means now. Valid while ``epoch`` is the view's."""

    __slots__ = ("copies", "epoch", "generation", "loaded_on", "model_id", "model_id_field")

    def __init__(self, model_id: str) -> None:
        self.model_id = model_id
        self.model_id_field = encode_literal(b"mm-model-id", model_id.encode())
        self.epoch = -1
        self.generation = -1  # of the upstreams and the suspicions behind ``copies``
        self.loaded_on: tuple[str, ...] = ()
        self.copies: tuple[CopyRoute, ...] = ()


class Journey:
    """A call that was not one plain hit: what it tried, and what it waits for."""

    __slots__ = (
        "copy",
        "excluded",
        "misses",
        "model_id",
        "over",
        "overloads",
        "unreachable",
        "waiter",
    )

    def __init__(self) -> None:
        self.model_id = ""
        self.copy: CopyRoute | None = None
        self.excluded: set[str] = set()  # not to be sent there again
        self.unreachable: set[str] = set()  # nor to be asked to load
        self.overloads = 0
        self.misses = 0
        self.waiter: Waiter | None = None
        self.over = False  # the client went away, or the deadline passed, while we were waiting


def copy_of(call: Call) -> CopyRoute:
    """The copy that a call was last forwarded to, for a carrier that has to know more of it."""
    context = call.context
    copy = context if type(context) is CopyRoute else context.copy
    assert copy is not None  # only asked between ``forward`` and the end of that attempt
    return copy


def pick(copies: Sequence[CopyRoute], draw: float) -> CopyRoute:
    """The copy with fewest calls in flight: ``mesh.core.routing`` without its record.

    Two copies are the common case and are compared in place; a test holds it to the core's choice.
    """
    if len(copies) == 2:
        one, other = copies
        if one.inflight != other.inflight:
            return one if one.inflight < other.inflight else other
        return one if draw < 0.5 else other
    inflight = {copy.instance_id: copy.inflight for copy in copies}
    chosen = routing.route(tuple(inflight), inflight, draw=draw)
    assert chosen is not None  # never called without copies
    return next(copy for copy in copies if copy.instance_id == chosen.instance_id)


def _take(items: list[_T], count: int) -> list[_T]:
    """Remove and return up to ``count`` items from the end."""
    taken = items[-count:]
    del items[-count:]
    return taken


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
    ) -> None:
        self._view = view
        self._peers = peers
        self._loads = loads
        self._names = names
        self._metrics = metrics
        self._policy = policy
        self._draw = draw
        self._routes: dict[str, RouteEntry] = {}
        self._models: dict[str, ModelRoutes] = {}
        self._copy_count = 0  # in all of them
        self._suspects: set[str] = set()  # instances
        self._suspicions = 0  # grows when ``_suspects`` changes
        self._unpruned_names: list[str] = []
        self._unpruned_models: list[str] = []
        self._hits = 0  # moved into the metrics when they are read, not by every request
        self._inflight = 0

    # ---- called by the relay ----------------------------------------------------------------

    def route(self, call: Call) -> None:
        """The name is known: forward, wait for a load, or fail."""
        self._inflight += 1
        entry = self._routes.get(call.model_name)
        if entry is None or entry.epoch != self._view.routes_epoch:
            entry = self._refresh(call.model_name)
            if entry is None:
                self._unknown(call)
                return
        copies = entry.copies
        if not copies:
            self._miss(call, self._journey(call), entry)
            return
        copy = copies[0] if len(copies) == 1 else pick(copies, self._draw())
        copy.inflight += 1
        self._hits += 1
        call.context = copy
        call.forward(copy.upstream, entry.model_id_field)

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
                self._suspect(copy.instance_id)
        if call.attempts >= self._policy.hops_max:
            self._fail(call, "hops_exhausted", self._gave_up(call, copy, failure))
            return
        self._metrics.counter("retries", failure.value)
        self._again(call, journey)

    def done(self, call: Call, code: int, now_s: float) -> None:
        """The call is over, whatever came of it."""
        context = call.context
        self._inflight -= 1
        if type(context) is CopyRoute:
            context.inflight -= 1
            context.used_s = now_s
            model_id = context.model_id
        elif context is None:
            model_id = ""
        else:
            model_id = self._end(context, now_s)
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
        return self._inflight

    def inflight_on(self, model_id: str, instance_id: str) -> int:
        routes = self._models.get(model_id)
        copies = routes.copies if routes is not None else ()
        return next((copy.inflight for copy in copies if copy.instance_id == instance_id), 0)

    def last_used_s(self, model_id: str) -> float:
        """When this router last had an answer of the model, also of a copy that is gone; 0.0: not
        known."""
        routes = self._models.get(model_id)
        return routes.used_s() if routes is not None else 0.0

    def table_size(self) -> tuple[int, int]:
        """(names, copies) in the hot table."""
        return len(self._routes), self._copy_count

    def publish_counters(self) -> None:
        """Move what the hit path counted into the metrics; called before they are rendered."""
        self._metrics.add("hits", self._hits)
        self._hits = 0

    def prune(self) -> None:
        """Look at the next ``PRUNE_SLICE`` names and models and forget those that are gone, and
        copies that are.

        The table would otherwise only grow. In slices, because a walk over a hundred thousand
        names is a pause of tens of milliseconds. A copy that comes back is counted anew.
        """
        view = self._view
        if not self._unpruned_names:
            self._unpruned_names = list(self._routes)
        if not self._unpruned_models:
            self._unpruned_models = list(self._models)
        for name in _take(self._unpruned_names, PRUNE_SLICE):
            entry = self._routes.get(name)
            if entry is None:
                continue
            if name not in view.vmodels and name not in view.models:
                del self._routes[name]
            elif entry.loaded_on != view.loaded_on(entry.model_id):
                # Nobody asks for it any more, or the next request would see to it.
                entry.epoch, entry.copies, entry.loaded_on = -1, (), ()
        for model_id in _take(self._unpruned_models, PRUNE_SLICE):
            routes = self._models.get(model_id)
            if routes is None:
                continue
            loaded_on = view.loaded_on(model_id)
            left = tuple(c for c in routes.copies if c.inflight or c.instance_id in loaded_on)
            if len(left) < len(routes.copies):
                self._copy_count += len(left) - len(routes.copies)
                routes.keep(left)
            if not left and model_id not in view.models:
                del self._models[model_id]

    # ---- the table --------------------------------------------------------------------------

    def _refresh(self, name: str) -> RouteEntry | None:
        """The entry for a name, checked against the view as it is now; None: unknown name."""
        view = self._view
        resolved = view.resolve(name)
        if not isinstance(resolved, Resolved):
            self._routes.pop(name, None)
            return None
        entry = self._routes.get(name)
        if entry is None or entry.model_id != resolved.model_id:
            entry = self._routes[name] = RouteEntry(resolved.model_id)
        loaded_on = view.loaded_on(resolved.model_id)
        generation = self._peers.generation + self._suspicions
        if loaded_on != entry.loaded_on or entry.generation != generation:
            entry.loaded_on = loaded_on
            entry.generation = generation
            trusted = [i for i in loaded_on if i not in self._suspects] or loaded_on
            entry.copies = self._copies(resolved.model_id, trusted)
        entry.epoch = view.routes_epoch
        return entry

    def _copies(self, model_id: str, instance_ids: Iterable[str]) -> tuple[CopyRoute, ...]:
        """Shared by all names of a model, so that in-flight counts are the copy's."""
        routes = self._models.get(model_id)
        if routes is None:
            routes = self._models[model_id] = ModelRoutes()
        known = {copy.instance_id: copy for copy in routes.copies}
        wanted: list[CopyRoute] = []
        for instance_id in instance_ids:
            upstream = self._peers.upstream(instance_id)
            copy = known.get(instance_id)
            if copy is None or copy.upstream is not upstream:
                copy = known[instance_id] = CopyRoute(model_id, instance_id, upstream)
            wanted.append(copy)
        self._copy_count += len(known) - len(routes.copies)
        routes.keep(tuple(known.values()))
        return tuple(wanted)

    def _suspect(self, instance_id: str) -> None:
        """Pass an instance over for a moment."""
        if instance_id not in self._suspects:
            self._suspects.add(instance_id)
            self._suspicion_changed()
            asyncio.get_running_loop().call_later(SUSPECT_S, self._trust, instance_id)

    def _trust(self, instance_id: str) -> None:
        self._suspects.discard(instance_id)
        self._suspicion_changed()

    def _suspicion_changed(self) -> None:
        self._suspicions += 1
        self._view.routes_epoch += 1  # so that every entry is looked at again

    # ---- everything that is not a plain hit -------------------------------------------------

    def _journey(self, call: Call) -> Journey:
        context = call.context
        if type(context) is Journey:
            return context
        journey = Journey()
        if type(context) is CopyRoute:
            journey.copy = context
            journey.model_id = context.model_id
        call.context = journey
        return journey

    def _again(self, call: Call, journey: Journey) -> None:
        """Route a call that has a past."""
        entry = self._refresh(call.model_name)
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
            self._miss(call, journey, entry)

    def _miss(self, call: Call, journey: Journey, entry: RouteEntry) -> None:
        """No copy to go to: have one loaded, and wait for it."""
        journey.model_id = entry.model_id
        journey.misses += 1
        if journey.misses > self._policy.hops_max:
            error = Unavailable(
                f"model {call.model_name!r} was loaded {self._policy.hops_max} times and was gone "
                "again each time: the mesh is short of memory, try again later",
                retry_after_ms=UNAVAILABLE_RETRY_MS,
            )
            self._fail(call, "hops_exhausted", error)
            return
        if journey.misses == 1:
            self._metrics.counter("misses")
        since_s = monotonic()

        def ended(result: str | MeshError) -> None:
            journey.waiter = None
            self._metrics.observe("cache_miss", (monotonic() - since_s) * 1_000.0)
            if isinstance(result, MeshError):
                self._fail(call, "load_failed", result)
                return
            # A load that has just ended there counts more than an attempt that failed before.
            journey.excluded.discard(result)
            journey.unreachable.discard(result)
            self._again(call, journey)

        try:
            journey.waiter = self._loads.wait(
                entry.model_id,
                ended,
                has_deadline=call.deadline_s != math.inf,
                exclude=journey.unreachable,
            )
        except MeshError as error:
            full = isinstance(error, ResourceExhausted)
            self._fail(call, "queue_full" if full else "load_failed", error)

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
            if error is None and self._refresh(name) is not None:
                self._again(call, journey)
            else:
                self._fail(call, "unknown_model", error or self._names.not_found(name))

        self._names.look_up(name, known)

    def _fail(self, call: Call, reason: str, error: MeshError) -> None:
        self._metrics.counter("errors", reason)
        call.fail(error)

    def _gave_up(self, call: Call, copy: CopyRoute, failure: Failure) -> MeshError:
        text = (
            f"model {call.model_name!r}: {call.attempts} attempts failed, the last on instance "
            f"{copy.instance_id!r} ({failure.value})"
        )
        if failure is Failure.OVERLOADED:
            return ResourceExhausted(text, retry_after_ms=OVERLOAD_RETRY_MS)
        return Unavailable(text, retry_after_ms=UNAVAILABLE_RETRY_MS)

    def _end(self, journey: Journey, now_s: float) -> str:
        """Let go of what a call that is over still holds; returns its model's id."""
        journey.over = True
        if journey.copy is not None:
            journey.copy.inflight -= 1
            journey.copy.used_s = now_s
            journey.copy = None
        if journey.waiter is not None:
            self._loads.leave(journey.waiter)
            journey.waiter = None
        return journey.model_id
