"""The hot table: what a name means now, and which copies may answer for it.

Filled on first use and never told of changes: each entry remembers the view's ``routes_epoch`` and
is checked again when that has moved on; only what really changed is rebuilt. ``prune`` forgets what
is gone, in slices. It decides by the view and by who is passed over (``mesh.core.outliers``), never
waits and never fails a call.

Instances that are down (silent, not to be connected to) are never in an entry. One that is passed
over for its failures is only while no other copy is left, or as a probe (``RouteEntry.probes``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Final, TypeVar

from mesh.core import routing
from mesh.core.policy import Policy
from mesh.core.usage import score_after
from mesh.core.view import ClusterView, Resolved
from mesh.wire.hpack import encode_literal
from mesh.wire.relay import Upstream
from router.peers import Peers

# Names and copies that one call of ``prune`` looks at: about a millisecond.
PRUNE_SLICE: Final = 2_000

_T = TypeVar("_T")


class CopyRoute:
    """One LOADED copy as this router sees it. ``inflight`` counts this router's calls on it."""

    __slots__ = ("inflight", "instance_id", "model_id", "upstream", "used_s", "uses")

    def __init__(self, model_id: str, instance_id: str, upstream: Upstream) -> None:
        self.model_id = model_id
        self.instance_id = instance_id
        self.upstream = upstream
        self.inflight = 0
        self.used_s = 0.0  # ``time.monotonic`` of the last answer; 0.0: none yet
        self.uses = 0  # since they were last folded into the model's score

    def __repr__(self) -> str:
        return f"CopyRoute({self.model_id} on {self.instance_id}, inflight={self.inflight})"


class ModelRoutes:
    """The copies of a model that calls were sent to, how much they were used, and when one that is
    gone last answered."""

    __slots__ = ("copies", "past_used_s", "past_uses", "score")

    def __init__(self) -> None:
        self.copies: tuple[CopyRoute, ...] = ()
        self.past_used_s = 0.0
        self.past_uses = 0  # of copies that are gone, not in the score yet
        self.score = 0.0  # ``mesh.core.usage``

    def keep(self, copies: tuple[CopyRoute, ...]) -> None:
        """Let go of the others, but for when and how often they were used."""
        self.past_used_s = self.used_s()
        for copy in self.copies:
            self.past_uses += copy.uses
            copy.uses = 0
        self.copies = copies

    def used_s(self) -> float:
        return max(self.past_used_s, *(copy.used_s for copy in self.copies), 0.0)

    def fold(self, now_ms: int, half_life_ms: int) -> float:
        """The score with the uses since the last time: they count as of now."""
        uses, self.past_uses = self.past_uses, 0
        for copy in self.copies:
            uses += copy.uses
            copy.uses = 0
        self.score = score_after(self.score, uses, now_ms, half_life_ms)
        return self.score


class RouteEntry:
    """What one name means now. Valid while ``epoch`` is the view's."""

    __slots__ = (
        "copies",
        "epoch",
        "generation",
        "loaded_on",
        "model_id",
        "model_id_field",
        "probes",
    )

    def __init__(self, model_id: str) -> None:
        self.model_id = model_id
        self.model_id_field = encode_literal(b"mm-model-id", model_id.encode())
        self.epoch = -1
        self.generation = -1  # of the upstreams, and of who is passed over, behind ``copies``
        self.loaded_on: tuple[str, ...] = ()
        self.copies: tuple[CopyRoute, ...] = ()
        self.probes: tuple[CopyRoute, ...] = ()  # one request may see whether they answer again


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


class RouteTable:
    """``now_ms`` is the wall clock's reading: scores of use are compared between processes."""

    def __init__(
        self, view: ClusterView, peers: Peers, *, policy: Policy, now_ms: Callable[[], int]
    ) -> None:
        self._view = view
        self._peers = peers
        self._policy = policy
        self._now_ms = now_ms
        self.entries: dict[str, RouteEntry] = {}  # by name; the hit path reads it
        self._models: dict[str, ModelRoutes] = {}
        self._copy_count = 0  # in all of them
        self._unpruned_names: list[str] = []
        self._unpruned_models: list[str] = []

    def use_policy(self, policy: Policy) -> None:
        self._policy = policy

    # ---- entries ------------------------------------------------------------------------------

    def refresh(self, name: str) -> RouteEntry | None:
        """The entry for a name, checked against the view as it is now; None: unknown name."""
        view = self._view
        resolved = view.resolve(name)
        if not isinstance(resolved, Resolved):
            self.entries.pop(name, None)
            return None
        entry = self.entries.get(name)
        if entry is None or entry.model_id != resolved.model_id:
            entry = self.entries[name] = RouteEntry(resolved.model_id)
        loaded_on = view.loaded_on(resolved.model_id)
        generation = self._peers.generation
        if loaded_on != entry.loaded_on or entry.generation != generation:
            entry.loaded_on = loaded_on
            entry.generation = generation
            self._choose(entry)
        # While there is somebody to probe each call has to ask whether it is to be the probe.
        entry.epoch = view.routes_epoch if not entry.probes else -1
        return entry

    def _choose(self, entry: RouteEntry) -> None:
        """Of the copies there are, those that may answer."""
        outliers = self._peers.outliers
        usable: Iterable[str] = entry.loaded_on
        probes: list[str] = []
        if not outliers.passed_over.isdisjoint(entry.loaded_on):
            usable = [i for i in entry.loaded_on if i not in outliers.passed_over]
            if usable:
                probes = [i for i in entry.loaded_on if i in outliers.probing]
            else:
                usable = [i for i in entry.loaded_on if i not in outliers.down]
        entry.copies = self._copies(entry.model_id, usable)
        entry.probes = self._copies(entry.model_id, probes) if probes else ()

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

    # ---- read by others -----------------------------------------------------------------------

    def inflight_on(self, model_id: str, instance_id: str) -> int:
        routes = self._models.get(model_id)
        copies = routes.copies if routes is not None else ()
        return next((copy.inflight for copy in copies if copy.instance_id == instance_id), 0)

    def last_used_s(self, model_id: str) -> float:
        routes = self._models.get(model_id)
        return routes.used_s() if routes is not None else 0.0

    def use_score(self, model_id: str) -> float:
        routes = self._models.get(model_id)
        if routes is None:
            return 0.0
        return routes.fold(self._now_ms(), self._policy.use_half_life_ms)

    def size(self) -> tuple[int, int]:
        """(names, copies)."""
        return len(self.entries), self._copy_count

    # ---- upkeep -------------------------------------------------------------------------------

    def prune(self) -> None:
        """Look at the next ``PRUNE_SLICE`` names and models and forget those that are gone, and
        copies that are; fold uses into scores.

        The table would otherwise only grow. In slices, because a walk over a hundred thousand
        names is a pause of tens of milliseconds. A copy that comes back is counted anew.
        """
        view = self._view
        if not self._unpruned_names:
            self._unpruned_names = list(self.entries)
        if not self._unpruned_models:
            self._unpruned_models = list(self._models)
        for name in _take(self._unpruned_names, PRUNE_SLICE):
            entry = self.entries.get(name)
            if entry is None:
                continue
            if name not in view.vmodels and name not in view.models:
                del self.entries[name]
            elif entry.loaded_on != view.loaded_on(entry.model_id):
                # Nobody asks for it any more, or the next request would see to it.
                entry.epoch, entry.copies, entry.probes, entry.loaded_on = -1, (), (), ()
        now_ms, half_life_ms = self._now_ms(), self._policy.use_half_life_ms
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
            else:
                routes.fold(now_ms, half_life_ms)
