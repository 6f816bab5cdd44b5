"""Each order answers as a dumb one does that sorts everything."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from mesh.core.eviction import Newcomer
from mesh.core.eviction_heap import LazyHeap
from mesh.core.eviction_lru import LruOrder
from mesh.core.usage import Use

KEYS = [f"m{i}" for i in range(8)]
STEPS = st.lists(
    st.tuples(st.sampled_from(["add", "use", "discard", "ask"]), st.sampled_from(KEYS)),
    max_size=200,
)


@given(STEPS, st.integers(1, 4), st.sets(st.sampled_from(KEYS)))
def test_lru_is_what_a_sort_says(
    steps: list[tuple[str, str]], count: int, unwanted: set[str]
) -> None:
    fast, dumb = LruOrder(), {}
    sequence = 0
    for now, (action, key) in enumerate(steps):
        if action == "add" and key not in dumb:
            sequence += 1
            dumb[key] = (Use(now // 3), sequence)
            fast.add(Newcomer(key, 1), dumb[key][0], now)
        elif action == "use" and key in dumb:
            dumb[key][0].last_used_at_ms = now // 3
        elif action == "discard":
            dumb.pop(key, None)
            fast.discard(key)
        elif action == "ask":
            order = sorted(
                (name for name in dumb if name not in unwanted),
                key=lambda name: (dumb[name][0].last_used_at_ms, dumb[name][1]),
            )
            assert fast.first(lambda name: name not in unwanted, count) == order[:count]
            oldest = min((use.last_used_at_ms for use, _ in dumb.values()), default=0)
            assert fast.oldest_use_at_ms() == oldest


def test_thousands_of_discards_leave_no_rubbish_behind() -> None:
    values: dict[str, float] = {}
    heap = LazyHeap(values.__getitem__)
    for i in range(10_000):
        values[f"m{i}"] = i
        heap.add(f"m{i}")
        heap.discard(f"m{i}")
    assert len(heap._heap) < 200
    assert heap.pop() is None
