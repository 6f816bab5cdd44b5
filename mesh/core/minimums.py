"""Copies that somebody wants to be there: pins and minimums, and what they lack.

- A **pinned** model has exactly one pinned copy: pinned in place where it has a copy, loaded as if
  a request waited for it where it has none; a second pinned copy is a ``surplus_pin``.
- A **minimum** of two or more copies is soft: it is honoured for the most recently used models,
  until what they keep is ``Policy.min_copies_capacity_share`` of the READY capacity, and evicts
  only what was used less recently than the model itself.

What cannot be had is a ``Shortfall`` with its reason; ``shortfall_of`` tells it of one model from
any router's view. Copies on draining instances leave with them and do not count.

Walks the models with a minimum. ``missing_in_slices`` yields now and then, for a loop that has
requests to serve meanwhile; what it orders at the end is decided from the view as it is then.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Collection, Generator, Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final, NamedTuple, TypeVar

from mesh.core.demand import predict_size_bytes
from mesh.core.placement import Placement, place
from mesh.core.policy import Policy
from mesh.core.types import CopyRecord, CopyState, LoadPriority, ModelRecord
from mesh.core.view import ClusterView

# Model id -> instances that were asked lately and did not take it: passed over for a while.
Tried = Mapping[str, Collection[str]]
NOT_TRIED: Final[Tried] = MappingProxyType({})
# Models that are looked at between two yields: a few milliseconds at worst.
_SLICE: Final = 1_000
# See ``_turn``; then the minimum and the size of a copy.
_Wish = tuple[int, str, int, int]


@dataclass(frozen=True, slots=True)
class LoadOrder:
    """Have ``placement.instance_id`` load it; ``pin``: and keep that copy whatever comes."""

    model_id: str
    placement: Placement
    priority: LoadPriority
    reason: str  # pinned | min_copies | recently_used
    pin: bool = False


@dataclass(frozen=True, slots=True)
class Shortfall:
    """Copies that are wanted and cannot be had now, and why: a NoPlacement's reason, ``over_share``
    (models used more recently take the share for minimums), ``no_room`` (something used more
    recently would have to go), ``refused`` (who was asked did not take it) or ``in_turn`` (many
    are short: a later sweep looks at it)."""

    model_id: str
    missing: int
    reason: str
    detail: str


@dataclass(frozen=True, slots=True)
class Minimums:
    """How many copies the soft minimums get. ``cut``: the models that get fewer than they wish."""

    share_bytes: int = 0
    wished_bytes: int = 0
    cut: Mapping[str, int] = field(default_factory=dict)

    def granted(self, model: ModelRecord) -> int:
        return self.cut.get(model.model_id, model.min_copies)


@dataclass(frozen=True, slots=True)
class Missing:
    """What the models with a minimum lack, and the loads to have next. ``crowded``: models whose
    instance gets another load first, to be asked about again. ``shortfalls`` are some of what
    ``lacking`` counts: missing copies by reason."""

    loads: tuple[LoadOrder, ...] = ()
    crowded: tuple[str, ...] = ()
    shortfalls: tuple[Shortfall, ...] = ()
    lacking: Mapping[str, int] = field(default_factory=dict)
    minimums: Minimums = field(default_factory=Minimums)


def missing_copies(
    view: ClusterView,
    *,
    now_ms: int,
    policy: Policy,
    among: AbstractSet[str] | None = None,
    minimums: Minimums | None = None,
    tried: Tried = NOT_TRIED,
) -> tuple[tuple[LoadOrder, ...], tuple[Shortfall, ...]]:
    """Loads for models that lack their pinned copy or are below their minimum, pinned ones first.

    One load a model and one an instance: the view does not count these loads yet. The shell adds
    them as pending and asks again, up to ``Policy.repair_loads_max`` in one sweep. A model for
    which a load is pending waits until its claim is seen: claims go one after another.

    ``among``: look at these models only. ``minimums`` as shared out before; shared out now when
    None.
    """
    found = finish(
        missing_in_slices(
            view, now_ms=now_ms, policy=policy, among=among, minimums=minimums, tried=tried
        )
    )
    return found.loads, found.shortfalls


def missing_in_slices(
    view: ClusterView,
    *,
    now_ms: int,
    policy: Policy,
    among: AbstractSet[str] | None = None,
    minimums: Minimums | None = None,
    tried: Tried = NOT_TRIED,
) -> Generator[None, None, Missing]:
    """As ``missing_copies``, with everything that is known at the end."""
    wanting = view.models_with_minimum()
    wanting = frozenset(wanting) if among is None else wanting & among
    if not wanting:
        return Missing()
    granted = minimums
    if granted is None:
        granted = yield from _grants_in_slices(view, policy)
    lacking: Counter[str] = Counter()
    shortfalls: list[Shortfall] = []
    wanted: list[_Turn] = []
    for count, model_id in enumerate(wanting, 1):
        if count % _SLICE == 0:
            yield
        need = _need_of(view, model_id, granted)
        if need is None:
            continue
        if need.over_share > 0:
            lacking["over_share"] += need.over_share
            if len(shortfalls) < policy.repair_batch_max:
                shortfalls.append(_over_share(need, granted))
        if need.pin or need.copies > 0:
            wanted.append(_Turn(not need.pin, *_turn(view, need.model), max(1, need.copies)))
    turns = _turns(wanted, now_ms, policy)
    if len(turns) < len(wanted):
        lacking["in_turn"] = sum(t.copies for t in wanted) - sum(t.copies for t in turns)
    loads, crowded, unmet = _orders(view, turns, granted, tried=tried, now_ms=now_ms, policy=policy)
    for short in unmet:
        lacking[short.reason] += short.missing
    bounded = (*unmet, *shortfalls)[: policy.repair_batch_max]
    return Missing(loads, crowded, bounded, dict(lacking), granted)


def _orders(
    view: ClusterView,
    turns: list[_Turn],
    granted: Minimums,
    *,
    tried: Tried,
    now_ms: int,
    policy: Policy,
) -> tuple[tuple[LoadOrder, ...], tuple[str, ...], list[Shortfall]]:
    """Loads, models crowded out in this round, and shortfalls. The needs are looked at anew: they
    may be some slices old."""
    loads: list[LoadOrder] = []
    crowded: list[str] = []
    unmet: list[Shortfall] = []
    taken: set[str] = set()
    for turn in turns:
        if len(loads) >= policy.repair_loads_max:
            break
        model_id = turn.model_id
        need = _need_of(view, model_id, granted)
        if need is None or not (need.pin or need.copies > 0):
            continue
        found = _order(view, need, tried.get(model_id, ()), now_ms=now_ms, policy=policy)
        if isinstance(found, Shortfall):
            unmet.append(found)
        elif found is not None and found.placement.instance_id in taken:
            crowded.append(model_id)
        elif found is not None:
            taken.add(found.placement.instance_id)
            loads.append(found)
    return tuple(loads), tuple(crowded), unmet


def grant_minimums(view: ClusterView, policy: Policy) -> Minimums:
    """Share the memory for soft minimums out, to the most recently used models first.

    A minimum counts with all its copies, those that are there included. What no longer fits whole
    gets as many copies as fit.
    """
    return finish(_grants_in_slices(view, policy))


def _grants_in_slices(view: ClusterView, policy: Policy) -> Generator[None, None, Minimums]:
    runs: list[list[_Wish]] = []  # sorted each: to sort all of them at once would take a second
    wishes: list[_Wish] = []
    wished_bytes = 0
    for count, model_id in enumerate(tuple(view.models_with_minimum()), 1):
        model = view.models.get(model_id)
        if model is not None and model.min_copies > 1:
            size_bytes = predict_size_bytes(model, policy)
            wished_bytes += model.min_copies * size_bytes
            wishes.append((*_turn(view, model), model.min_copies, size_bytes))
        if count % _SLICE == 0:
            runs.append(sorted(wishes))
            wishes = []
            yield
    runs.append(sorted(wishes))
    capacity = sum(s.record.capacity_bytes for s in view.instances.values() if s.ready)
    share_bytes = int(capacity * policy.min_copies_capacity_share)
    if wished_bytes <= share_bytes or not capacity:  # then it is not the share that is short
        return Minimums(share_bytes, wished_bytes)
    cut: dict[str, int] = {}
    left_bytes = share_bytes
    for count, (_, model_id, min_copies, size_bytes) in enumerate(heapq.merge(*runs), 1):
        if count % _SLICE == 0:
            yield
        granted = min(min_copies, left_bytes // size_bytes) if size_bytes else min_copies
        left_bytes -= granted * size_bytes
        if granted < min_copies:
            cut[model_id] = granted
    return Minimums(share_bytes, wished_bytes, cut)


def shortfall_of(
    view: ClusterView, model: ModelRecord, now_ms: int, policy: Policy
) -> Shortfall | None:
    """Why ``model`` has fewer copies than it wants; None when it has them or they can be had.

    From any router's view: only the leader knows which loads it has asked for. Walks the models
    with a minimum when this one is below its own.
    """
    if model.model_id not in view.models_with_minimum():
        return None
    need = _need(view, model, Minimums())
    if not need.pin and need.copies <= 0:
        return None
    granted = grant_minimums(view, policy)
    need = _need(view, model, granted)
    if need.pin or need.copies > 0:
        found = _order(view, need, (), now_ms=now_ms, policy=policy)
        if isinstance(found, Shortfall):
            return found
    return _over_share(need, granted) if need.over_share > 0 else None


def surplus_pins(view: ClusterView) -> Iterator[tuple[str, str]]:
    """All pinned copies of a model but the one that was claimed first."""
    for model_id in view.models_with_minimum():
        if view.models[model_id].pinned:
            pins = [copy for copy in _lasting(view, model_id) if copy.pinned]
            for copy in sorted(pins, key=_seniority)[1:]:
                yield model_id, copy.instance_id


class _Turn(NamedTuple):
    """One model's place in the line; smaller is earlier."""

    needs_no_pin: bool
    minus_wished_at_ms: int
    model_id: str
    copies: int


@dataclass(frozen=True, slots=True)
class _Need:
    """What one model lacks: its ``pin``, ``copies`` that it may have, and those ``over_share``."""

    model: ModelRecord
    pin: bool
    copies: int
    over_share: int


def _need_of(view: ClusterView, model_id: str, granted: Minimums) -> _Need | None:
    """None for a model that has gone meanwhile."""
    model = view.models.get(model_id)
    return _need(view, model, granted) if model is not None else None


def _need(view: ClusterView, model: ModelRecord, granted: Minimums) -> _Need:
    least = 1 if model.pinned else 0
    loaded = view.loaded_on(model.model_id)
    if not model.pinned and len(loaded) >= model.min_copies and view.instances[loaded[0]].ready:
        return _Need(model, False, 0, 0)  # nearly all of them: no list is made
    if view.pending_of(model.model_id):
        return _Need(model, False, 0, 0)
    lasting = _lasting(view, model.model_id)
    have = len(lasting)
    wished = max(least, model.min_copies) - have
    copies = max(least, granted.granted(model)) - have
    pin = model.pinned and not any(copy.pinned for copy in lasting)
    return _Need(model, pin, max(0, copies), max(0, wished) - max(0, copies))


def _order(
    view: ClusterView,
    need: _Need,
    refused_by: Collection[str],
    *,
    now_ms: int,
    policy: Policy,
) -> LoadOrder | Shortfall | None:
    """The next load of one model; None while its copy is being pinned."""
    model = need.model
    if need.pin and (lasting := _lasting(view, model.model_id)):
        oldest = min(lasting, key=_seniority)
        if oldest.instance_id in refused_by:
            return None
        return LoadOrder(model.model_id, _in_place(oldest), LoadPriority.AWAITED, "pinned", True)
    placed = place(view, model, now_ms=now_ms, policy=policy, exclude=refused_by)
    missing = max(1, need.copies)
    if not isinstance(placed, Placement):
        if refused_by and placed.reason == "all_excluded":
            told = f"{', '.join(sorted(refused_by))} did not take it; asked again later"
            return Shortfall(model.model_id, missing, "refused", told)
        return Shortfall(model.model_id, missing, placed.reason, placed.detail)
    if need.pin:
        return LoadOrder(model.model_id, placed, LoadPriority.AWAITED, "pinned", True)
    if placed.full and not _rested_longer(view, model, placed, now_ms):
        told = (
            f"model {model.model_id!r} wants {model.min_copies} copies; what would have to go from "
            f"{placed.instance_id} was used more recently"
        )
        return Shortfall(model.model_id, missing, "no_room", told)
    return LoadOrder(model.model_id, placed, LoadPriority.COPY, "min_copies")


def _rested_longer(view: ClusterView, model: ModelRecord, placed: Placement, now_ms: int) -> bool:
    """Whether what would be evicted was used less recently than the model was, or registered."""
    lru_at_ms = view.instances[placed.instance_id].record.lru_at_ms
    return 0 < lru_at_ms < min(now_ms, _wished_at_ms(view, model))


def _in_place(copy: CopyRecord) -> Placement:
    told = f"{copy.instance_id} has held it longest"
    return Placement(copy.instance_id, "has_copy", None, copy.size_bytes, False, told)


def _over_share(need: _Need, granted: Minimums) -> Shortfall:
    told = (
        f"minimums of all models would keep {granted.wished_bytes} bytes, {granted.share_bytes} "
        "bytes may be kept; models used more recently come first"
    )
    return Shortfall(need.model.model_id, need.over_share, "over_share", told)


def _turns(wanted: list[_Turn], now_ms: int, policy: Policy) -> list[_Turn]:
    """Those that one sweep looks at: pins first, then by last use.

    When there are more, half of the turns go by that order and half round all of them, from sweep
    to sweep: some that cannot be had must not hide those that can.
    """
    bound = policy.repair_batch_max
    if len(wanted) <= bound:
        return sorted(wanted)
    first = heapq.nsmallest(bound - bound // 2, wanted)
    start = now_ms // policy.leader_sweep_ms * (bound // 2) % len(wanted)
    others = (wanted[start:] + wanted[:start])[: bound // 2]
    return list(dict.fromkeys((*first, *others)))


def _turn(view: ClusterView, model: ModelRecord) -> tuple[int, str]:
    return -_wished_at_ms(view, model), model.model_id


def _wished_at_ms(view: ClusterView, model: ModelRecord) -> int:
    """Who registers a minimum wants it as of then."""
    return max(view.last_used_at_ms(model.model_id), model.created_at_ms)


def _lasting(view: ClusterView, model_id: str) -> list[CopyRecord]:
    """Copies that will last: a draining instance's do not."""
    return [
        copy
        for copy in view.copies_of(model_id)
        if copy.state in (CopyState.LOADED, CopyState.LOADING)
        and view.instances[copy.instance_id].ready
    ]


def _seniority(copy: CopyRecord) -> tuple[bool, int, str]:
    return copy.state is not CopyState.LOADED, copy.claimed_at_ms, copy.instance_id


_T = TypeVar("_T")


def finish(slices: Generator[None, None, _T]) -> _T:
    """Run through at once."""
    while True:
        try:
            next(slices)
        except StopIteration as ended:
            result: _T = ended.value
            return result
