"""Loading ahead of requests: a sentence a rule."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mesh.core.policy import Policy
from mesh.core.proactive import has_room, plan_proactive, recent_models
from mesh.core.types import InstanceRecord, LoadPriority, ModelRecord
from mesh.core.view import ClusterView
from tests.core.cluster import (
    DRAINING,
    LOADING,
    STARTING,
    Record,
    copy,
    failure,
    instance,
    model,
    view_of,
)

NOW = 1_000_000_000
POLICY = Policy(default_model_size_bytes=10)
HOUR = 3_600_000


def used(model_id: str = "m", ago_ms: int = 1_000, **fields: object) -> ModelRecord:
    return model(model_id, last_used_at_ms=NOW - ago_ms, **fields)


def roomy(instance_id: str, **fields: object) -> InstanceRecord:
    """A hundred bytes, 12 of which stay free; two load slots."""
    return instance(instance_id, **{"load_slots": 2, **fields})  # type: ignore[arg-type]


def loaded_ahead(
    *records: Record, under_way: tuple[str, ...] = (), policy: Policy = POLICY
) -> list[tuple[str, str]]:
    found = plan_proactive(view_of(*records), now_ms=NOW, policy=policy, under_way=under_way)
    assert all(o.priority is LoadPriority.PROACTIVE and not o.pin for o in found)
    assert all(o.reason == "recently_used" for o in found)
    return [(order.model_id, order.placement.instance_id) for order in found]


def test_the_most_recently_used_models_without_a_copy_are_loaded_into_free_memory() -> None:
    records = [used("old", 3_000), used("new", 1_000), used("newer", 500), used("here", 100)]
    found = loaded_ahead(*records, roomy("a"), roomy("b"), copy("here", "a"))
    assert [model_id for model_id, _ in found] == ["newer", "new"]  # one an instance at a time
    assert {instance_id for _, instance_id in found} == {"a", "b"}


@pytest.mark.parametrize(
    "record",
    [
        pytest.param(model(), id="one that was never used"),
        pytest.param(used(ago_ms=24 * HOUR + 1), id="one that was not used for a day"),
        pytest.param(used(idle_unload_ms=1_000), id="one that its idle unload has sent away"),
        pytest.param(used(model_type="sklearn"), id="one that no instance can run"),
        pytest.param(used(size_bytes_stated=89), id="one that does not fit into what may be used"),
    ],
)
def test_what_is_not_loaded_ahead(record: ModelRecord) -> None:
    assert loaded_ahead(record, roomy("a")) == []


def test_an_idle_unload_that_is_not_over_yet_does_not_hinder() -> None:
    assert loaded_ahead(used(idle_unload_ms=1_001), roomy("a")) == [("m", "a")]
    for_all = replace(POLICY, idle_unload_ms=1_000)
    assert loaded_ahead(used(), roomy("a"), policy=for_all) == []
    never = used(idle_unload_ms=0)
    assert loaded_ahead(never, roomy("a"), policy=for_all) == [("m", "a")]


def test_one_that_is_being_loaded_is_left_alone() -> None:
    view = view_of(used("claimed"), used("asked"), roomy("a"), roomy("b"), roomy("c"),
                   copy("claimed", "a", LOADING))  # fmt: skip
    view.add_pending("asked", "b", size_bytes=10, now_ms=NOW)
    assert plan_proactive(view, now_ms=NOW, policy=POLICY, under_way=()) == ()


def test_one_that_failed_lately_is_not_tried_ahead_of_requests() -> None:
    failed = failure("m", "b", failed_at_ms=NOW - 1, expires_at_ms=NOW + 1)
    assert loaded_ahead(used(), roomy("a"), failed) == []


@pytest.mark.parametrize(
    ("there", "expected"),
    [
        pytest.param(roomy("a", used_bytes=78), True, id="an eighth stays free beside the model"),
        pytest.param(roomy("a", used_bytes=79), False, id="an eighth would not stay free"),
        pytest.param(instance("a", DRAINING), False, id="an instance that leaves gets none"),
        pytest.param(instance("a", STARTING), False, id="nor one that starts"),
        pytest.param(roomy("a", loading_count=1), False, id="nor one whose slots are needed"),
        pytest.param(instance("a", load_slots=1), True, id="with one slot it may take that"),
        pytest.param(
            instance("a", load_slots=4, loading_count=2), True, id="with many one stays free"
        ),
    ],
)
def test_which_instances_are_given_any(there: InstanceRecord, expected: bool) -> None:
    assert bool(loaded_ahead(used(), there)) == expected
    assert loaded_ahead() == []


def test_nothing_is_ever_evicted_for_it() -> None:
    full = roomy("a", used_bytes=100, lru_at_ms=1)
    assert loaded_ahead(used(), full) == []


def test_so_many_are_under_way_in_the_whole_mesh() -> None:
    policy = replace(POLICY, proactive_loads_max=3)
    records = [used(f"m{n}", n) for n in range(9)] + [roomy(f"i{n}") for n in range(9)]
    assert len(loaded_ahead(*records, policy=policy)) == 3
    assert len(loaded_ahead(*records, under_way=("m0", "x"), policy=policy)) == 1
    assert loaded_ahead(*records, under_way=("m0", "x", "y"), policy=policy) == []
    assert loaded_ahead(*records, policy=replace(POLICY, proactive_loads_max=0)) == []


def test_models_that_fit_nowhere_do_not_hide_those_that_do() -> None:
    large = [used(f"large{n}", n, size_bytes_stated=90) for n in range(500)]
    foreign = [used(f"foreign{n}", n, model_type="sklearn") for n in range(500)]
    broken = [used(f"broken{n}", n) for n in range(20)]
    failures = [
        failure(m.model_id, "x", failed_at_ms=NOW - 1, expires_at_ms=NOW + 1) for m in broken
    ]
    found = loaded_ahead(*large, *foreign, *broken, *failures, used("fits", 9_999), roomy("a"))
    assert found == [("fits", "a")]


def test_a_ranking_from_a_moment_ago_serves_while_the_view_moves_on() -> None:
    view = view_of(*(used(f"m{n}", n) for n in range(4)), roomy("a"))
    ranked = recent_models(view, now_ms=NOW, policy=POLICY)
    assert ranked == ("m0", "m1", "m2", "m3")
    view.put_copy(copy("m0", "a"))
    view.delete_model("m1")
    (order,) = plan_proactive(view, now_ms=NOW, policy=POLICY, under_way=("m2",), ranked=ranked)
    assert order.model_id == "m3"


def test_the_ranking_is_as_sorting_all_of_them_would_give() -> None:
    ages = [(n * 7_919) % 1_009 for n in range(400)]
    view = view_of(*(used(f"m{n:03}", age) for n, age in enumerate(ages)), roomy("a"))
    ranked = recent_models(view, now_ms=NOW, policy=POLICY, count=25, passed_over={"m000"})
    youngest = sorted((age, n) for n, age in enumerate(ages) if n)[:25]
    assert [ages[int(model_id[1:])] for model_id in ranked] == [age for age, _ in youngest]
    assert "m000" not in ranked


def test_whether_there_is_room_is_known_without_looking_at_models() -> None:
    assert has_room(view_of(roomy("a")), POLICY)
    assert not has_room(view_of(roomy("a", used_bytes=88)), POLICY)


def test_nothing_is_loaded_ahead_before_the_view_has_synced() -> None:
    view = ClusterView()
    view.put_instance(roomy("a"))
    view.put_model(used())
    assert plan_proactive(view, now_ms=NOW, policy=POLICY, under_way=()) == ()
    assert not has_room(view, POLICY)


def test_who_does_it_in_slices_is_given_so_many_at_once() -> None:
    view = view_of(*(used(f"m{n}", n) for n in range(9)), *(roomy(f"i{n}") for n in range(9)))
    found = plan_proactive(view, now_ms=NOW, policy=POLICY, under_way=(), most=2)
    assert [order.model_id for order in found] == ["m0", "m1"]
