"""Where a model is loaded: sizes, bursts, ties, and what `mesh explain` shows."""

from __future__ import annotations

from dataclasses import replace

from mesh.core.errors import Code
from mesh.core.placement import NoPlacement, Placement, candidates, place, predict_size_bytes
from mesh.core.policy import Policy
from tests.core.cluster import (
    DRAINING,
    NOW,
    POLICY,
    Record,
    failure,
    instance,
    model,
    view_of,
)

M = model(size_bytes_stated=20)


def placed(*records: Record) -> Placement | NoPlacement:
    return place(view_of(M, *records), M, now_ms=NOW, policy=POLICY)


def test_a_transient_failure_says_when_to_come_back() -> None:
    found = placed(instance("a"), failure("m", "a", "UNAVAILABLE", expires_at_ms=NOW + 5_000))
    assert isinstance(found, NoPlacement)
    assert found.retry_after_ms == 5_000


def test_a_failure_code_that_this_version_does_not_know_is_final() -> None:
    found = placed(instance("a"), failure("m", "a", "FROM_THE_FUTURE"))
    assert isinstance(found, NoPlacement)
    assert found.code is Code.FAILED_PRECONDITION


def test_the_size_is_what_an_instance_reserves_stated_else_measured_else_the_default() -> None:
    policy = Policy(default_model_size_bytes=7)
    both = model(size_bytes_measured=3, size_bytes_stated=5)
    assert predict_size_bytes(both, policy) == 5
    assert predict_size_bytes(replace(both, size_bytes_stated=None), policy) == 3
    assert predict_size_bytes(model(), policy) == 7


def test_a_burst_of_misses_spreads_because_pending_loads_count() -> None:
    view = view_of(*(instance(i) for i in "abcd"))
    landed: dict[str, int] = dict.fromkeys("abcd", 0)
    for n in range(20):
        one = model(f"m{n}")
        found = place(view, one, now_ms=NOW, policy=POLICY)
        assert isinstance(found, Placement)
        landed[found.instance_id] += 1
        view.add_pending(one.model_id, found.instance_id, size_bytes=found.size_bytes, now_ms=NOW)
    assert set(landed.values()) == {5}


def test_a_burst_on_full_instances_spreads_over_their_load_slots() -> None:
    """ModelMesh sent such waves to the one pod whose stale advert said "oldest"."""
    view = view_of(*(instance(i, used_bytes=100, lru_at_ms=n + 1) for n, i in enumerate("abcd")))
    landed: dict[str, int] = dict.fromkeys("abcd", 0)
    for n in range(20):
        one = model(f"m{n}")
        found = place(view, one, now_ms=NOW, policy=POLICY)
        assert isinstance(found, Placement) and found.full
        landed[found.instance_id] += 1
        view.add_pending(one.model_id, found.instance_id, size_bytes=10, now_ms=NOW)
    assert set(landed.values()) == {5}


def test_ties_fall_differently_for_different_models() -> None:
    view = view_of(*(instance(i) for i in "abcd"))
    chosen = set()
    for n in range(64):
        found = place(view, model(f"m{n}"), now_ms=NOW, policy=POLICY)
        assert isinstance(found, Placement)
        assert found.reason == "tie_hash"
        chosen.add(found.instance_id)
    assert chosen == set("abcd")


def test_candidates_are_all_instances_best_first_with_what_speaks_against_them() -> None:
    view = view_of(
        M,
        instance("small", capacity=5),
        instance("busy", used_bytes=50),
        instance("free"),
        instance("drains", DRAINING),
    )
    found = candidates(view, M, now_ms=NOW, policy=POLICY)
    assert [(c.instance_id, c.refusal) for c in found[:2]] == [("free", None), ("busy", None)]
    assert {(c.instance_id, c.refusal) for c in found[2:]} == {
        ("small", "too_small"),
        ("drains", "draining"),
    }
