"""Which of the instances that fit is to be preferred: soft filters, the order, and the draw.

A ``Preference`` narrows the instances that fit, one term after the other; a term that nobody meets
narrows nothing, which is how soft filters are relaxed, the last one first:

1. ``not_avoided``: not one that does not answer just now (the caller's ``avoid``)
2. ``not_replaced``: not one whose replica set is being replaced (``mesh.core.replacement``)
3. ``preferred_labels``: has all preferred labels, and room
4. ``not_full``: nothing has to be evicted there, and no load would wait there longer than elsewhere
5. ``not_hot``: does not answer far more requests than the coolest one
6. ``zone_spread``: in a zone with the fewest copies of the model
7. ``most_free``: about as much free memory as the best, when nothing has to be evicted
8. ``slots_free``: its load slots are least behind
9. ``oldest_lru`` or ``cheapest_victim``: what would go there is worth about as little as anywhere,
   with much slack: see ``Policy.close_score_share``
10. ``preferred_labels`` once more, where all are full

Room is what is free beyond the unload buffer, which every instance keeps by evicting ahead.

Room is not worth a queue: an instance that has just started is empty, has two load slots like all
others, and would get every load of the mesh until it is full. So one with room goes before a full
one only while its slots are no further behind than anybody's. (Simulated: one of ten instances with
room for 300 models each restarts; the 99th percentile of a cold start was 87 s, and is 1 s.)

"About" (``Policy.close_free_share`` and the like) is there because every router looks at
adverts that are up to half a second old: if all took the best one, all would take the same one. Of
those that are left two are drawn by a hash of model and instance, and the better of the two is
taken (fewest loads last): two random choices keep nearly the balance of the best one, without its
herds. Neither the order of the input nor the names of instances decide anything.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from hashlib import blake2b
from math import log2
from typing import Final

from mesh.core.demand import Demand
from mesh.core.policy import Policy
from mesh.core.replacement import arriving_sets
from mesh.core.slots import InstanceSlot
from mesh.core.view import ClusterView

# What speaks against an instance without refusing it; the words of `mesh explain`.
AVOIDED: Final = "avoided"
BEING_REPLACED: Final = "being_replaced"
NOT_PREFERRED: Final = "not_preferred"
HOT: Final = "hot"

_MASK: Final = (1 << 64) - 1

# Compares in the order of the terms; smaller is better.
Rank = tuple[float, ...]


class Preference:
    """For one decision. ``pool`` are all that fit: what "coolest" and "cheapest" refer to."""

    def __init__(
        self,
        view: ClusterView,
        demand: Demand,
        pool: Sequence[InstanceSlot],
        *,
        now_ms: int,
        policy: Policy,
        avoid: Collection[str] = (),
    ) -> None:
        self._size_bytes = demand.size_bytes
        self._preferred = demand.preferred
        self._avoid = avoid
        newest = view.replicas.newest
        self._arriving = arriving_sets(newest, now_ms, policy) if newest else {}
        self._now_ms = now_ms
        self._policy = policy
        # Memory that instances keep free for loads by evicting ahead, by capacity: no room.
        capacities = {s.record.capacity_bytes for s in pool}
        self._reserves = {c: policy.unload_buffer_bytes(c) for c in capacities}
        self._zones = _copies_by_zone(view, demand.model.model_id)
        rates = [s.record.requests_per_minute for s in pool]
        self._hot_above: float = policy.hot_requests_per_minute
        self._some_hot = bool(rates) and max(rates) > self._hot_above
        if self._some_hot:
            self._hot_above = max(self._hot_above, policy.hot_factor * min(rates))
        # Instances of an older version do not tell what their victim is worth.
        untold = [s for s in pool if not s.record.victim_score and s.record.lru_at_ms]
        self._by_score = not untold
        digest = blake2b(demand.model.model_id.encode(), digest_size=8).digest()
        self._key = int.from_bytes(digest, "big") | 1
        self._least_behind = min([s.slots_behind for s in self._trusted(pool)], default=0)

    def choose(self, pool: Sequence[InstanceSlot]) -> tuple[InstanceSlot, InstanceSlot | None]:
        """The one to take, and what came second. ``pool`` is not empty."""
        winner, second = self._best(pool)
        if second is None and len(pool) > 1:
            second, _ = self._best([slot for slot in pool if slot is not winner])
        return winner, second

    def _best(self, pool: Sequence[InstanceSlot]) -> tuple[InstanceSlot, InstanceSlot | None]:
        """The better of two drawn, and the other, or the only one on the short list."""
        short = self._shortlist(pool)
        if len(short) == 1:
            return short[0], None
        key = self._key
        draws = [(slot.salt * key) & _MASK for slot in short]
        at = draws.index(min(draws))
        draws[at] = _MASK + 1
        one, other = short[at], short[draws.index(min(draws))]
        rank = self._load_rank if self._full(one) and self._full(other) else self._rank
        return (one, other) if rank(one) <= rank(other) else (other, one)

    def parting(self, winner: InstanceSlot, second: InstanceSlot) -> str:
        """The first term by which ``winner`` was the better one."""
        ours, theirs = self._rank(winner), self._rank(second)
        full = self._full(winner)
        for term, (mine, other) in enumerate(zip(ours[:6], theirs[:6], strict=True)):
            if mine != other:
                has_room = second.effective_free_bytes >= self._size_bytes
                return "slots_free" if term == _NOT_FULL and has_room else _FIRST_TERMS[term]
        if not full and not self._free_enough(second, winner.effective_free_bytes):
            return "most_free"
        if winner.slots_behind != second.slots_behind:
            return "slots_free"
        if not full and winner.effective_free_bytes != second.effective_free_bytes:
            return "most_free"
        cheaper = "cheapest_victim" if self._by_score else "oldest_lru"
        if full and second not in self._cheap([winner, second]):
            return cheaper
        if full and self._lacks_labels(winner) != self._lacks_labels(second):
            return "preferred_labels"
        if winner.loads_in_progress != second.loads_in_progress:
            return "fewest_loads"
        return "tie_hash"

    def marks(self, slot: InstanceSlot) -> tuple[str, ...]:
        """What is held against it."""
        said = (
            (AVOIDED, slot.record.instance_id in self._avoid),
            (BEING_REPLACED, self._replaced(slot)),
            (NOT_PREFERRED, self._lacks_labels(slot)),
            (HOT, self._hot(slot)),
        )
        return tuple(mark for mark, holds in said if holds)

    def in_order(self, slots: Collection[InstanceSlot]) -> list[InstanceSlot]:
        """Best first. Beyond the first two, what is merely close is ordered strictly."""
        return sorted(slots, key=self._rank)

    # ---- the terms ------------------------------------------------------------------------

    def _shortlist(self, pool: Sequence[InstanceSlot]) -> Sequence[InstanceSlot]:
        """See the module's docstring. Comprehensions over attributes: see ``demand.fitting``."""
        size_bytes, policy = self._size_bytes, self._policy
        pool, behind = self._trusted(pool), self._least_behind
        reserves = self._reserves
        roomy = [
            s
            for s in pool
            if s.effective_free_bytes - reserves[s.record.capacity_bytes] >= size_bytes
            and s.slots_behind <= behind
        ]
        if self._preferred and roomy:
            roomy = [s for s in roomy if self._preferred <= s.labels] or roomy
        pool = roomy or pool
        if self._some_hot:
            limit = self._hot_above
            pool = [s for s in pool if s.record.requests_per_minute <= limit] or pool
        if self._zones:
            copies = self._zones
            fewest = min([copies[s.record.zone] for s in pool])
            pool = [s for s in pool if copies[s.record.zone] == fewest]
        if roomy:
            enough = max([s.effective_free_bytes for s in pool]) * policy.close_free_share
            pool = [s for s in pool if s.effective_free_bytes >= enough]
        behind = min([s.slots_behind for s in pool])
        pool = [s for s in pool if s.slots_behind == behind]
        if not roomy:
            pool = self._cheap(pool)
            if self._preferred:
                pool = [s for s in pool if self._preferred <= s.labels] or pool
        return pool

    def _trusted(self, pool: Sequence[InstanceSlot]) -> Sequence[InstanceSlot]:
        """Those that answer, and among them those that are to stay."""
        if self._avoid:
            pool = [s for s in pool if s.record.instance_id not in self._avoid] or pool
        if coming := self._arriving:
            pool = [
                s
                for s in pool
                if coming.get(s.record.group, s.record.replica_set) == s.record.replica_set
            ] or pool
        return pool

    def _cheap(self, pool: Sequence[InstanceSlot]) -> Sequence[InstanceSlot]:
        """Where about as little is lost as anywhere. 0 is "nothing can be evicted": the space is
        taken by loads under way and pinned copies."""
        pool = [s for s in pool if s.record.lru_at_ms or s.record.victim_score] or pool
        if self._by_score:
            close = self._policy.close_score_share
            worth = min([s.record.victim_score for s in pool]) + (-log2(close) if close else 1e9)
            return [s for s in pool if s.record.victim_score <= worth]
        close = self._policy.close_lru_share
        oldest_at_ms = min([s.record.lru_at_ms for s in pool])
        age_ms = self._now_ms - oldest_at_ms
        slack_ms = max(age_ms * (1 - close), self._policy.advert_min_interval_ms)
        return [s for s in pool if s.record.lru_at_ms <= oldest_at_ms + slack_ms]

    def _rank(self, slot: InstanceSlot) -> Rank:
        """Strictly, term by term; the draw last, so that no two are equal."""
        full = self._full(slot)
        return (
            slot.record.instance_id in self._avoid,
            self._replaced(slot),
            full or self._lacks_labels(slot) if self._preferred else 0,
            full,
            self._hot(slot),
            self._zones[slot.record.zone],
            slot.slots_behind if full else -slot.effective_free_bytes,
            *(self._victim(slot) if full else (0, slot.slots_behind)),
            self._lacks_labels(slot),
            slot.loads_in_progress,
            self._draw(slot),
        )

    def _load_rank(self, slot: InstanceSlot) -> Rank:
        """Of full ones that are about as good: how little what would go is worth does not decide
        once more. It would always name the one that has just loaded what nobody asks for again."""
        return slot.slots_behind, slot.loads_in_progress, self._draw(slot)

    def _full(self, slot: InstanceSlot) -> bool:
        """Or as good as full: a load would wait there longer than elsewhere."""
        return (
            slot.effective_free_bytes - self._reserves.get(slot.record.capacity_bytes, 0)
            < self._size_bytes
            or slot.slots_behind > self._least_behind
        )

    def _free_enough(self, slot: InstanceSlot, best_bytes: int) -> bool:
        return slot.effective_free_bytes >= best_bytes * self._policy.close_free_share

    def _replaced(self, slot: InstanceSlot) -> bool:
        record = slot.record
        return self._arriving.get(record.group, record.replica_set) != record.replica_set

    def _lacks_labels(self, slot: InstanceSlot) -> bool:
        return not self._preferred <= slot.labels

    def _hot(self, slot: InstanceSlot) -> bool:
        return slot.record.requests_per_minute > self._hot_above

    def _victim(self, slot: InstanceSlot) -> tuple[bool, float]:
        """(nothing can be evicted, what the cheapest copy is worth)"""
        record = slot.record
        nothing = not (record.lru_at_ms or record.victim_score)
        return nothing, record.victim_score if self._by_score else float(record.lru_at_ms)

    def _draw(self, slot: InstanceSlot) -> int:
        """Different for each model: a multiplicative hash, as a placement may draw a thousand."""
        return (slot.salt * self._key) & _MASK


_FIRST_TERMS: Final = (
    "not_avoided",
    "not_replaced",
    "preferred_labels",
    "not_full",
    "not_hot",
    "zone_spread",
)
_NOT_FULL: Final = _FIRST_TERMS.index("not_full")


def _copies_by_zone(view: ClusterView, model_id: str) -> Counter[str]:
    """Where the model has copies that last or are on their way."""
    lasting = [copy.instance_id for copy in view.copies_of(model_id)]
    zones: Counter[str] = Counter()
    for instance_id in (*lasting, *view.pending_of(model_id)):
        slot = view.instances[instance_id]
        if slot.ready:
            zones[slot.record.zone] += 1
    return zones
