"""The leader's sweep: what no single copy or model looks after.

``plan_repair`` names, in one printable value, what is to be deleted, unloaded, pinned and loaded.
It decides from the view alone, does nothing before the view has synced (absence would mean
nothing), and bounds every list, so that a large backlog is worked off over several sweeps. Every
deletion is carried out by compare-and-swap.

Copies that somebody wants to be there:

- a **pinned** model has exactly one pinned copy: pinned in place where it has a copy, loaded as if
  a request waited for it where it has none; a second pinned copy goes;
- a **minimum** of two or more copies is soft: it is honoured for the most recently used models,
  until what they keep is ``Policy.min_copies_capacity_share`` of the READY capacity, and evicts
  only what was used less recently than the model itself.

What cannot be had is a ``Shortfall`` with its reason; ``shortfall_of`` tells it of one model from
any router's view. Copies on draining instances leave with them and do not count.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from itertools import islice
from types import MappingProxyType
from typing import Final, TypeVar

from mesh.core.demand import predict_size_bytes
from mesh.core.placement import Placement, place
from mesh.core.policy import Policy
from mesh.core.types import CopyRecord, CopyState, LoadPriority, ModelRecord
from mesh.core.view import ClusterView

# Model id -> instances that were asked lately and did not take it: passed over for a while.
Tried = Mapping[str, Collection[str]]
NOT_TRIED: Final[Tried] = MappingProxyType({})


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
class RepairPlan:
    """``delete_failures``, ``delete_copies``, ``unload`` and ``surplus_pins`` hold (model id,
    instance id), ``delete_last_used`` the ids of instances that are gone. ``shortfalls`` are the
    first ones of what ``lacking`` counts: missing copies by reason."""

    delete_failures: tuple[tuple[str, str], ...] = ()
    delete_copies: tuple[tuple[str, str], ...] = ()  # of instances without a record
    unload: tuple[tuple[str, str], ...] = ()  # copies of models that are not registered
    surplus_pins: tuple[tuple[str, str], ...] = ()
    delete_models: tuple[str, ...] = ()
    delete_last_used: tuple[str, ...] = ()
    loads: tuple[LoadOrder, ...] = ()
    crowded: tuple[str, ...] = ()  # their instance gets another load first: ask about them again
    shortfalls: tuple[Shortfall, ...] = ()
    lacking: Mapping[str, int] = field(default_factory=dict)
    reason: str = "swept"  # or not_synced


def plan_repair(
    view: ClusterView,
    *,
    now_ms: int,
    policy: Policy,
    tried: Tried = NOT_TRIED,
    absent_since_ms: Mapping[str, int] = MappingProxyType({}),
) -> RepairPlan:
    """One sweep over failures, copied models and the models with a minimum; not over all models.

    ``absent_since_ms``: since when instances are missed that left copies behind. Their keys vanish
    with the lease that they share; what stays was put without one, and nobody else takes it away.
    """
    if not view.synced:
        return RepairPlan(reason="not_synced")
    bound = policy.repair_batch_max
    loads, shortfalls, crowded = _missing(
        view,
        view.models_with_minimum(),
        now_ms=now_ms,
        policy=policy,
        granted=grant_minimums(view, policy),
        tried=tried,
    )
    lacking: Counter[str] = Counter()
    for short in shortfalls:
        lacking[short.reason] += short.missing
    return RepairPlan(
        delete_failures=_first(
            bound,
            (
                (f.model_id, f.instance_id)
                for f in view.all_failures()
                if f.expires_at_ms <= now_ms or f.model_id not in view.models
            ),
        ),
        delete_copies=_first(
            max(1, bound // 2),  # each is compared with its instance
            (
                (model_id, instance_id)
                for instance_id, copies in view.copies_without_instance().items()
                if now_ms - absent_since_ms.get(instance_id, now_ms) > policy.orphan_grace_ms
                for model_id in copies
            ),
        ),
        unload=_first(bound, _unregistered_copies(view)),
        surplus_pins=_first(bound, _surplus_pins(view)),
        delete_models=_first(bound, _orphans(view, now_ms, policy)),
        delete_last_used=_first(
            bound,
            (
                instance_id
                for instance_id, newest_at_ms in view.flushed_by_the_gone()
                if now_ms - newest_at_ms >= policy.last_used_keep_ms
            ),
        ),
        loads=loads,
        crowded=crowded,
        shortfalls=shortfalls[:bound],
        lacking=dict(lacking),
    )


def _unregistered_copies(view: ClusterView) -> Iterator[tuple[str, str]]:
    for model_id in view.copied_models():
        if model_id not in view.models:
            for copy in view.copies_of(model_id):
                yield model_id, copy.instance_id


def _orphans(view: ClusterView, now_ms: int, policy: Policy) -> Iterator[str]:
    """``auto_delete`` models that no alias names, past the time in which the alias may come."""
    for model_id in view.unaliased_models():
        if now_ms - view.models[model_id].created_at_ms >= policy.orphan_grace_ms:
            yield model_id


def _surplus_pins(view: ClusterView) -> Iterator[tuple[str, str]]:
    """All pinned copies of a model but the one that was claimed first."""
    for model_id in view.models_with_minimum():
        if view.models[model_id].pinned:
            pins = [copy for copy in _lasting(view, model_id) if copy.pinned]
            for copy in sorted(pins, key=_seniority)[1:]:
                yield model_id, copy.instance_id


# ---- copies that somebody wants -----------------------------------------------------------------


def grant_minimums(view: ClusterView, policy: Policy) -> Minimums:
    """Share the memory for soft minimums out, to the most recently used models first.

    A minimum counts with all its copies, those that are there included. What no longer fits whole
    gets as many copies as fit.
    """
    share_bytes = _share_bytes(view, policy)
    models = view.models
    wishes = [
        (model, predict_size_bytes(model, policy))
        for model_id in view.models_with_minimum()
        if (model := models[model_id]).min_copies > 1
    ]
    wished_bytes = sum(model.min_copies * size_bytes for model, size_bytes in wishes)
    if wished_bytes <= share_bytes or not share_bytes:
        return Minimums(share_bytes, wished_bytes)
    cut: dict[str, int] = {}
    left_bytes = share_bytes
    order = sorted([(*_turn(view, model), model.min_copies, size) for model, size in wishes])
    for _, model_id, min_copies, size_bytes in order:
        granted = min(min_copies, left_bytes // size_bytes) if size_bytes else min_copies
        left_bytes -= granted * size_bytes
        if granted < min_copies:
            cut[model_id] = granted
    return Minimums(share_bytes, wished_bytes, cut)


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
    wanting = view.models_with_minimum()
    if among is not None:
        wanting = wanting & among
    if not wanting:
        return (), ()
    granted = grant_minimums(view, policy) if minimums is None else minimums
    loads, shortfalls, _ = _missing(
        view, wanting, now_ms=now_ms, policy=policy, granted=granted, tried=tried
    )
    return loads, shortfalls


def _missing(
    view: ClusterView,
    wanting: Iterable[str],
    *,
    now_ms: int,
    policy: Policy,
    granted: Minimums,
    tried: Tried,
) -> tuple[tuple[LoadOrder, ...], tuple[Shortfall, ...], tuple[str, ...]]:
    """Loads, shortfalls, and the models that are crowded out in this round."""
    loads: list[LoadOrder] = []
    shortfalls: list[Shortfall] = []
    needs: list[_Need] = []
    crowded: list[str] = []
    for model_id in wanting:
        need = _need(view, view.models[model_id], granted)
        if need.over_share > 0:
            shortfalls.append(_over_share(need, granted))
        if need.pin or need.copies > 0:
            needs.append(need)
    taken: set[str] = set()
    turns = _in_turn(view, needs, now_ms, policy)
    for need in turns[: policy.repair_batch_max]:
        if len(loads) >= policy.repair_loads_max:
            break
        refused_by = tried.get(need.model.model_id, ())
        found = _order(view, need, refused_by, now_ms=now_ms, policy=policy)
        if isinstance(found, Shortfall):
            shortfalls.append(found)
        elif found is not None and found.placement.instance_id in taken:
            crowded.append(need.model.model_id)
        elif found is not None:
            taken.add(found.placement.instance_id)
            loads.append(found)
    shortfalls += (
        Shortfall(need.model.model_id, max(1, need.copies), "in_turn", "looked at in a later sweep")
        for need in turns[policy.repair_batch_max :]
    )
    return tuple(loads), tuple(shortfalls), tuple(crowded)


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


@dataclass(frozen=True, slots=True)
class _Need:
    """What one model lacks: its ``pin``, ``copies`` that it may have, and those ``over_share``."""

    model: ModelRecord
    pin: bool
    copies: int
    over_share: int


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


def _in_turn(view: ClusterView, needs: list[_Need], now_ms: int, policy: Policy) -> list[_Need]:
    """Pins first, then by last use. When there are more than one sweep looks at, each sweep begins
    further on, so that some that cannot be had do not hide those that can."""
    needs.sort(key=lambda need: (not need.pin, _turn(view, need.model)))
    bound = policy.repair_batch_max
    if len(needs) <= bound:
        return needs
    start = now_ms // policy.leader_sweep_ms * bound % len(needs)
    return needs[start:] + needs[:start]


def _turn(view: ClusterView, model: ModelRecord) -> tuple[int, str]:
    return -_wished_at_ms(view, model), model.model_id


def _wished_at_ms(view: ClusterView, model: ModelRecord) -> int:
    """Who registers a minimum wants it as of then."""
    return max(view.last_used_at_ms(model.model_id), model.created_at_ms)


def _share_bytes(view: ClusterView, policy: Policy) -> int:
    capacity = sum(s.record.capacity_bytes for s in view.instances.values() if s.ready)
    return int(capacity * policy.min_copies_capacity_share)


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


def _first(bound: int, items: Iterable[_T]) -> tuple[_T, ...]:
    return tuple(islice(items, bound))
