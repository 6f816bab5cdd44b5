"""Where a model is loaded: one row a sentence."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mesh.core.errors import Code, LoadFailed
from mesh.core.placement import NoPlacement, Placement, candidates, place, predict_size_bytes
from mesh.core.policy import Policy
from tests.core.cluster import (
    DRAINING,
    LOADING,
    NOW,
    POLICY,
    STARTING,
    Record,
    copy,
    failure,
    instance,
    model,
    view_of,
)

M = model(size_bytes_stated=20)


def placed(*records: Record, exclude: str = "") -> Placement | NoPlacement:
    return place(view_of(M, *records), M, now_ms=NOW, policy=POLICY, exclude=set(exclude))


@pytest.mark.parametrize(
    ("records", "chosen", "reason", "runner_up"),
    [
        pytest.param([instance("a")], "a", "only_candidate", None, id="the only one"),
        pytest.param(
            [instance("a", used_bytes=90), instance("b", used_bytes=79, lru_at_ms=1)],
            "b",
            "not_full",
            "a",
            id="one with room goes before one without",
        ),
        pytest.param(
            [instance("a", used_bytes=40), instance("b", used_bytes=41)],
            "a",
            "most_free",
            "b",
            id="most free bytes",
        ),
        pytest.param(
            [instance("a"), instance("b", capacity=200, used_bytes=50)],
            "b",
            "most_free",
            "a",
            id="free bytes are bytes and not a share",
        ),
        pytest.param(
            [instance("a"), copy("x", "a", size=60), instance("b", used_bytes=50)],
            "b",
            "most_free",
            "a",
            id="copies count where the advert lags",
        ),
        pytest.param(
            [instance("a", loading_count=2), instance("b", loading_count=1)],
            "b",
            "fewest_loads",
            "a",
            id="equally free: fewest loads",
        ),
        pytest.param(
            [
                instance("a", used_bytes=100, lru_at_ms=NOW - 9),
                instance("b", used_bytes=100, lru_at_ms=NOW - 5),
                instance("c", used_bytes=100, lru_at_ms=NOW - 7),
            ],
            "a",
            "oldest_lru",
            "c",
            id="all full: the one whose eviction costs least",
        ),
        pytest.param(
            [
                instance("a", used_bytes=100, lru_at_ms=NOW - 9, loading_count=1),
                instance("b", used_bytes=100, lru_at_ms=NOW - 5),
            ],
            "b",
            "slots_free",
            "a",
            id="all full: an idle load slot goes before an older LRU",
        ),
        pytest.param(
            [
                instance("a", used_bytes=100, lru_at_ms=0, load_slots=9),
                instance("b", used_bytes=100, lru_at_ms=NOW - 1, load_slots=9),
            ],
            "b",
            "oldest_lru",
            "a",
            id="all full: where nothing can be evicted comes last",
        ),
        pytest.param(
            [instance("a", STARTING), instance("b", DRAINING), instance("c", used_bytes=99)],
            "c",
            "only_candidate",
            None,
            id="starting and draining instances are never chosen",
        ),
        pytest.param(
            [instance("a", model_types=("sklearn",)), instance("b", used_bytes=99)],
            "b",
            "only_candidate",
            None,
            id="nor one that cannot run the format",
        ),
        pytest.param(
            [instance("a", capacity=19), instance("b", capacity=20, used_bytes=20)],
            "b",
            "only_candidate",
            None,
            id="nor one that is too small even when empty",
        ),
        pytest.param(
            [instance("a"), instance("b", used_bytes=99), copy("m", "a", LOADING)],
            "b",
            "only_candidate",
            None,
            id="nor one that has a copy",
        ),
        pytest.param(
            [instance("a"), instance("b", used_bytes=99), failure("m", "a")],
            "b",
            "only_candidate",
            None,
            id="nor one where it failed lately",
        ),
        pytest.param(
            [instance("a"), instance("b", used_bytes=99), failure("m", "a", expires_at_ms=NOW)],
            "a",
            "not_full",
            "b",
            id="an expired failure is no obstacle",
        ),
        pytest.param(
            [instance("a"), instance("b", used_bytes=99), failure("other", "a")],
            "a",
            "not_full",
            "b",
            id="nor is another model's failure",
        ),
    ],
)
def test_place(records: list[Record], chosen: str, reason: str, runner_up: str | None) -> None:
    found = placed(*records)
    assert isinstance(found, Placement), found
    assert (found.instance_id, found.reason, found.runner_up) == (chosen, reason, runner_up)
    assert chosen in found.detail and reason in found.detail
    assert found.size_bytes == 20


@pytest.mark.parametrize(
    ("records", "exclude", "reason", "code", "said"),
    [
        pytest.param([], "", "no_instances", Code.UNAVAILABLE, "no serving", id="no instance"),
        pytest.param(
            [instance("a", STARTING, model_types=()), instance("b", model_types=("sklearn",))],
            "",
            "instances_starting",
            Code.UNAVAILABLE,
            "1 instance(s) are still starting",
            id="what starts may be what is missing",
        ),
        pytest.param(
            [instance("a", model_types=("sklearn", "xgboost"))],
            "",
            "no_runtime",
            Code.FAILED_PRECONDITION,
            "the format 'onnx'; formats that instances run: sklearn, xgboost",
            id="no runtime: final, with the formats that there are",
        ),
        pytest.param(
            [instance("a", capacity=19), instance("b", capacity=12), instance("c", model_types=())],
            "",
            "too_large",
            Code.FAILED_PRECONDITION,
            "its size of 20 bytes is more than the capacity of any instance (the largest that "
            "runs 'onnx' has 19 bytes)",
            id="larger than every pod: final, with both sizes",
        ),
        pytest.param(
            [instance("a", DRAINING)],
            "",
            "draining",
            Code.UNAVAILABLE,
            "draining",
            id="all that could are draining",
        ),
        pytest.param(
            [instance("a"), instance("b")],
            "ab",
            "all_excluded",
            Code.UNAVAILABLE,
            "2 excluded",
            id="all were tried",
        ),
        pytest.param(
            [instance("a"), instance("b"), failure("m", "a", message="disk on fire")],
            "b",
            "all_excluded",
            Code.UNAVAILABLE,
            "disk on fire",
            id="one failed and one was tried: retryable, with the cause",
        ),
        pytest.param(
            [instance("a"), failure("m", "a", message="bad magic")],
            "",
            "load_failed",
            Code.FAILED_PRECONDITION,
            "failed to load on a: bad magic",
            id="it failed wherever it could go",
        ),
        pytest.param(
            [
                instance("a"),
                failure("m", "gone1", message="older", failed_at_ms=NOW - 9),
                failure("m", "gone2", "UNAVAILABLE", message="newest", failed_at_ms=NOW - 1),
                failure("m", "gone3", message="old", failed_at_ms=NOW - 5),
            ],
            "",
            "load_failed",
            Code.UNAVAILABLE,
            "gone2: newest",
            id="enough failures are final though an instance is left: the last cause and code",
        ),
    ],
)
def test_nowhere(records: list[Record], exclude: str, reason: str, code: Code, said: str) -> None:
    found = placed(*records, exclude=exclude)
    assert isinstance(found, NoPlacement), found
    assert (found.reason, found.code) == (reason, code)
    assert said in found.detail and "'m'" in found.detail
    assert found.retryable == (code is Code.UNAVAILABLE)
    error = found.error()
    assert (error.code, error.message) == (code, found.detail)
    assert isinstance(error, LoadFailed) == (reason == "load_failed")


def test_a_transient_failure_says_when_to_come_back() -> None:
    found = placed(instance("a"), failure("m", "a", "UNAVAILABLE", expires_at_ms=NOW + 5_000))
    assert isinstance(found, NoPlacement)
    assert found.retry_after_ms == 5_000


def test_a_failure_code_that_this_version_does_not_know_is_final() -> None:
    found = placed(instance("a"), failure("m", "a", "FROM_THE_FUTURE"))
    assert isinstance(found, NoPlacement)
    assert found.code is Code.FAILED_PRECONDITION


def test_the_size_is_measured_else_stated_else_the_default() -> None:
    policy = Policy(default_model_size_bytes=7)
    measured = model(size_bytes_measured=3, size_bytes_stated=5)
    assert predict_size_bytes(measured, policy) == 3
    assert predict_size_bytes(replace(measured, size_bytes_measured=None), policy) == 5
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
