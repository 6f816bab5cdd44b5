"""What `mesh explain` says, and that it says what a request would get."""

from __future__ import annotations

import pytest

from mesh.core.explain import Explanation, explain
from mesh.core.types import ModelState
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
    vmodel,
)


def explained(name: str, *records: Record, avoid: str = "", **inflight: int) -> Explanation:
    view = view_of(*records)
    return explain(view, name, now_ms=NOW, policy=POLICY, inflight=inflight, avoid=set(avoid))


def test_a_hit_names_the_copy_the_runner_up_and_what_is_in_flight() -> None:
    found = explained(
        "v", vmodel("v", "m"), model(), instance("a"), instance("b"), copy("m", "a"),
        copy("m", "b"), a=3, b=1,
    )  # fmt: skip
    assert (found.outcome, found.reason, found.instance_id) == ("hit", "least_inflight", "b")
    assert (found.runner_up, found.via, found.model_id) == ("a", "vmodel", "m")
    assert found.inflight == (("a", 3), ("b", 1))
    assert found.state is ModelState.LOADED


def test_a_miss_names_where_it_would_be_loaded_and_what_speaks_against_the_rest() -> None:
    found = explained(
        "m", model(), instance("a"), instance("b", used_bytes=50), instance("c", DRAINING)
    )
    assert (found.outcome, found.reason) == ("load", "most_free")
    assert (found.instance_id, found.runner_up) == ("a", "b")
    assert [(c.instance_id, c.refusal) for c in found.candidates] == [
        ("a", None),
        ("b", None),
        ("c", "draining"),
    ]
    assert found.state is ModelState.NOT_LOADED


def test_a_load_under_way_is_joined() -> None:
    found = explained("m", model(), instance("a"), copy("m", "a", LOADING))
    assert (found.outcome, found.reason, found.instance_id) == ("join", "join_loading", "a")
    assert found.state is ModelState.LOADING


def test_a_refusal_has_the_code_and_the_cause() -> None:
    found = explained("m", model(), instance("a"), failure("m", "a", message="bad magic"))
    assert (found.outcome, found.reason, found.code) == (
        "refused",
        "load_failed",
        "FAILED_PRECONDITION",
    )
    assert "bad magic" in found.detail
    assert found.state is ModelState.LOADING_FAILED
    assert found.errors == ("a: FAILED_PRECONDITION: bad magic",)


def test_without_a_place_it_waits_and_the_code_is_what_a_wait_in_vain_ends_with() -> None:
    found = explained("m", model())
    assert (found.outcome, found.reason, found.code) == ("wait", "no_instances", "UNAVAILABLE")


@pytest.mark.parametrize(
    ("records", "reason"),
    [
        pytest.param([], "no_instances", id="no instance is there"),
        pytest.param([instance("a", STARTING)], "instances_starting", id="the only one starts"),
        pytest.param([instance("a", DRAINING)], "draining", id="the only one is about to leave"),
    ],
)
def test_where_there_is_no_place_yet_it_waits(records: list[Record], reason: str) -> None:
    found = explained("m", model(), *records)
    assert (found.outcome, found.reason, found.code) == ("wait", reason, "UNAVAILABLE")
    assert "'m' cannot be loaded" in found.detail


def test_marks_say_what_is_held_against_whom() -> None:
    found = explained(
        "m",
        model(preferred_labels=("big",)),
        instance("a", labels=("big",)),
        instance("b", labels=("big",), requests_per_minute=1_000_000),
        instance("c", group="g", replica_set="old", started_at_ms=1),
        instance("d", DRAINING, group="g", replica_set="new", started_at_ms=NOW),
        instance("e", STARTING, group="g", replica_set="new", started_at_ms=NOW),
        avoid="a",
    )
    assert (found.outcome, found.instance_id, found.reason) == ("load", "b", "not_replaced")
    assert found.runner_up == "c"
    assert {(c.instance_id, c.refusal, c.marks) for c in found.candidates} == {
        ("a", None, ("avoided",)),
        ("b", None, ("hot",)),
        ("c", None, ("being_replaced", "not_preferred")),
        ("d", "draining", ("not_preferred",)),
        ("e", "starting", ("not_preferred",)),
    }


def test_a_copy_that_does_not_answer_is_passed_over_while_another_does() -> None:
    records = (model(), instance("a"), instance("b"), copy("m", "a"), copy("m", "b"))
    assert explained("m", *records, avoid="a", b=9).instance_id == "b"
    assert explained("m", *records, avoid="ab", b=9).instance_id == "a"


def test_a_copy_that_is_about_to_leave_answers_while_no_other_does() -> None:
    found = explained("m", model(), instance("a", DRAINING), instance("b"), copy("m", "a"))
    assert (found.outcome, found.instance_id) == ("hit", "a")


def test_an_unknown_name_is_an_answer() -> None:
    found = explained("nope")
    assert (found.outcome, found.code, found.state) == (
        "not_found",
        "NOT_FOUND",
        ModelState.NOT_FOUND,
    )
    assert "'nope'" in found.detail


def test_an_alias_on_its_way_says_where_to() -> None:
    found = explained("v", vmodel("v", "m", "n"), model("m"), model("n"), instance("a"))
    assert (found.model_id, found.target_model_id) == ("m", "n")


def test_explaining_changes_nothing() -> None:
    view = view_of(model(), instance("a"))
    before = repr(view), view.routes_epoch, repr(view.instances)
    explain(view, "m", now_ms=NOW, policy=POLICY, inflight={})
    assert (repr(view), view.routes_epoch, repr(view.instances)) == before
