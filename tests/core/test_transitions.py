"""How an alias moves to its target: the table of the module, row by row."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mesh.core.transitions import (
    LoadTarget,
    MarkFailed,
    Switch,
    TransitionAction,
    Wait,
    plan_transition,
    plan_transitions,
)
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

V = vmodel("v", "old", "new")
OLD, NEW = model("old", auto_delete=True), model("new", auto_delete=True)


def planned(*records: Record) -> TransitionAction:
    return plan_transition(view_of(*records), V, now_ms=NOW, policy=POLICY)


def test_a_loaded_target_is_switched_to_and_the_old_model_goes() -> None:
    action = planned(V, OLD, NEW, instance("a"), copy("new", "a"))
    assert isinstance(action, Switch)
    assert action.old == V
    assert action.new == replace(V, active_model_id="new", updated_at_ms=NOW)
    assert (action.delete_model_id, action.reason) == ("old", "target_loaded")


@pytest.mark.parametrize(
    "others",
    [
        pytest.param([vmodel("w", "old")], id="another alias means it"),
        pytest.param([vmodel("w", "x", "old")], id="another alias is on its way to it"),
    ],
)
def test_the_old_model_stays_while_another_alias_names_it(others: list[Record]) -> None:
    action = planned(V, OLD, NEW, instance("a"), copy("new", "a"), *others)
    assert isinstance(action, Switch) and action.delete_model_id is None


def test_the_old_model_stays_when_it_was_registered_to_stay() -> None:
    action = planned(V, model("old"), NEW, instance("a"), copy("new", "a"))
    assert isinstance(action, Switch) and action.delete_model_id is None


def test_a_switch_clears_what_had_failed() -> None:
    failed = replace(V, failed="it was broken")
    view = view_of(failed, OLD, NEW, instance("a"), copy("new", "a"))
    action = plan_transition(view, failed, now_ms=NOW, policy=POLICY)
    assert isinstance(action, Switch) and action.new.failed == ""


def test_a_target_that_is_nowhere_is_loaded_while_the_old_one_serves() -> None:
    action = planned(V, OLD, NEW, instance("a"), copy("old", "a"))
    assert isinstance(action, LoadTarget)
    assert (action.name, action.model_id, action.placement.instance_id) == ("v", "new", "a")


def test_a_target_on_a_draining_instance_only_is_loaded_anew() -> None:
    action = planned(V, OLD, NEW, instance("a", DRAINING), copy("new", "a"), instance("b"))
    assert isinstance(action, LoadTarget) and action.placement.instance_id == "b"


def test_a_target_under_way_is_waited_for() -> None:
    action = planned(V, OLD, NEW, instance("a"), instance("b"), copy("new", "a", LOADING))
    assert action == Wait("v", "target_loading")


def test_a_target_that_was_just_asked_for_is_waited_for() -> None:
    view = view_of(V, OLD, NEW, instance("a"), instance("b"))
    view.add_pending("new", "a", size_bytes=10, now_ms=NOW)
    action = plan_transition(view, V, now_ms=NOW, policy=POLICY)
    assert action == Wait("v", "target_loading")


def test_a_target_that_failed_on_one_instance_is_tried_on_another() -> None:
    action = planned(V, OLD, NEW, instance("a"), instance("b"), failure("new", "a"))
    assert isinstance(action, LoadTarget) and action.placement.instance_id == "b"


def test_a_target_that_failed_everywhere_is_marked_once_and_the_old_one_stays() -> None:
    records = (OLD, NEW, instance("a"), failure("new", "a", message="bad magic"))
    action = planned(V, *records)
    assert isinstance(action, MarkFailed)
    assert "bad magic" in action.new.failed
    assert (action.new.active_model_id, action.new.target_model_id) == ("old", "new")
    again = plan_transition(
        view_of(action.new, *records), action.new, now_ms=NOW + 1, policy=POLICY
    )
    assert again == Wait("v", "load_failed")


def test_a_failed_target_is_tried_again_when_its_failures_expire() -> None:
    failed = replace(V, failed="bad magic")
    view = view_of(failed, OLD, NEW, instance("a"), failure("new", "a", expires_at_ms=NOW))
    assert isinstance(plan_transition(view, failed, now_ms=NOW, policy=POLICY), LoadTarget)


@pytest.mark.parametrize(
    ("records", "said"),
    [
        pytest.param([instance("a", model_types=("tf",))], "format 'onnx'", id="no runtime"),
        pytest.param([instance("a", capacity=9)], "capacity", id="too large"),
    ],
)
def test_a_target_that_can_never_load_is_marked(records: list[Record], said: str) -> None:
    action = planned(V, OLD, NEW, *records)
    assert isinstance(action, MarkFailed) and said in action.new.failed


def test_a_target_without_a_place_just_now_waits() -> None:
    assert planned(V, OLD, NEW) == Wait("v", "no_instances")


def test_an_unregistered_target_is_marked() -> None:
    action = planned(V, OLD, instance("a"))
    assert isinstance(action, MarkFailed) and "'new' is not registered" in action.new.failed


def test_an_active_model_that_is_gone_protects_nothing() -> None:
    action = planned(V, NEW, instance("a"))
    assert isinstance(action, Switch)
    assert (action.reason, action.delete_model_id) == ("active_gone", None)


def test_only_aliases_on_their_way_are_planned_and_by_name() -> None:
    view = view_of(vmodel("z", "old", "new"), vmodel("b", "old", "new"), vmodel("c", "old"), OLD)
    actions = plan_transitions(view, now_ms=NOW, policy=POLICY).actions
    assert [a.old.name for a in actions if isinstance(a, MarkFailed)] == ["b", "z"]
    assert len(actions) == 2


def test_nothing_is_planned_before_the_view_has_synced() -> None:
    view = ClusterView()
    view.put_vmodel(V)
    assert plan_transitions(view, now_ms=NOW, policy=POLICY).actions == ()


# --- new names that await their first load ------------------------------------------------------

FRESH = vmodel("v", "new", awaits_load=True)


def test_a_new_name_has_its_model_loaded() -> None:
    action = plan_transition(view_of(FRESH, NEW, instance("a")), FRESH, now_ms=NOW, policy=POLICY)
    assert isinstance(action, LoadTarget) and action.model_id == "new"


def test_once_loaded_it_awaits_nothing_and_its_model_stays() -> None:
    view = view_of(FRESH, NEW, instance("a"), copy("new", "a"))
    action = plan_transition(view, FRESH, now_ms=NOW, policy=POLICY)
    assert isinstance(action, Switch) and action.delete_model_id is None
    assert action.new == replace(FRESH, awaits_load=False, updated_at_ms=NOW)
    view.put_vmodel(action.new)
    assert plan_transitions(view, now_ms=NOW, policy=POLICY).actions == ()


def test_a_first_load_that_fails_is_told_and_tried_again_when_its_failures_expire() -> None:
    failed = failure("new", "a")
    view = view_of(FRESH, NEW, instance("a"), failed)
    action = plan_transition(view, FRESH, now_ms=NOW, policy=POLICY)
    assert isinstance(action, MarkFailed) and failed.message in action.new.failed
    assert action.new.awaits_load
    later = plan_transition(view, action.new, now_ms=failed.expires_at_ms, policy=POLICY)
    assert isinstance(later, LoadTarget)


def _many(count: int) -> list[Record]:
    names = [f"v{at:03}" for at in range(count)]
    records: list[Record] = [vmodel(n, f"m-{n}", awaits_load=True) for n in names]
    return [*records, *(model(f"m-{n}") for n in names)]


def test_so_many_loads_at_once_and_no_more() -> None:
    policy = replace(POLICY, repair_loads_max=3)
    view = view_of(*_many(10), instance("a", capacity=10**6), copy("m-v007", "a", LOADING))
    actions = plan_transitions(view, now_ms=NOW, policy=policy).actions
    assert [a.name for a in actions if isinstance(a, LoadTarget)] == ["v000", "v001"]
    assert len(actions) == 10


def test_a_look_places_so_many_and_the_next_one_goes_on() -> None:
    policy = replace(POLICY, repair_batch_max=4)
    view = view_of(*_many(10))  # no instance: each waits for a place
    seen: list[str] = []
    after = ""
    while True:
        plan = plan_transitions(view, now_ms=NOW, policy=policy, after=after)
        assert len(plan.actions) <= 4
        seen += [action.name for action in plan.actions]
        after = plan.after
        if not after:
            break
    assert seen == [f"v{at:03}" for at in range(10)]
