"""First goes the copy whose absence costs least: uses, aged, times load time, per byte.

How fast to forget is the whole question: independent requests want a memory as long as possible,
bursts and working sets that move a short one. So three half-lives run side by side, and each has
a *rival*: the books of a cache that it alone would have ruled, fed with the same uses, which says
what its misses would have cost lately. The half-life whose rival paid least is in charge; another
takes over when it is cheaper by ``MARGIN``.

Time is measured in turnovers, one use of as many copies as there are: neither the request rate nor
the size of the cache matters, and a night without requests forgets nothing. Uses are seen when the
copy is looked at: ``LOOKS`` copies at each load, in turn, and whoever comes up to go. ``n`` uses
since the last look count ``log2(1 + n)``: a burst says that a model is in use, not that it is
that much more likely to be used again. Scores are kept as ``log2(count) + clock / half_life``,
which grows only by uses, so nothing decays and a lazy heap finds the least one.

Of evicted models the last ``remembered_max`` are remembered, oldest forgotten first: one that comes
back has its past. On 10,000 models this closes 55 to 65 % of the gap between LRU and the
clairvoyant bound where requests are independent, and loses nothing to LRU where they are not
(bench/results/sim-eviction.json). An operation costs O(log n), about 50 us at each load.
"""

from __future__ import annotations

from collections.abc import Callable
from math import exp2, log, log2
from typing import TYPE_CHECKING, Final

from mesh.core.eviction_heap import LazyHeap
from mesh.core.eviction_lru import WORTH_OFFSET
from mesh.core.usage import Use

if TYPE_CHECKING:
    from mesh.core.eviction import Newcomer

# In turnovers: hardly longer than LRU's memory, some working sets' life, and as good as for ever.
HALF_LIVES: Final = (1.0, 8.0, 64.0)
# What rivals paid is forgotten by half in so many turnovers ...
JUDGED_OVER: Final = 20.0
# ... and a rival has to be cheaper by this share before it takes over.
MARGIN: Final = 0.02
# Copies looked at for uses at each load: all are seen several times in a turnover.
LOOKS: Final = 8
# A shorter load costs nobody anything, and how short it was is chance.
LOAD_MIN_MS: Final = 10
# Fewer copies than this make no turnover: the clock would race while the cache fills.
TURNOVER_MIN: Final = 16
# A model that was never used counts as so many uses: logarithms need a floor.
UNUSED: Final = 2.0**-20
_MIB: Final = 1 << 20
_LN2: Final = log(2.0)


class Known:
    """What is known of one model. ``use`` is None when no copy is here."""

    __slots__ = ("at", "counts", "load_ms", "seen", "size_bytes", "use", "weight")

    def __init__(self, at: float) -> None:
        self.counts = [0.0] * len(HALF_LIVES)  # as of ``at``
        self.at = at
        self.size_bytes = 1
        self.load_ms = LOAD_MIN_MS
        self.weight = 0.0  # log2 of milliseconds of load per byte
        self.use: Use | None = None
        self.seen = 0  # of ``use.uses``

    def age_to(self, clock: float) -> None:
        past = clock - self.at
        if past > 0.0:
            counts = self.counts
            for number, half_life in enumerate(HALF_LIVES):
                counts[number] *= exp2(-past / half_life)
            self.at = clock

    def score(self, number: int) -> float:
        count = self.counts[number]
        at = self.at / HALF_LIVES[number]
        return log2(count if count > UNUSED else UNUSED) + at + self.weight


class Rival:
    """The books of a cache ruled by one half-life alone."""

    __slots__ = ("capacity_bytes", "cost_ms", "heap", "number", "used_bytes")

    def __init__(self, number: int, capacity_bytes: int, known: dict[str, Known]) -> None:
        self.number = number
        self.capacity_bytes = capacity_bytes
        self.used_bytes = 0
        self.cost_ms = 0.0
        self.heap = LazyHeap(lambda model_id: known[model_id].score(number))

    def used(self, model_id: str, model: Known, known: dict[str, Known]) -> None:
        if model_id in self.heap:
            return
        self.cost_ms += model.load_ms
        self.heap.add(model_id)
        self.used_bytes += model.size_bytes
        self._fit(known)

    def _fit(self, known: dict[str, Known]) -> None:
        while self.used_bytes > self.capacity_bytes:
            victim = self.heap.pop()
            if victim is None:
                return
            self.used_bytes -= known[victim].size_bytes

    def measured(self, model_id: str, change_bytes: int, known: dict[str, Known]) -> None:
        """Size or load time of a model are new: its score may have fallen."""
        if model_id in self.heap:
            self.heap.discard(model_id)
            self.heap.add(model_id)
            self.used_bytes += change_bytes
            self._fit(known)

    def forget(self, model_id: str, size_bytes: int) -> None:
        if model_id in self.heap:
            self.heap.discard(model_id)
            self.used_bytes -= size_bytes


class FrequencyOrder:
    """An ``EvictionOrder``; see the module's docstring."""

    def __init__(self, capacity_bytes: int, remembered_max: int) -> None:
        self._known: dict[str, Known] = {}
        self._evicted: dict[str, None] = {}  # oldest first
        self._remembered_max = remembered_max
        self._rivals = [Rival(n, capacity_bytes, self._known) for n in range(len(HALF_LIVES))]
        self._chief = len(HALF_LIVES) - 1  # the number of the half-life in charge
        self._heap = LazyHeap(self._seen_score)
        self._oldest = LazyHeap(self._last_used_at_ms)
        self._ring: list[str] = []  # the copies, in no order
        self._place: dict[str, int] = {}  # where in the ring
        self._hand = 0
        self._clock = 0.0  # turnovers
        self._judged_at = 0.0
        # How long a turnover takes, of late: milliseconds and turnovers, both forgotten alike.
        self._pace_ms = 0.0
        self._pace_turns = 0.0
        self._paced_at = (0, 0.0)  # (milliseconds, clock)

    @property
    def half_life_turnovers(self) -> float:
        """What is in charge now: for people and tests."""
        return HALF_LIVES[self._chief]

    # ---- the interface ----

    def add(self, newcomer: Newcomer, use: Use, now_ms: int) -> None:
        model_id = newcomer.model_id
        self._pace(now_ms)
        model = self._known.get(model_id)
        if model is None:
            model = self._known[model_id] = Known(self._clock)
        self._evicted.pop(model_id, None)
        self._measure(model_id, model, newcomer)
        # The request that waits for it counts now, and not again when it comes.
        model.use, model.seen = use, use.uses + newcomer.asked_for
        self._bring_past(model, newcomer.uses_per_s)
        if newcomer.asked_for:
            self._used(model_id, model, 1)
        self._place[model_id] = len(self._ring)
        self._ring.append(model_id)
        self._heap.add(model_id)
        self._oldest.add(model_id)
        for _ in range(min(LOOKS, len(self._ring))):
            self._hand = (self._hand + 1) % len(self._ring)
            self._look(self._ring[self._hand])
        self._judge()

    def discard(self, model_id: str) -> None:
        place = self._place.pop(model_id, None)
        if place is None:
            return
        self._look(model_id)
        last = self._ring.pop()
        if last != model_id:
            self._ring[place] = last
            self._place[last] = place
        self._heap.discard(model_id)
        self._oldest.discard(model_id)
        self._known[model_id].use = None
        self._evicted[model_id] = None
        while len(self._evicted) > self._remembered_max:
            oldest = next(iter(self._evicted))
            del self._evicted[oldest]
            for rival in self._rivals:
                rival.forget(oldest, self._known[oldest].size_bytes)
            del self._known[oldest]

    def first(self, may_go: Callable[[str], bool], count: int = 1) -> list[str]:
        return self._heap.first(may_go, count)

    def outranks(self, newcomer: Newcomer, model_id: str) -> bool:
        here = self._known[model_id]
        score = self._seen_score(model_id)
        past = self._known.get(newcomer.model_id)
        coming = Known(self._clock)
        if past is not None:
            coming.counts, coming.at = list(past.counts), past.at
            coming.load_ms = past.load_ms
            coming.age_to(self._clock)
        elif not newcomer.uses_per_s or not self._pace_turns:
            # Nothing is known but when it was used, or there is nothing to measure it by yet.
            return newcomer.last_used_at_ms > (here.use.last_used_at_ms if here.use else 0)
        self._bring_past(coming, newcomer.uses_per_s)
        coming.size_bytes = max(1, newcomer.size_bytes)
        load_ms = coming.load_ms if past is not None else here.load_ms
        coming.weight = log2(load_ms / coming.size_bytes)
        return coming.score(self._chief) > score

    def worth(self, model_id: str, now_ms: int) -> float:
        """log2 of the milliseconds of loading saved a second and MiB, as the half-life in charge
        sees it, plus ``WORTH_OFFSET``."""
        self._look(model_id)
        model = self._known[model_id]
        half_life = HALF_LIVES[self._chief]
        count = model.counts[self._chief] * exp2((model.at - self._clock) / half_life)
        turn_s = self._turn_ms() / 1_000.0
        uses_per_s = max(count, UNUSED) * _LN2 / half_life / turn_s
        saved = uses_per_s * model.load_ms / (model.size_bytes / _MIB)
        return max(UNUSED, WORTH_OFFSET + log2(saved))

    def oldest_use_at_ms(self) -> int:
        oldest = self._oldest.first(lambda _: True)
        return int(self._last_used_at_ms(oldest[0])) if oldest else 0

    # ---- seeing uses ----

    def _look(self, model_id: str) -> None:
        model = self._known[model_id]
        assert model.use is not None
        uses = model.use.uses - model.seen
        if uses > 0:
            model.seen += uses
            self._used(model_id, model, uses)

    def _used(self, model_id: str, model: Known, uses: int) -> None:
        amount = log2(1.0 + uses)
        self._clock += amount / max(TURNOVER_MIN, len(self._ring))
        model.age_to(self._clock)
        counts = model.counts
        for number in range(len(counts)):
            counts[number] += amount
        for rival in self._rivals:
            rival.used(model_id, model, self._known)

    def _seen_score(self, model_id: str) -> float:
        self._look(model_id)
        return self._known[model_id].score(self._chief)

    def _last_used_at_ms(self, model_id: str) -> float:
        use = self._known[model_id].use
        return use.last_used_at_ms if use is not None else 0

    # ---- terms of a model ----

    def _measure(self, model_id: str, model: Known, newcomer: Newcomer) -> None:
        was_bytes = model.size_bytes
        model.size_bytes = max(1, newcomer.size_bytes)
        model.load_ms = max(LOAD_MIN_MS, newcomer.load_ms)
        model.weight = log2(model.load_ms / model.size_bytes)
        for rival in self._rivals:
            rival.measured(model_id, model.size_bytes - was_bytes, self._known)

    def _bring_past(self, model: Known, uses_per_s: float) -> None:
        """What others saw of it: as if it had been looked at here all the time."""
        model.age_to(self._clock)
        if uses_per_s <= 0.0 or not self._pace_turns:
            return
        seen_per_turn = min(float(LOOKS), uses_per_s * self._turn_ms() / 1_000.0)
        for number, half_life in enumerate(HALF_LIVES):
            model.counts[number] = max(model.counts[number], seen_per_turn * half_life / _LN2)

    # ---- who is in charge, and how fast the clock goes ----

    def _judge(self) -> None:
        forget = exp2((self._judged_at - self._clock) / JUDGED_OVER)
        self._judged_at = self._clock
        for rival in self._rivals:
            rival.cost_ms *= forget
        best = min(self._rivals, key=lambda rival: rival.cost_ms)
        if best.cost_ms < self._rivals[self._chief].cost_ms * (1.0 - MARGIN):
            self._chief = best.number
            self._heap.rebuild()

    def _pace(self, now_ms: int) -> None:
        was_ms, was_clock = self._paced_at
        self._paced_at = (now_ms, self._clock)
        if not was_ms:
            return
        turns = self._clock - was_clock
        forget = exp2(-turns / JUDGED_OVER)
        self._pace_ms = self._pace_ms * forget + max(0, now_ms - was_ms)
        self._pace_turns = self._pace_turns * forget + turns

    def _turn_ms(self) -> float:
        """A turnover's length; an hour before anything is known."""
        if not self._pace_turns or not self._pace_ms:
            return 3_600_000.0
        return self._pace_ms / self._pace_turns
