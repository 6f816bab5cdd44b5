"""Which copy answers."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.core.routing import COMPARE_ALL_MAX, Route, route

ids = st.lists(st.sampled_from("abcdefghijkl"), unique=True, max_size=12)
loads = st.dictionaries(st.sampled_from("abcdefghijkl"), st.integers(0, 5))
draws = st.floats(0, 1, exclude_max=True)


@pytest.mark.parametrize(
    ("candidates", "inflight", "exclude", "expected"),
    [
        pytest.param("", {}, "", None, id="no copy is no route"),
        pytest.param("a", {}, "a", None, id="an excluded only copy is no route"),
        pytest.param("a", {"a": 9}, "", Route("a", "only_copy"), id="an only copy takes it all"),
        pytest.param(
            "ab", {"a": 2, "b": 1}, "", Route("b", "least_inflight", "a"), id="fewest in flight"
        ),
        pytest.param("ab", {"a": 2, "b": 1}, "b", Route("a", "only_copy"), id="but never excluded"),
        pytest.param(
            "abc", {"a": 1, "b": 1}, "", Route("c", "least_inflight", "a"), id="absent is nothing"
        ),
    ],
)
def test_route(
    candidates: str, inflight: dict[str, int], exclude: str, expected: Route | None
) -> None:
    assert route(list(candidates), inflight, draw=0.0, exclude=set(exclude)) == expected


@given(ids, loads, draws, st.sets(st.sampled_from("abcdefghijkl")), st.randoms())
def test_excluded_is_never_chosen_and_order_never_matters(
    candidates: list[str],
    inflight: dict[str, int],
    draw: float,
    exclude: set[str],
    shuffler: object,
) -> None:
    chosen = route(candidates, inflight, draw=draw, exclude=exclude)
    left = set(candidates) - exclude
    assert (chosen is None) == (not left)
    if chosen is None:
        return
    assert chosen.instance_id in left
    assert chosen.runner_up in (left - {chosen.instance_id}) | {None}
    assert (chosen.runner_up is None) == (len(left) == 1)
    shuffler.shuffle(candidates)  # type: ignore[attr-defined]
    assert route(candidates, inflight, draw=draw, exclude=exclude) == chosen


@given(ids, loads, draws)
def test_never_busier_than_what_came_second(
    candidates: list[str], inflight: dict[str, int], draw: float
) -> None:
    chosen = route(candidates, inflight, draw=draw)
    if chosen is not None and chosen.runner_up is not None:
        assert inflight.get(chosen.instance_id, 0) <= inflight.get(chosen.runner_up, 0)
    if chosen is not None and len(candidates) <= COMPARE_ALL_MAX:
        fewest = min(inflight.get(c, 0) for c in candidates)
        assert inflight.get(chosen.instance_id, 0) == fewest


@pytest.mark.parametrize("count", [2, 3, 4, 5, 12])
def test_idle_copies_share_the_requests_evenly(count: int) -> None:
    candidates = [f"i{n:02}" for n in range(count)]
    trials = 100 * count
    chosen = Counter(
        found.instance_id
        for n in range(trials)
        if (found := route(candidates, {}, draw=n / trials)) is not None
    )
    assert set(chosen.values()) == {100}


def test_two_choices_compare_different_copies_over_all_draws() -> None:
    candidates = [f"i{n}" for n in range(6)]
    pairs = set()
    for n in range(6_000):
        found = route(candidates, {}, draw=n / 6_000)
        assert found is not None and found.runner_up is not None
        pairs.add((found.instance_id, found.runner_up))
    assert len(pairs) == 6 * 5
