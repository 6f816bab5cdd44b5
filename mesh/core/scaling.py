"""How many copies one model has: one more, one fewer, or as it is.

Decided by one party per model, the READY instance that has held it longest, from what it measured
of its own copy: requests go to the copy with fewest in flight, so that its share stands for the
others'. Every other instance gets ``Keep("not_the_oldest")`` from the same view, so that any number
of instances scale a model once. The decider's own copy is never the one to go: with it the last
copy would.

The rules, first match first:

| when | then |
|---|---|
| this instance does not hold a LOADED copy, or somebody has held one longer | ``Keep`` |
| a copy is being loaded | ``Keep``: it is not known yet what that one will change |
| more requests a minute, in flight or waiting on one copy than it should have | ``ScaleUp`` |
| one copy, used now and regularly before, and memory that nobody misses | ``ScaleUp`` |
| more than two, and the others would carry the load with ease | ``ScaleDown`` |
| two, and unused for long (for less long while the mesh is short of memory) | ``ScaleDown`` |

A scale-up waits ``Policy.scale_up_cooldown_ms`` after the last change of the number of copies, a
scale-down ``scale_down_cooldown_ms``; a scale-down never goes below the model's minimum and never
takes a pinned copy. Copies that two loads made while the store was away are trimmed by the same
rules. The functions are pure; nothing here does I/O or knows the time.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from math import ceil
from typing import Final, Literal

from mesh.core.demand import (
    ASKED_ALREADY,
    EXCLUDED,
    FAILED_HERE,
    HAS_COPY,
    demand_of,
    refusal,
)
from mesh.core.placement import NoPlacement, Placement, place
from mesh.core.policy import Policy
from mesh.core.types import CopyRecord, CopyState, ModelRecord
from mesh.core.view import ClusterView

# Refusals that do not last, or are those of the copies themselves: such an instance can hold it.
_ABLE: Final = frozenset({None, HAS_COPY, FAILED_HERE, EXCLUDED, ASKED_ALREADY})


@dataclass(frozen=True, slots=True)
class CopyUse:
    """What the decider measured of its own copy since it last looked.

    ``concurrency`` is the mean number of requests in flight (the time that answered ones spent
    here, waiting included, by the wall clock's), ``in_flight`` the number at this look or the last,
    whichever is smaller: requests that have not been answered show only there.
    """

    requests_per_minute: float = 0.0
    concurrency: float = 0.0
    latency_ms: float = 0.0
    in_flight: int = 0
    max_concurrency: int = 1
    last_used_at_ms: int = 0
    noted_uses: tuple[int, ...] = ()  # see ``note_use``
    changed_at_ms: int = 0  # when the decider last saw or made the number of copies change

    @property
    def occupied(self) -> float:
        """Requests at once that this copy has to deal with."""
        return max(self.concurrency, float(self.in_flight))


@dataclass(frozen=True, slots=True)
class ScaleUp:
    """Load one more copy at ``placement``, and at each of ``further``, which are other instances.

    ``reason``: ``rate``, ``concurrency``, ``queue`` or ``second_copy``.
    """

    placement: Placement
    reason: str
    detail: str
    further: tuple[Placement, ...] = ()

    @property
    def placements(self) -> tuple[Placement, ...]:
        return (self.placement, *self.further)


@dataclass(frozen=True, slots=True)
class ScaleDown:
    """Unload the copy on ``instance_id``. ``reason``: ``low_rate``, ``idle`` or
    ``idle_memory_short``."""

    instance_id: str
    reason: str
    detail: str


@dataclass(frozen=True, slots=True)
class Keep:
    """Nothing to do. ``reason``: ``not_here``, ``not_the_oldest``, ``load_under_way``,
    ``cooldown``, ``copies_share``, ``no_memory``, ``minimum``, ``pinned``, a NoPlacement's, or
    ``enough``."""

    reason: str
    detail: str = ""


Scaling = ScaleUp | ScaleDown | Keep


def scale(
    view: ClusterView,
    model: ModelRecord,
    instance_id: str,
    use: CopyUse,
    *,
    now_ms: int,
    policy: Policy,
) -> Scaling:
    """What the instance ``instance_id`` does about ``model``: see the module's docstring.

    ``view`` holds all instances, and this model's copies and failures.
    """
    copies = _ready_copies(view, model.model_id)
    loaded = [copy for copy in copies if copy.state is CopyState.LOADED]
    if all(copy.instance_id != instance_id for copy in loaded):
        return Keep("not_here")
    holder = decider(view, model.model_id)
    if holder != instance_id:
        return Keep("not_the_oldest", f"{holder} has held it longer")
    if len(copies) > len(loaded) or view.pending_of(model.model_id):
        return Keep("load_under_way")
    changed_at_ms = max(use.changed_at_ms, *(copy.loaded_at_ms for copy in loaded))
    excess = _excess(use, len(loaded), policy)
    if excess is not None:
        return _more(view, model, len(loaded), excess, now_ms - changed_at_ms, now_ms, policy)
    if len(loaded) == 1:
        return _second(view, model, use, now_ms - changed_at_ms, now_ms, policy)
    return _fewer(view, model, loaded, instance_id, use, now_ms - changed_at_ms, now_ms, policy)


def decider(view: ClusterView, model_id: str) -> str:
    """The READY instance that has held a LOADED copy longest, ties by id; "" when there is none."""
    held = [
        (copy.claimed_at_ms, copy.instance_id)
        for copy in _ready_copies(view, model_id)
        if copy.state is CopyState.LOADED
    ]
    return min(held)[1] if held else ""


def note_use(noted: tuple[int, ...], at_ms: int, policy: Policy) -> tuple[int, ...]:
    """Remember that the model was used at ``at_ms``: the first use of each stretch of
    ``Policy.second_copy_min_age_ms``, as far back as ``second_copy_max_age_ms``. Bounded."""
    kept = tuple(t for t in noted if at_ms - t <= policy.second_copy_max_age_ms)
    if kept and at_ms - kept[-1] < policy.second_copy_min_age_ms:
        return kept
    return (*kept, at_ms)


def in_regular_use(use: CopyUse, now_ms: int, policy: Policy) -> bool:
    """Used within the last two sweeps, and before that between the two ages of Policy ago."""
    if now_ms - use.last_used_at_ms > 2 * policy.scale_sweep_ms:
        return False
    least, most = policy.second_copy_min_age_ms, policy.second_copy_max_age_ms
    return any(least <= now_ms - at_ms <= most for at_ms in use.noted_uses)


@dataclass(frozen=True, slots=True)
class Memory:
    """The mesh's memory in one glance: ``rested`` tells that some instance would evict what nobody
    has used for ``Policy.second_copy_lru_age_ms``."""

    free_share: float
    rested: bool


def memory_of(view: ClusterView, now_ms: int, policy: Policy) -> Memory:
    """Walks the instances: once for a look at many models."""
    since_ms = now_ms - policy.second_copy_lru_age_ms
    rested = any(s.ready and 0 < s.record.lru_at_ms <= since_ms for s in view.instances.values())
    return Memory(free_share(view, policy), rested)


def worth_reading(
    use: CopyUse, copies: int, memory: Memory, *, now_ms: int, policy: Policy
) -> Literal["hot", "regular", "fewer", ""]:
    """Why ``scale`` may come to something when there are ``copies``, or "": known without reading
    the model's copies from the store, so that nearly none have to be read."""
    if _excess(use, 1, policy) is not None:
        return "hot"
    if copies == 1 and in_regular_use(use, now_ms, policy):
        spare = memory.rested or memory.free_share >= policy.second_copy_free_share
        return "regular" if spare else ""
    if copies > 2 and _carried_by_others(use, copies, policy):
        return "fewer"
    if copies == 2 and _idle_reason(now_ms - use.last_used_at_ms, memory.free_share, policy):
        return "fewer"
    return ""


def free_share(view: ClusterView, policy: Policy) -> float:
    """Free memory of all READY instances beyond what they keep free by evicting ahead, as a share
    of theirs: a mesh that thrashes has its unload buffers free, too."""
    capacity = free = 0
    for slot in view.instances.values():
        if slot.ready:
            capacity += slot.record.capacity_bytes
            buffer_bytes = policy.unload_buffer_bytes(slot.record.capacity_bytes)
            free += max(0, slot.effective_free_bytes - buffer_bytes)
    return free / capacity if capacity else 0.0


# ---- more ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Excess:
    reason: str
    copies: int  # that the load takes
    detail: str


def _excess(use: CopyUse, copies: int, policy: Policy) -> _Excess | None:
    """None when this copy's load is within the thresholds."""
    rate_max = policy.scale_up_requests_per_minute
    most = max(policy.scale_up_concurrency_share * use.max_concurrency, 1e-6)
    by_rate = ceil(copies * use.requests_per_minute / rate_max)
    by_slots = ceil(copies * use.occupied / most)
    if use.requests_per_minute <= rate_max and use.occupied <= most:
        return None
    if by_rate >= by_slots:
        told = f"{use.requests_per_minute:.0f} requests a minute on one copy, {rate_max} are enough"
        return _Excess("rate", by_rate, told)
    told = (
        f"{use.occupied:.1f} requests at once on one copy, {use.max_concurrency} is its limit, "
        f"{use.latency_ms:.0f} ms each"
    )
    waiting = use.in_flight > use.max_concurrency
    return _Excess("queue" if waiting else "concurrency", by_slots, told)


def _more(
    view: ClusterView,
    model: ModelRecord,
    copies: int,
    excess: _Excess,
    changed_ms_ago: int,
    now_ms: int,
    policy: Policy,
) -> ScaleUp | Keep:
    """At most twice as many: the demand is a guess from one copy, and grows while it is met."""
    if changed_ms_ago < policy.scale_up_cooldown_ms:
        return Keep("cooldown", excess.detail)
    asks = demand_of(view, model, now_ms=now_ms, policy=policy)
    able = sum(refusal(slot, asks) in _ABLE for slot in view.instances.values())
    most = max(2, int(able * policy.copies_max_share))
    wanted = min(excess.copies - copies, copies, policy.scale_up_copies_max)
    if copies >= most:
        return Keep("copies_share", f"{copies} copies, {able} instances can hold it")
    chosen: list[Placement] = []
    for _ in range(min(wanted, most - copies)):
        taken = [placement.instance_id for placement in chosen]
        placed = place(view, model, now_ms=now_ms, policy=policy, exclude=taken)
        if isinstance(placed, NoPlacement):
            if not chosen:
                return Keep(placed.reason, placed.detail)
            break
        chosen.append(placed)
    detail = f"{excess.detail}; {copies} copies"
    return ScaleUp(chosen[0], excess.reason, detail, tuple(chosen[1:]))


def _second(
    view: ClusterView,
    model: ModelRecord,
    use: CopyUse,
    changed_ms_ago: int,
    now_ms: int,
    policy: Policy,
) -> ScaleUp | Keep:
    """Against the loss of the first, where that costs nobody much."""
    if not in_regular_use(use, now_ms, policy):
        return Keep("enough")
    if changed_ms_ago < policy.scale_up_cooldown_ms:
        return Keep("cooldown")
    placed = place(view, model, now_ms=now_ms, policy=policy)
    if isinstance(placed, NoPlacement):
        return Keep(placed.reason, placed.detail)
    share = free_share(view, policy)
    slot = view.instances[placed.instance_id]
    lru_at_ms = slot.record.lru_at_ms
    rested = lru_at_ms > 0 and now_ms - lru_at_ms >= policy.second_copy_lru_age_ms
    if rested or (not placed.full and share >= policy.second_copy_free_share):
        return ScaleUp(placed, "second_copy", f"in regular use; {share:.0%} of the mesh is free")
    return Keep("no_memory", f"{share:.0%} of the mesh is free")


# ---- fewer --------------------------------------------------------------------------------------


def _carried_by_others(use: CopyUse, copies: int, policy: Policy) -> bool:
    """Whether one copy fewer would have so little to do that none is added again soon."""
    if copies < 2:
        return False
    more = copies / (copies - 1)
    most = policy.scale_down_rate_share
    return (
        use.requests_per_minute * more <= most * policy.scale_up_requests_per_minute
        and use.occupied * more <= most * policy.scale_up_concurrency_share * use.max_concurrency
    )


def _fewer(
    view: ClusterView,
    model: ModelRecord,
    loaded: list[CopyRecord],
    instance_id: str,
    use: CopyUse,
    changed_ms_ago: int,
    now_ms: int,
    policy: Policy,
) -> ScaleDown | Keep:
    copies = len(loaded)
    idle_ms = now_ms - use.last_used_at_ms
    if copies > 2:
        if not _carried_by_others(use, copies, policy):
            return Keep("enough")
        reason = "low_rate"
        detail = f"{use.requests_per_minute:.0f} requests a minute on each of {copies} copies"
    else:
        share = free_share(view, policy)
        reason = _idle_reason(idle_ms, share, policy)
        detail = f"unused for {idle_ms} ms; {share:.0%} of the mesh is free"
        if not reason:
            return Keep("enough")
    if changed_ms_ago < policy.scale_down_cooldown_ms:
        return Keep("cooldown", detail)
    if copies - 1 < model.min_copies:
        return Keep("minimum", f"{copies} copies, {model.min_copies} are its minimum")
    others = [copy for copy in loaded if copy.instance_id != instance_id and not copy.pinned]
    if not others:
        return Keep("pinned")
    return ScaleDown(_to_go(view, loaded, others), reason, detail)


def _idle_reason(idle_ms: int, share: float, policy: Policy) -> str:
    """Why a second copy that rests for so long goes, or ""."""
    if idle_ms >= policy.second_copy_idle_ms:
        return "idle"
    short = share < policy.scale_down_free_share
    return "idle_memory_short" if short and idle_ms >= policy.second_copy_idle_short_ms else ""


def _to_go(view: ClusterView, loaded: list[CopyRecord], others: list[CopyRecord]) -> str:
    """From the zone that has most of them; there from the instance with the least free memory;
    there the one that came last."""
    zones = Counter(view.instances[copy.instance_id].record.zone for copy in loaded)

    def order(copy: CopyRecord) -> tuple[int, float, int, str]:
        slot = view.instances[copy.instance_id]
        free = slot.effective_free_bytes / max(1, slot.record.capacity_bytes)
        return -zones[slot.record.zone], free, -copy.claimed_at_ms, copy.instance_id

    return min(others, key=order).instance_id


def _ready_copies(view: ClusterView, model_id: str) -> list[CopyRecord]:
    """Copies that will last: those of draining instances leave with them."""
    return [copy for copy in view.copies_of(model_id) if view.instances[copy.instance_id].ready]
