"""The leader's sweep."""

from __future__ import annotations

from dataclasses import replace

from mesh.core.repair import LoadOrder, RepairPlan, missing_copies, plan_repair
from mesh.core.view import ClusterView
from tests.core.cluster import (
    DRAINING,
    LOADING,
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


def orders(plan: RepairPlan) -> list[tuple[str, str, str, str]]:
    return [(o.model_id, o.placement.instance_id, o.reason, o.priority.value) for o in plan.loads]


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


def test_two_or_more_minimum_copies_are_loaded_where_there_is_room() -> None:
    plan = swept(model(min_copies=2), instance("a"), instance("b"), copy("m", "a"))
    assert orders(plan) == [("m", "b", "min_copies", "COPY")]


def test_minimum_copies_never_evict() -> None:
    plan = swept(model(min_copies=2), instance("a"), instance("b", used_bytes=95), copy("m", "a"))
    assert plan.loads == ()
    (short,) = plan.shortfalls
    assert (short.model_id, short.missing, short.reason) == ("m", 1, "no_room")


def test_one_minimum_copy_is_no_wish() -> None:
    assert swept(model(min_copies=1), instance("a")).loads == ()


def test_a_pinned_model_is_loaded_even_where_something_has_to_go() -> None:
    plan = swept(model(pinned=True), instance("a", used_bytes=100))
    assert orders(plan) == [("m", "a", "pinned", "AWAITED")]


def test_a_pinned_model_with_a_pinned_copy_needs_none() -> None:
    assert swept(model(pinned=True), instance("a"), copy("m", "a", pinned=True)).loads == ()


def test_a_pinned_copy_on_a_draining_instance_is_replaced_in_time() -> None:
    plan = swept(model(pinned=True), instance("a", DRAINING), instance("b"), copy("m", "a"))
    assert orders(plan) == [("m", "b", "pinned", "AWAITED")]


def test_further_copies_of_a_pinned_model_are_as_soft_as_any() -> None:
    records = (model(pinned=True, min_copies=2), instance("a"), copy("m", "a", pinned=True))
    assert orders(swept(*records, instance("b"))) == [("m", "b", "min_copies", "COPY")]
    assert swept(*records, instance("b", used_bytes=99)).loads == ()


def test_a_wish_that_cannot_be_had_says_why() -> None:
    plan = swept(model(pinned=True), instance("a"), failure("m", "a", message="bad magic"))
    (short,) = plan.shortfalls
    assert (short.reason, short.missing) == ("load_failed", 1)
    assert "bad magic" in short.detail


def test_what_was_asked_for_counts() -> None:
    view = view_of(model(pinned=True), instance("a"))
    view.add_pending("m", "a", size_bytes=10, now_ms=NOW)
    assert plan_repair(view, now_ms=NOW, policy=POLICY).loads == ()


def test_asking_again_after_each_round_fills_all_and_never_over_capacity() -> None:
    view = view_of(
        *(model(f"m{n}", min_copies=2) for n in range(6)),
        *(instance(i, capacity=50) for i in "abc"),
    )
    rounds: list[tuple[LoadOrder, ...]] = []
    policy = replace(POLICY, min_copies_capacity_share=1.0)
    while loads := missing_copies(view, now_ms=NOW, policy=policy)[0]:
        assert len({o.placement.instance_id for o in loads}) == len(loads)
        for order in loads:
            view.put_copy(copy(order.model_id, order.placement.instance_id, LOADING))
        rounds.append(loads)
        assert len(rounds) <= 16
    assert sum(map(len, rounds)) == 12
    assert all(slot.effective_used_bytes <= 50 for slot in view.instances.values())
    assert sorted(slot.effective_used_bytes for slot in view.instances.values()) == [40, 40, 40]


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


def test_a_look_at_some_models_passes_over_the_others() -> None:
    view = view_of(
        model("a", pinned=True), model("b", pinned=True), model("c"), instance("i"), instance("j")
    )
    loads, _ = missing_copies(view, now_ms=NOW, policy=POLICY, among={"b", "c", "gone"})
    assert [order.model_id for order in loads] == ["b"]


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
