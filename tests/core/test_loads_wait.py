"""When a load waits for a place, what ends the wait, and what it does not wait for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from mesh.core.errors import Code
from mesh.core.loads import (
    AskLoad,
    ClaimedElsewhere,
    Failed,
    GiveUp,
    Loaded,
    Outcome,
    Rejected,
    Release,
    Step,
    Unreachable,
    Wait,
    Waited,
    first_step,
    next_step,
)
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

BROKEN = Code.FAILED_PRECONDITION


class Load:
    """Plays the shell, with a clock of its own."""

    def __init__(self, *records: Record, exclude: str = "", avoid: str = "") -> None:
        self.view = view_of(model(), *records)
        self.now_ms = NOW
        self.avoid = set(avoid)
        self.state, self.step = first_step(
            self.view, "m", now_ms=NOW, policy=POLICY, exclude=set(exclude), avoid=self.avoid
        )

    def answer(self, outcome: Outcome) -> Step:
        self.state, self.step = next_step(
            self.state, outcome, self.view, now_ms=self.now_ms, policy=POLICY, avoid=self.avoid
        )
        return self.step

    def waited(self, ms: int = 1, asked_at_ms: int = NOW) -> Step:
        self.now_ms += ms
        return self.answer(Waited(asked_at_ms))

    def waits(self) -> Wait:
        assert isinstance(self.step, Wait), self.step
        return self.step

    def asks(self) -> str:
        assert isinstance(self.step, AskLoad), self.step
        return self.step.instance_id

    def gave_up(self) -> GiveUp:
        assert isinstance(self.step, GiveUp), self.step
        return self.step


# ---- what is waited for --------------------------------------------------------------------------


def nobody() -> Load:
    return Load()


def starting() -> Load:
    return Load(instance("a", STARTING))


def draining() -> Load:
    return Load(instance("a", DRAINING))


def rejecting() -> Load:
    load = Load(instance("a"), instance("b"))
    load.answer(Rejected(load.asks(), "no room"))
    load.answer(Rejected(load.asks(), "no room"))
    return load


def unreachable() -> Load:
    load = Load(instance("a"))
    load.answer(Unreachable("a", "connection refused"))
    return load


def excluded() -> Load:
    return Load(instance("a"), exclude="a")


def hops_used() -> Load:
    load = Load(*(instance(f"i{n}") for n in range(9)))
    for _ in range(POLICY.hops_max):
        load.answer(Unreachable(load.asks(), "connection refused"))
    return load


def asked_already() -> Load:
    view = view_of(model(), instance("a"))
    view.add_pending("m", "a", size_bytes=10, now_ms=NOW)
    load = Load()
    load.view = view
    load.waited()
    return load


@pytest.mark.parametrize(
    ("load", "reason"),
    [
        pytest.param(nobody, "no_instances", id="no instance runs: one may come"),
        pytest.param(starting, "instances_starting", id="instances start: they will be ready"),
        pytest.param(draining, "draining", id="all drain: their successors may come"),
        pytest.param(rejecting, "all_excluded", id="everyone lacks memory: some may come free"),
        pytest.param(unreachable, "all_excluded", id="nobody answers: somebody may again"),
        pytest.param(excluded, "all_excluded", id="the request could not reach them: it may again"),
        pytest.param(hops_used, "hops_used", id="as many as allowed were asked: later, again"),
        pytest.param(asked_already, "all_excluded", id="asked for other reasons: that load ends"),
    ],
)
def test_what_may_pass_is_waited_for(load: Callable[[], Load], reason: str) -> None:
    made = load()
    step = made.waits()
    assert step.reason == reason
    assert made.state.waiting_since_ms is not None
    error = step.error()
    assert error.code is Code.UNAVAILABLE and error.retryable and error.retry_after_ms
    made.waited(POLICY.placement_wait_ms)
    while isinstance(made.step, AskLoad):
        made.answer(Rejected(made.asks(), "no room"))
    final = made.gave_up()
    assert (final.code, final.waited) == (Code.UNAVAILABLE, True)
    assert final.error().retryable


def test_a_model_that_no_instance_can_run_is_told_at_once() -> None:
    assert Load(instance("a", model_types=("sklearn",))).gave_up().reason == "no_runtime"


def test_a_model_larger_than_any_instance_is_told_at_once() -> None:
    assert Load(instance("a", capacity=5)).gave_up().reason == "too_large"


def test_a_recorded_failure_is_told_at_once_also_when_it_will_expire() -> None:
    final = Load(instance("a"), failure("m", "a", "UNAVAILABLE")).gave_up()
    assert (final.reason, final.code, final.waited) == ("load_failed", Code.UNAVAILABLE, False)


def test_a_model_that_failed_everywhere_is_told_at_once() -> None:
    load = Load(instance("a"), instance("b"))
    load.answer(Failed(load.asks(), BROKEN, "bad magic"))
    load.answer(Failed(load.asks(), BROKEN, "bad magic"))
    assert (load.gave_up().reason, load.gave_up().waited) == ("load_failed", False)


def test_an_unregistered_model_is_told_when_the_wait_is_over() -> None:
    load = Load()
    load.view.delete_model("m")
    load.waited()
    assert load.gave_up().code is Code.NOT_FOUND


# ---- how long ------------------------------------------------------------------------------------


def test_it_looks_again_after_twice_as_long_each_time_up_to_a_bound() -> None:
    load = Load()
    waits = [load.waits().retry_ms]
    while isinstance(load.waited(load.waits().retry_ms), Wait):
        waits.append(load.waits().retry_ms)
    assert waits[:6] == [50, 100, 200, 400, 800, 1_000]
    assert set(waits[6:-1]) == {POLICY.placement_retry_max_ms}
    assert sum(waits) == POLICY.placement_wait_ms, "the last look is at the end, not after it"


def test_views_that_change_all_the_time_do_not_make_it_wait_for_longer() -> None:
    load = Load()
    for _ in range(POLICY.placement_wait_ms - 1):
        load.waited(1)
        load.waits()
    load.waited(1)
    assert load.gave_up().waited


def test_time_spent_being_refused_counts() -> None:
    load = rejecting()
    load.now_ms += POLICY.placement_wait_ms - 1
    load.waited()
    load.answer(Rejected(load.asks(), "no room"))
    load.answer(Rejected(load.asks(), "no room"))
    final = load.gave_up()
    assert final.waited and "no room" in final.detail


def test_a_request_that_came_later_waits_its_own_time() -> None:
    load = Load()
    later = NOW + 4_000
    load.waited(POLICY.placement_wait_ms)
    assert load.gave_up().waited, "for the first one"
    load.answer(Waited(asked_at_ms=later))
    load.waits()
    load.waited(POLICY.placement_wait_ms - (load.now_ms - later), asked_at_ms=later)
    assert load.gave_up().waited


def test_without_a_time_to_wait_it_gives_up_at_once() -> None:
    impatient = replace(POLICY, placement_wait_ms=0)
    _, step = first_step(view_of(model()), "m", now_ms=NOW, policy=impatient)
    assert isinstance(step, GiveUp)
    assert (step.reason, step.waited) == ("no_instances", False)


# ---- what happens then ---------------------------------------------------------------------------


def test_an_instance_that_has_come_is_asked() -> None:
    load = Load()
    load.view.put_instance(instance("new"))
    load.waited()
    assert load.asks() == "new"
    assert load.answer(Loaded("new")) == Release("new", "loaded")


def test_a_copy_that_has_come_is_taken() -> None:
    load = rejecting()
    load.view.put_copy(copy("m", "b"))
    assert load.waited() == Release("b", "copy_appeared")


def test_who_refused_is_asked_again_after_a_wait() -> None:
    load = rejecting()
    load.waited()
    assert load.asks() in "ab"


def test_who_could_not_be_reached_is_asked_again_after_a_wait() -> None:
    load = unreachable()
    load.waited()
    assert load.asks() == "a"


def test_who_seems_not_to_answer_is_asked_again_when_that_is_over_and_not_before() -> None:
    load = Load(instance("a"), instance("b"), avoid="a")
    load.answer(Rejected("b", "no room"))
    load.answer(Unreachable("a", "connection refused"))
    for _ in range(3):
        load.waited()
        assert load.asks() == "b"
        load.answer(Rejected("b", "no room"))
        assert load.waits().reason == "all_excluded"
    load.avoid = set()
    load.waited()
    asked = {load.asks()}
    load.answer(Rejected(load.asks(), "no room"))
    assert asked | {load.asks()} == {"a", "b"}


def test_who_was_excluded_by_the_request_is_asked_again_after_a_wait() -> None:
    load = excluded()
    load.waited()
    assert load.asks() == "a"


def test_hops_are_counted_anew_after_a_wait() -> None:
    load = hops_used()
    load.waited()
    assert load.asks() and load.state.hops == 1


def test_where_the_model_failed_it_is_not_tried_again_however_long_one_waits() -> None:
    load = Load(instance("a"), instance("b", used_bytes=50))
    load.answer(Failed("a", BROKEN, "bad magic"))
    load.answer(Rejected("b", "no room"))
    load.waits()
    load.waited()
    assert load.asks() == "b"
    load.answer(Rejected("b", "no room"))
    load.waited(POLICY.placement_wait_ms)
    load.answer(Rejected("b", "no room"))
    final = load.gave_up()
    assert (final.reason, final.code) == ("load_failed", BROKEN), "the cause, not the shortage"
    assert "bad magic" in final.detail


def test_failures_stay_bounded_over_many_waits() -> None:
    load = Load(*(instance(i) for i in "abcdef"))
    failed = 0
    while not isinstance(load.step, GiveUp):
        if isinstance(load.step, Wait):
            load.waited()
            continue
        if failed <= load.state.waits and load.state.hops > 1:
            failed += 1
            load.answer(Failed(load.asks(), BROKEN, "bad magic"))
        else:
            load.answer(Rejected(load.asks(), "no room"))
    assert load.gave_up().reason == "load_failed"
    assert len(load.state.failures) == POLICY.max_load_failures


# ---- instances that seem not to answer -----------------------------------------------------------


def test_an_avoided_instance_is_asked_when_nobody_else_is_left() -> None:
    assert Load(instance("a"), avoid="a").asks() == "a"


def test_a_load_under_way_on_an_avoided_instance_is_not_joined_when_another_can_take_it() -> None:
    load = Load(instance("a"), instance("b"), copy("m", "a", LOADING), avoid="a")
    assert load.asks() == "b"


def test_a_load_under_way_on_an_avoided_instance_is_joined_when_nobody_else_can_take_it() -> None:
    load = Load(instance("a"), copy("m", "a", LOADING), avoid="a")
    assert load.asks() == "a"
    assert isinstance(load.step, AskLoad) and load.step.reason == "join_loading"


def test_a_copy_on_an_avoided_instance_is_passed_over_when_another_can_load() -> None:
    load = Load(instance("a"), instance("b"), copy("m", "a"), avoid="a")
    assert load.asks() == "b"


def test_a_copy_on_an_avoided_instance_is_better_than_none() -> None:
    assert Load(instance("a"), copy("m", "a"), avoid="a").step == Release("a", "copy_appeared")


def test_the_claim_of_an_avoided_instance_is_not_joined() -> None:
    load = Load(instance("a"), instance("b"), avoid="a")
    load.answer(ClaimedElsewhere("b", claimed_by="a"))
    assert load.asks() == "b", "the view will have caught up with the claim"


# ---- pods that are started on demand -------------------------------------------------------------

OFFERED = {"mesh-1.x": {"formats": ["onnx"], "labels": ["rt:mesh-1.x"]}}


@pytest.mark.parametrize(
    "others",
    [
        pytest.param([], id="no instance runs at all"),
        pytest.param([instance("a", model_types=("sklearn",))], id="others run other formats"),
    ],
)
def test_a_runtime_without_pods_is_waited_for_as_long_as_pods_take(others: list[Record]) -> None:
    load = Load(*others)
    load.view.put_config("runtimes", OFFERED)
    load.state, load.step = first_step(load.view, "m", now_ms=NOW, policy=POLICY)
    step = load.waits()
    assert step.reason == "runtime_starting" and "'mesh-1.x'" in step.error().message
    load.waited(POLICY.runtime_start_wait_ms - 1)
    assert load.waits().reason == "runtime_starting"
    load.waited(1)
    assert load.gave_up().waited


def test_a_pod_that_has_come_is_asked() -> None:
    load = Load()
    load.view.put_config("runtimes", OFFERED)
    load.view.put_instance(instance("a"))
    load.waited()
    assert load.asks() == "a"


def test_pods_on_demand_are_no_larger_than_those_that_run() -> None:
    load = Load(instance("a", capacity=1))
    load.view.put_config("runtimes", OFFERED)
    load.state, load.step = first_step(load.view, "m", now_ms=NOW, policy=POLICY)
    assert load.gave_up().reason == "too_large"
