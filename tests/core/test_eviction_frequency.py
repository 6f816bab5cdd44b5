"""What the frequency order keeps: checked against sums, sorts and small streams."""

from __future__ import annotations

import random
from math import log2

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.core.eviction import Newcomer
from mesh.core.eviction_frequency import HALF_LIVES, FrequencyOrder
from mesh.core.usage import Use

KEYS = [f"m{i}" for i in range(8)]
CAPACITY = 100
NOW_MS = 1_700_000_000_000


class Bench:
    """An order and a cache of models of one size that obeys it."""

    def __init__(self, room: int = 10, remembered: int = 1_000) -> None:
        self.order = FrequencyOrder(room, remembered)
        self.room = room
        self.uses: dict[str, Use] = {}
        self.now_ms = NOW_MS
        self.hits = self.requests = 0

    def ask(self, name: str, load_ms: int = 100) -> None:
        self.now_ms += 10
        self.requests += 1
        if name in self.uses:
            self.hits += 1
        else:
            while len(self.uses) >= self.room:
                self.leave(self.first())
            self.add(name, load_ms)
        self.uses[name].uses += 1
        self.uses[name].last_used_at_ms = self.now_ms

    def leave(self, name: str) -> None:
        self.order.discard(name)
        del self.uses[name]

    def add(self, name: str, load_ms: int = 100, size: int = 1, **fields: object) -> None:
        use = self.uses[name] = Use(self.now_ms)
        newcomer = Newcomer(name, size, load_ms, self.now_ms, **fields)  # type: ignore[arg-type]
        self.order.add(newcomer, use, self.now_ms)

    def first(self) -> str:
        return self.order.first(lambda _: True)[0]


def test_what_is_used_often_stays_and_what_came_once_goes() -> None:
    bench = Bench(room=3)
    for name in ("often", "once"):
        bench.ask(name)
    for _ in range(5):
        bench.ask("often")
    bench.ask("new")
    assert bench.first() == "once"


def test_a_model_that_comes_back_has_its_past() -> None:
    bench = Bench()
    for _ in range(6):
        bench.ask("often")
        bench.first()
    bench.leave("often")
    bench.ask("often")
    bench.ask("new")
    assert bench.first() == "new"


def test_of_two_that_are_used_alike_the_one_that_loads_faster_goes() -> None:
    bench = Bench()
    bench.add("fast", load_ms=100)
    bench.add("slow", load_ms=10_000)
    bench.add("fast-too", load_ms=100)
    assert bench.first() == "fast"
    bench.order.discard("fast")
    assert bench.first() == "fast-too"


def test_of_two_that_are_used_alike_the_larger_goes() -> None:
    bench = Bench(room=1_000)
    bench.add("small", size=1)
    bench.add("large", size=500)
    assert bench.first() == "large"


def test_loads_that_nobody_notices_are_all_alike() -> None:
    bench = Bench()
    bench.add("first", load_ms=3)
    bench.add("second", load_ms=1)
    assert bench.first() == "first"


def test_a_copy_that_nobody_asked_for_goes_first() -> None:
    bench = Bench()
    bench.ask("asked")
    bench.add("ahead", asked_for=False)
    bench.ask("asked-too")
    assert bench.first() == "ahead"


def test_a_thousand_uses_between_two_looks_are_ten_not_a_thousand() -> None:
    bench = Bench()
    bench.ask("m")
    bench.uses["m"].uses += 1_023
    assert sum(bench.order._known["m"].counts) == 3
    bench.first()
    assert sum(bench.order._known["m"].counts) == pytest.approx(3 * 11, rel=0.2)


def test_what_others_saw_of_a_model_counts() -> None:
    bench = Bench()
    for number in range(8):
        bench.ask(f"m{number}")
    bench.add("unknown")
    bench.add("known", uses_per_s=50.0)
    for number in range(8):
        bench.order.discard(f"m{number}")
    assert bench.first() == "unknown"


@pytest.mark.parametrize(
    ("sentence", "newcomer", "outranks"),
    [
        ("used elsewhere more", Newcomer("n", 1, uses_per_s=50.0), True),
        ("used elsewhere less", Newcomer("n", 1, uses_per_s=1e-6), False),
        ("used there more, but too large", Newcomer("n", 10_000, uses_per_s=50.0), False),
        ("nothing known, used later", Newcomer("n", 1, last_used_at_ms=NOW_MS * 2), True),
        ("nothing known, used earlier", Newcomer("n", 1, last_used_at_ms=NOW_MS), False),
        ("nothing known at all", Newcomer("n", 1), False),
        ("its past here was better", Newcomer("gone", 1), True),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_who_outranks_a_copy(sentence: str, newcomer: Newcomer, outranks: bool) -> None:
    bench = Bench(room=5)
    for _ in range(10):
        bench.ask("gone")
        bench.order.first(lambda _: True)
    bench.leave("gone")
    bench.ask("m")
    bench.ask("m")
    assert bench.order.outranks(newcomer, "m") is outranks


def test_what_is_remembered_of_evicted_models_is_bounded() -> None:
    bench = Bench(room=4, remembered=20)
    for number in range(500):
        bench.ask(f"m{number}")
    assert len(bench.order._known) <= 4 + 20 + 1
    for rival in bench.order._rivals:
        assert set(rival.heap) <= set(bench.order._known)


# ---- the pace of forgetting ---------------------------------------------------------------------


def skewed(bench: Bench, rng: random.Random, requests: int, offset: int = 0) -> None:
    names = [f"s{offset + rank}" for rank in range(200)]
    weights = [1.0 / (rank + 1) ** 0.9 for rank in range(200)]
    for name in rng.choices(names, weights, k=requests):
        bench.ask(name)


def bursty(bench: Bench, rng: random.Random, bursts: int) -> None:
    """Twelve requests each, six models interleaved, then hardly ever again."""
    live: list[tuple[str, int]] = []
    for number in range(bursts):
        live.append((f"b{number}", 12))
        while len(live) > 5:
            at = rng.randrange(len(live))
            name, left = live[at]
            bench.ask(name)
            live[at] = (name, left - 1)
            if left == 1:
                live.pop(at)


def test_where_popularity_stays_it_forgets_slowly_and_hits_more_than_lru() -> None:
    bench = Bench(room=20)
    skewed(bench, random.Random(1), 20_000)
    assert bench.order.half_life_turnovers == HALF_LIVES[-1]
    assert bench.hits / bench.requests > 0.45  # LRU: 0.33


def test_where_it_moves_it_forgets_fast() -> None:
    bench = Bench(room=20)
    bursty(bench, random.Random(1), 1_500)
    assert bench.order.half_life_turnovers == HALF_LIVES[0]
    assert bench.hits / bench.requests > 0.9


def test_it_finds_its_way_back() -> None:
    rng = random.Random(1)
    bench = Bench(room=20)
    skewed(bench, rng, 5_000)
    bursty(bench, rng, 1_500)
    assert bench.order.half_life_turnovers == HALF_LIVES[0]
    skewed(bench, rng, 40_000)
    assert bench.order.half_life_turnovers > HALF_LIVES[0]


def test_the_request_rate_does_not_matter() -> None:
    slow, fast = Bench(room=20), Bench(room=20)
    for bench, step_ms in ((slow, 60_000), (fast, 0)):
        rng = random.Random(3)
        for _ in range(3_000):
            bench.now_ms += step_ms
            bench.ask(f"m{min(int(rng.paretovariate(0.7)), 500)}")
    assert slow.hits == fast.hits


# ---- against dumb ones --------------------------------------------------------------------------

STEPS = st.lists(
    st.tuples(
        st.sampled_from(["add", "add", "use", "use", "discard", "ask"]),
        st.sampled_from(KEYS),
        st.integers(1, 40),
    ),
    max_size=120,
)


@given(STEPS, st.sets(st.sampled_from(KEYS)))
def test_first_is_the_least_of_all_and_the_books_are_right(
    steps: list[tuple[str, str, int]], unwanted: set[str]
) -> None:
    order, uses = FrequencyOrder(CAPACITY, 4), {}
    now_ms = NOW_MS
    for action, key, amount in steps:
        now_ms += amount
        if action == "add" and key not in uses:
            uses[key] = Use(now_ms)
            asked_for = amount % 3 > 0
            newcomer = Newcomer(key, amount, amount * 10, now_ms, 0.0, asked_for)
            order.add(newcomer, uses[key], now_ms)
        elif action == "use" and key in uses:
            uses[key].uses += amount
            uses[key].last_used_at_ms = now_ms
        elif action == "discard":
            uses.pop(key, None)
            order.discard(key)
        elif action == "ask":
            found = order.first(lambda name: name not in unwanted)
            wanted = [name for name in uses if name not in unwanted]
            assert bool(found) == bool(wanted)
            scores = {name: order._known[name].score(order._chief) for name in wanted}
            assert all(scores[found[0]] <= scores[name] + 1e-9 for name in wanted)
            assert not found or order.worth(found[0], now_ms) > 0.0
        oldest = min((use.last_used_at_ms for use in uses.values()), default=0)
        assert order.oldest_use_at_ms() == oldest
        for rival in order._rivals:
            held = sum(order._known[name].size_bytes for name in rival.heap)
            assert rival.used_bytes == held
            assert held <= CAPACITY


@given(st.lists(st.tuples(st.sampled_from(KEYS), st.integers(0, 30)), min_size=1, max_size=80))
def test_scores_are_sums_of_aged_uses(steps: list[tuple[str, int]]) -> None:
    order, uses = FrequencyOrder(CAPACITY, 100), {}
    told: dict[str, list[tuple[float, float]]] = {}  # (clock, amount), by the dumb bookkeeper
    plain = order._used

    def used(model_id: str, model: object, count: int) -> None:
        plain(model_id, model, count)  # type: ignore[arg-type]
        told.setdefault(model_id, []).append((order._clock, log2(1 + count)))

    order._used = used  # type: ignore[method-assign]
    for key, amount in steps:
        if key in uses:
            uses[key].uses += amount
        else:
            uses[key] = Use(NOW_MS)
            order.add(Newcomer(key, 1, 100, NOW_MS), uses[key], NOW_MS)
        order.first(lambda _: True)
    for key in uses:
        known = order._known[key]
        for number, half_life in enumerate(HALF_LIVES):
            dumb = sum(n * 2.0 ** ((at - known.at) / half_life) for at, n in told[key])
            assert known.counts[number] == pytest.approx(dumb)
