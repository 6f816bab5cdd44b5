"""The leader's sweep."""

from __future__ import annotations

from dataclasses import replace

from mesh.core.repair import RepairPlan, plan_repair
from mesh.core.view import ClusterView
from tests.core.cluster import (
    NOW,
    POLICY,
    Record,
    copy,
    failure,
    instance,
    model,
    view_of,
    vmodel,
)


def swept(*records: Record) -> RepairPlan:
    return plan_repair(view_of(*records), now_ms=NOW, policy=POLICY)


def test_a_healthy_cluster_needs_nothing() -> None:
    assert swept(model(), instance("a"), copy("m", "a"), failure("m", "b")) == RepairPlan()


def test_expired_failures_and_those_of_unregistered_models_go() -> None:
    plan = swept(
        model(), failure("m", "a", expires_at_ms=NOW), failure("m", "b"), failure("gone", "c")
    )
    assert sorted(plan.delete_failures) == [("gone", "c"), ("m", "a")]


def test_copies_of_unregistered_models_are_unloaded() -> None:
    plan = swept(model(), instance("a"), copy("m", "a"), copy("gone", "a"))
    assert plan.unload == (("gone", "a"),)


def test_an_auto_delete_model_without_an_alias_goes_after_its_grace() -> None:
    created = NOW - POLICY.orphan_grace_ms
    plan = swept(
        model("orphan", auto_delete=True, created_at_ms=created),
        model("young", auto_delete=True, created_at_ms=created + 1),
        model("named", auto_delete=True),
        model("target", auto_delete=True),
        model("plain"),
        vmodel("v", "named", "target"),
    )
    assert plan.delete_models == ("orphan",)


def test_blobs_of_last_uses_go_when_they_and_their_instances_are_past() -> None:
    view = view_of(model(), instance("here"))
    policy = replace(POLICY, last_used_keep_ms=100)
    past = NOW - 100
    for instance_id, blob in (
        ("here", {"m": past}),
        ("gone", {"m": past, "n": past - 1}),
        ("empty", {}),
        ("lately", {"m": past - 1, "n": past + 1}),
    ):
        view.put_last_used(instance_id, blob)
    plan = plan_repair(view, now_ms=NOW, policy=policy)
    assert sorted(plan.delete_last_used) == ["empty", "gone"]
    view.delete_last_used("gone")
    view.delete_instance("here")
    plan = plan_repair(view, now_ms=NOW, policy=policy)
    assert sorted(plan.delete_last_used) == ["empty", "here"]
    assert view.last_used_at_ms("m") == past  # what they told is kept


def test_every_list_is_bounded() -> None:
    policy = replace(POLICY, repair_batch_max=3, repair_loads_max=2)
    view = view_of(
        *(model(f"p{n}", pinned=True) for n in range(9)),
        *(model(f"o{n}", auto_delete=True) for n in range(9)),
        *(instance(f"i{n}") for n in range(9)),
        *(copy(f"x{n}", f"i{n}") for n in range(9)),
        *(failure(f"x{n}", "i") for n in range(9)),
    )
    plan = plan_repair(view, now_ms=NOW, policy=policy)
    assert len(plan.delete_failures) == len(plan.unload) == len(plan.delete_models) == 3
    assert len(plan.loads) == 2


def test_nothing_is_decided_before_the_view_has_synced() -> None:
    view = ClusterView()
    view.put_instance(instance("a"))
    view.put_copy(copy("m", "a"))
    assert plan_repair(view, now_ms=NOW, policy=POLICY) == RepairPlan(reason="not_synced")


def test_copies_of_an_instance_that_has_been_missed_for_long_go() -> None:
    view = view_of(model(), copy("m", "ghost"), copy("m", "late"), instance("a"), copy("m", "a"))
    grace_ms = POLICY.orphan_grace_ms
    since = {"ghost": NOW - grace_ms - 1, "late": NOW - grace_ms, "a": 0}
    plan = plan_repair(view, now_ms=NOW, policy=POLICY, absent_since_ms=since)
    assert plan.delete_copies == (("m", "ghost"),)
    assert plan_repair(view, now_ms=NOW, policy=POLICY).delete_copies == ()
