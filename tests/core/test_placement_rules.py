"""Who can hold a model, and who takes it by room, queues and what would be evicted: one row a
sentence. Labels, replica sets, zones and the like are in ``test_placement_preference.py``, what
holds for all of them in ``test_placement_properties.py``."""

from __future__ import annotations

import pytest

from mesh.core.errors import Code, LoadFailed
from mesh.core.placement import NoPlacement, Placement, place
from mesh.core.types import InstanceRecord
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


def full(instance_id: str, *, lru_age_ms: int | None = 60_000, **fields: object) -> InstanceRecord:
    lru_at_ms = 0 if lru_age_ms is None else NOW - lru_age_ms
    return instance(instance_id, **{"used_bytes": 100, "lru_at_ms": lru_at_ms, **fields})


@pytest.mark.parametrize(
    ("records", "chosen", "reason", "runner_up"),
    [
        pytest.param([instance("a")], "a", "only_candidate", None, id="the only one"),
        pytest.param(
            [instance("a", used_bytes=90), instance("b", used_bytes=69, lru_at_ms=1)],
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
            [
                instance("a", loading_count=2, load_slots=2),
                instance("b", loading_count=1, load_slots=2),
            ],
            "b",
            "slots_free",
            "a",
            id="about equally free: an idle load slot goes before a queue",
        ),
        pytest.param(
            [
                instance("a", loading_count=2, load_slots=4),
                instance("b", loading_count=1, load_slots=4),
            ],
            "b",
            "fewest_loads",
            "a",
            id="equally free, slots idle: fewest loads",
        ),
        pytest.param(
            [instance("a", loading_count=1), instance("b", used_bytes=30)],
            "b",
            "slots_free",
            "a",
            id="an idle load slot goes before much more free memory",
        ),
        pytest.param(
            [
                instance("a", loading_count=1),
                instance("b", used_bytes=100, lru_at_ms=NOW - 5),
            ],
            "b",
            "slots_free",
            "a",
            id="a full one with an idle slot goes before an empty one with a queue",
        ),
        pytest.param(
            [
                instance("a", loading_count=1),
                instance("b", used_bytes=100, lru_at_ms=NOW - 5, loading_count=1),
            ],
            "a",
            "not_full",
            "b",
            id="as long a queue everywhere: one with room goes before one without",
        ),
        pytest.param(
            [
                instance("a", used_bytes=100, lru_at_ms=NOW - 90_000),
                instance("b", used_bytes=100, lru_at_ms=NOW - 50_000),
                instance("c", used_bytes=100, lru_at_ms=NOW - 70_000),
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
            [
                instance("a", used_bytes=79, lru_at_ms=NOW - 5),
                instance("b", used_bytes=100, lru_at_ms=NOW - 90_000),
            ],
            "b",
            "oldest_lru",
            "a",
            id="what an instance keeps free for the next load is no room",
        ),
        pytest.param(
            [
                full("a", victim_score=277.0, loading_count=1, load_slots=2),
                full("b", victim_score=279.0, load_slots=2),
            ],
            "b",
            "fewest_loads",
            "a",
            id="all full: who would lose a little less does not get every load",
        ),
        pytest.param(
            [
                full("a", victim_score=290.0),
                full("b", victim_score=270.0),
                full("c", victim_score=280.0),
            ],
            "b",
            "cheapest_victim",
            "c",
            id="all full: the least worth that would go, where all tell it",
        ),
        pytest.param(
            [
                full("a", lru_age_ms=50_000, victim_score=1.0),
                full("b", lru_age_ms=90_000),
            ],
            "b",
            "oldest_lru",
            "a",
            id="all full: by age where one is of a version that does not tell the worth",
        ),
        pytest.param(
            [
                full("a", victim_score=0.0, lru_age_ms=None, load_slots=9),
                full("b", victim_score=279.0, load_slots=9),
                full("c", victim_score=279.0, load_slots=9, loading_count=3),
            ],
            "b",
            "fewest_loads",
            "c",
            id="all full: equally cheap: fewest loads",
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
            [instance("a", STARTING), instance("b", capacity=5)],
            "",
            "instances_starting",
            Code.UNAVAILABLE,
            "1 instance(s) are still starting",
            id="what starts may be larger than what is there",
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
