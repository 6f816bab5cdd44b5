"""The lazy heap answers as a dumb sort does."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from mesh.core.cache_lru import LazyLru, Use

KEYS = [f"m{i}" for i in range(8)]
STEPS = st.lists(
    st.tuples(st.sampled_from(["add", "use", "discard", "ask"]), st.sampled_from(KEYS)),
    max_size=200,
)


@given(STEPS, st.integers(1, 4), st.sets(st.sampled_from(KEYS)))
def test_oldest_is_what_a_sort_says(
    steps: list[tuple[str, str]], count: int, unwanted: set[str]
) -> None:
    fast, dumb = LazyLru(), {}
    sequence = 0
    for now, (action, key) in enumerate(steps):
        if action == "add" and key not in dumb:
            sequence += 1
            dumb[key] = (Use(now // 3), sequence)
            fast.add(key, dumb[key][0])
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
            assert fast.oldest(lambda name: name not in unwanted, count) == order[:count]
    assert len(fast) == len(dumb)


def test_thousands_of_discards_leave_no_rubbish_behind() -> None:
    lru = LazyLru()
    for i in range(10_000):
        lru.add(f"m{i}", Use(i))
        lru.discard(f"m{i}")
    assert len(lru._heap) < 200
    assert lru.oldest_use_at_ms() == 0
