"""What a waiting load does next: one test a sentence, then what holds for any script of answers."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from mesh.core.errors import Code, LoadFailed, NotFound
from mesh.core.loads import (
    AskLoad,
    ClaimedElsewhere,
    Failed,
    GiveUp,
    Loaded,
    LoadState,
    Outcome,
    Rejected,
    Release,
    Step,
    Unreachable,
    Wait,
    Waited,
    failure_record,
    first_step,
    next_step,
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
)


class Load:
    """Plays the shell: keeps the state and counts what was asked for."""

    def __init__(self, *records: Record, exclude: str = "") -> None:
        self.view = view_of(model(), *records)
        self.asked: list[str] = []
        self.state, step = first_step(
            self.view, "m", now_ms=NOW, policy=POLICY, exclude=set(exclude)
        )
        self.step = self._seen(step)

    def answer(self, outcome: Outcome) -> Step:
        self.state, step = next_step(self.state, outcome, self.view, now_ms=NOW, policy=POLICY)
        self.step = self._seen(step)
        return self.step

    def _seen(self, step: Step) -> Step:
        if isinstance(step, AskLoad):
            self.asked.append(step.instance_id)
        return step


def ask(step: Step) -> AskLoad:
    assert isinstance(step, AskLoad), step
    return step


def gave_up(step: Step) -> GiveUp:
    assert isinstance(step, GiveUp), step
    return step


def test_a_miss_asks_the_instance_that_placement_names() -> None:
    load = Load(instance("a", used_bytes=50), instance("b"))
    step = ask(load.step)
    assert (step.instance_id, step.reason, step.size_bytes) == ("b", "most_free", 10)
    assert step.placement is not None and step.placement.runner_up == "a"


def test_loaded_releases_those_who_wait() -> None:
    load = Load(instance("a"))
    assert load.answer(Loaded("a")) == Release("a", "loaded")


def test_claimed_elsewhere_goes_there() -> None:
    load = Load(instance("a"), instance("b", used_bytes=50))
    step = ask(load.answer(ClaimedElsewhere("a", claimed_by="b")))
    assert (step.instance_id, step.reason, step.placement) == ("b", "join_claim", None)
    assert load.answer(Loaded("b")) == Release("b", "loaded")


def test_claimed_by_an_instance_that_the_view_does_not_know_yet_goes_there_too() -> None:
    load = Load(instance("a"))
    assert ask(load.answer(ClaimedElsewhere("a", claimed_by="new"))).instance_id == "new"


def test_claimed_by_nobody_any_more_looks_anew() -> None:
    load = Load(instance("a"))
    assert ask(load.answer(ClaimedElsewhere("a", claimed_by=""))).instance_id == "a"


def test_claimed_by_an_instance_that_was_tried_in_vain_looks_elsewhere() -> None:
    load = Load(instance("a"), instance("b", used_bytes=50), instance("c", used_bytes=80))
    load.answer(Rejected("a", "no room"))
    step = ask(load.answer(ClaimedElsewhere("b", claimed_by="a")))
    assert step.instance_id == "b"


def test_a_load_under_way_is_joined() -> None:
    load = Load(instance("a"), instance("b"), copy("m", "b", LOADING))
    step = ask(load.step)
    assert (step.instance_id, step.reason) == ("b", "join_loading")


def test_a_load_under_way_on_a_draining_instance_is_not() -> None:
    load = Load(instance("a"), instance("b", DRAINING), copy("m", "b", LOADING))
    assert ask(load.step).instance_id == "a"


def test_a_copy_that_has_appeared_meanwhile_is_taken() -> None:
    load = Load(instance("a"), instance("b"))
    first = load.asked[0]
    other = "b" if first == "a" else "a"
    load.view.put_copy(copy("m", other))
    assert load.answer(Rejected(first, "no room")) == Release(other, "copy_appeared")


def test_a_failed_load_is_recorded_and_tried_elsewhere() -> None:
    load = Load(instance("a"), instance("b", used_bytes=50))
    step = ask(load.answer(Failed("a", Code.FAILED_PRECONDITION, "bad magic")))
    assert step.instance_id == "b"
    (record,) = load.state.failures
    assert (record.instance_id, record.code, record.message) == (
        "a",
        "FAILED_PRECONDITION",
        "bad magic",
    )


def test_enough_failures_are_final_and_carry_the_last_cause() -> None:
    load = Load(*(instance(i) for i in "abcde"))
    for n in range(POLICY.max_load_failures):
        load.answer(Failed(load.asked[-1], Code.FAILED_PRECONDITION, f"cause {n}"))
    final = gave_up(load.step)
    assert (final.reason, final.code) == ("load_failed", Code.FAILED_PRECONDITION)
    assert "cause 2" in final.detail and load.asked[-1] in final.detail
    assert len(set(load.asked)) == POLICY.max_load_failures
    error = final.error()
    assert isinstance(error, LoadFailed) and not error.retryable


def test_failures_that_others_saw_count_too() -> None:
    load = Load(*(instance(i) for i in "abc"), failure("m", "x"), failure("m", "y"))
    final = gave_up(load.answer(Failed(load.asked[0], Code.FAILED_PRECONDITION, "mine")))
    assert "mine" in final.detail
    assert len(load.asked) == 1


def test_a_failure_on_the_only_instance_is_final() -> None:
    load = Load(instance("a"))
    final = gave_up(load.answer(Failed("a", Code.UNAVAILABLE, "bucket unreachable")))
    assert (final.reason, final.code) == ("load_failed", Code.UNAVAILABLE)
    assert final.retry_after_ms == POLICY.transient_failure_expiry_ms
    assert final.error().retryable


def test_a_refusal_is_tried_elsewhere() -> None:
    load = Load(instance("a"), instance("b", used_bytes=50))
    assert ask(load.answer(Rejected("a", "no room"))).instance_id == "b"


def test_a_model_that_was_unregistered_meanwhile_is_not_found() -> None:
    load = Load(instance("a"))
    load.view.delete_model("m")
    error = gave_up(load.answer(Rejected("a", "unknown model"))).error()
    assert isinstance(error, NotFound) and "'m'" in error.message


def test_what_the_request_has_tried_is_not_tried_again() -> None:
    load = Load(instance("a"), instance("b"), copy("m", "a"), exclude="a")
    assert ask(load.step).instance_id == "b"


def test_a_final_reason_of_placement_is_passed_on() -> None:
    load = Load(instance("a", model_types=("sklearn",)))
    final = gave_up(load.step)
    assert (final.reason, final.code, final.retry_after_ms) == (
        "no_runtime",
        Code.FAILED_PRECONDITION,
        None,
    )


def test_what_the_world_broke_heals_sooner_than_what_the_model_broke() -> None:
    def lasting_ms(code: Code) -> int:
        record = failure_record("m", "a", code, "x", now_ms=NOW, policy=POLICY)
        return record.expires_at_ms - NOW

    assert lasting_ms(Code.FAILED_PRECONDITION) == POLICY.load_failure_expiry_ms
    for code in (Code.UNAVAILABLE, Code.RESOURCE_EXHAUSTED, Code.DEADLINE_EXCEEDED):
        assert lasting_ms(code) == POLICY.transient_failure_expiry_ms


IDS = ("a", "b", "c", "d", "e", "f")
answers = st.lists(
    st.sampled_from(("loaded", "claimed", "failed", "rejected", "unreachable")), max_size=20
)


@settings(max_examples=200, deadline=None)
@given(answers, st.data())
def test_any_script_of_answers_ends_within_the_bounds(
    script: list[str], data: st.DataObject
) -> None:
    view = view_of(model(), *(instance(i) for i in IDS))
    now_ms, state, step = NOW, *first_step(view, "m", now_ms=NOW, policy=POLICY)
    asked = 0
    in_vain: set[str] = set()  # since the last wait
    failed: list[str] = []
    for kind in [*script, *["rejected"] * 200]:
        match step:
            case Wait():
                assert 0 < step.retry_ms <= POLICY.placement_retry_max_ms
                now_ms += step.retry_ms
                asked, in_vain = 0, set(failed)
                outcome: Outcome = Waited()
            case AskLoad():
                asked += 1
                assert asked <= POLICY.hops_max
                assert step.instance_id not in in_vain
                outcome = scripted(kind, step.instance_id, data)
                if kind in ("failed", "rejected", "unreachable"):
                    in_vain.add(step.instance_id)
                if kind == "failed":
                    failed.append(step.instance_id)
            case _:
                break
        state, step = next_step(state, outcome, view, now_ms=now_ms, policy=POLICY)
        assert_consistent(state, view)
    assert isinstance(step, GiveUp | Release), "it ends"
    assert now_ms - NOW <= POLICY.placement_wait_ms
    assert len(failed) == len(set(failed)) <= POLICY.max_load_failures, (
        "never again where it failed"
    )


def scripted(kind: str, where: str, data: st.DataObject) -> Outcome:
    match kind:
        case "loaded":
            return Loaded(where)
        case "claimed":
            return ClaimedElsewhere(where, data.draw(st.sampled_from((*IDS, ""))))
        case "failed":
            return Failed(where, Code.FAILED_PRECONDITION, "broken")
        case "rejected":
            return Rejected(where, "no room")
        case _:
            return Unreachable(where, "gone")


def assert_consistent(state: LoadState, view: ClusterView) -> None:
    assert {f.instance_id for f in state.failures} <= state.excluded
    assert state.hops <= POLICY.hops_max
    assert state.model_id in view.models
