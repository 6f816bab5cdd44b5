"""What the leader has loaded ahead of any request: the most recently used models, into free memory.

Nothing is evicted for it: every instance keeps ``Policy.proactive_free_share`` of its memory free
for what is asked for, and as long as it is busy with loads it gets no such load, so that after a
restart of everything awaited loads come first. At most ``proactive_loads_max`` are under way in the
whole mesh, because the artifact store serves the awaited ones too.

A model that rests for longer than its idle unload allows is not fetched back, nor is one that
failed to load lately. Pure; the leader's shell asks every ``Policy.proactive_sweep_ms`` and as such
loads end, and not in its first ``proactive_quiet_ms``.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Final

from mesh.core.demand import predict_size_bytes
from mesh.core.minimums import LoadOrder
from mesh.core.placement import Placement, place
from mesh.core.policy import Policy
from mesh.core.types import LoadPriority, ModelRecord
from mesh.core.view import ClusterView

# Models that one walk over the last uses ranks: what is loaded until the next walk.
RANKED_MAX: Final = 1_024
# Placements that are tried for one that is wanted: some models fit nowhere.
_LOOKS: Final = 4


def plan_proactive(
    view: ClusterView,
    *,
    now_ms: int,
    policy: Policy,
    under_way: Collection[str],
    ranked: Iterable[str] | None = None,
    most: int | None = None,
) -> tuple[LoadOrder, ...]:
    """Loads of models without a copy, the most recently used first, each instance at most one.

    ``under_way``: models whose proactive load has not ended. ``ranked``: what ``recent_models``
    said lately; without it the last uses are walked now, if there is room for any. ``most``: name
    at most so many now, for who does it in slices.
    """
    left = policy.proactive_loads_max - len(under_way)
    if most is not None:
        left = min(left, most)
    if left <= 0 or not view.synced:
        return ()
    room = _room(view, policy)
    if not room:
        return ()
    if ranked is None:
        ranked = recent_models(view, now_ms=now_ms, policy=policy)
    orders: list[LoadOrder] = []
    looks = _LOOKS * left
    for model in _to_load(view, ranked, under_way, room, now_ms, policy):
        placed = _place(view, model, room, now_ms, policy)
        looks -= 1
        if placed is not None:
            del room[placed.instance_id]
            order = LoadOrder(model.model_id, placed, LoadPriority.PROACTIVE, "recently_used")
            orders.append(order)
        if len(orders) >= left or not room or not looks:
            break
    return tuple(orders)


def has_room(view: ClusterView, policy: Policy) -> bool:
    """Whether any instance may be given such a load now."""
    return view.synced and bool(_room(view, policy))


def recent_models(
    view: ClusterView,
    *,
    now_ms: int,
    policy: Policy,
    passed_over: Collection[str] = (),
    count: int = RANKED_MAX,
) -> tuple[str, ...]:
    """The ``count`` most recently used models that have no copy and may have one, latest first.

    ``passed_over``: refused lately. Walks all known last uses.
    """
    copied, models = view.copied_models(), view.models
    has_copy = copied if isinstance(copied, Collection) else frozenset(copied)
    least_ms = now_ms - policy.proactive_recent_ms
    best: list[tuple[int, str]] = []  # a heap: the least recent one first
    for model_id, at_ms in view.last_used.items():
        if at_ms < least_ms or model_id in has_copy or model_id in passed_over:
            continue
        if not _may_rest(models.get(model_id), now_ms - at_ms, policy):
            continue
        if len(best) < count:
            heapq.heappush(best, (at_ms, model_id))
        elif count:
            heapq.heappushpop(best, (at_ms, model_id))
            least_ms = best[0][0]  # from here on nearly all are passed by the first comparison
    return tuple(model_id for _, model_id in sorted(best, key=lambda use: (-use[0], use[1])))


def _may_rest(model: ModelRecord | None, idle_ms: int, policy: Policy) -> bool:
    """Whether a copy that was unused for so long would stay."""
    if model is None:
        return False
    idle_max_ms = policy.idle_unload_ms if model.idle_unload_ms is None else model.idle_unload_ms
    return idle_max_ms <= 0 or idle_ms < idle_max_ms


def _room(view: ClusterView, policy: Policy) -> dict[str, int]:
    """Bytes that each READY instance has to spare; those busy with loads are not in it."""
    room: dict[str, int] = {}
    for instance_id, slot in view.instances.items():
        record = slot.record
        spare = slot.effective_free_bytes - int(record.capacity_bytes * policy.proactive_free_share)
        if slot.ready and spare > 0 and slot.loads_in_progress < max(1, record.load_slots - 1):
            room[instance_id] = spare
    return room


def _to_load(
    view: ClusterView,
    ranked: Iterable[str],
    under_way: Collection[str],
    room: Mapping[str, int],
    now_ms: int,
    policy: Policy,
) -> Iterator[ModelRecord]:
    """Those that are still without a copy, and that somebody can run: a placement costs a walk over
    all instances. ``room`` only shrinks meanwhile."""
    formats = {t for i in room for t in view.instances[i].record.model_types}
    largest = max(room.values())
    for model_id in ranked:
        model = view.models.get(model_id)
        if model is None or model_id in under_way or model.model_type not in formats:
            continue
        if view.copies_of(model_id) or view.pending_of(model_id):
            continue
        if predict_size_bytes(model, policy) > largest or view.failures_of(model_id, now_ms):
            continue
        yield model


def _place(
    view: ClusterView, model: ModelRecord, room: dict[str, int], now_ms: int, policy: Policy
) -> Placement | None:
    size_bytes = predict_size_bytes(model, policy)
    without = [i for i in view.instances if room.get(i, -1) < size_bytes]
    if len(without) == len(view.instances):
        return None
    placed = place(view, model, now_ms=now_ms, policy=policy, exclude=frozenset(without))
    return placed if isinstance(placed, Placement) and not placed.full else None
