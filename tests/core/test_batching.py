"""Whether requests are joined: what trials, failures and the owner's words lead to."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.core.batching import (
    Reason,
    Stage,
    Standing,
    Terms,
    Times,
    Trial,
    Wished,
    begun,
    beside,
    blamed,
    changed,
    joined,
    judged,
    terms,
    told_nothing,
    trial_due,
)
from mesh.core.policy import Policy

POLICY = Policy()
USUAL = Terms(64)
UNTRIED = begun(True, USUAL)
US = 1_000


def trial(apart_us: int, joined_us: int, same: bool | None = True, requests: int = 8) -> Trial:
    """CPU time of all requests one by one, and joined; nothing waits."""
    apart, together = apart_us * US, joined_us * US
    return Trial(requests, Times(apart, apart), Times(together, together), same)


GOOD, POOR = trial(800, 150), trial(800, 790)
ON = judged(UNTRIED, GOOD, 10, POLICY)


@pytest.mark.parametrize(
    ("fits", "wanted", "stage", "reason"),
    [
        pytest.param(True, USUAL, Stage.UNTRIED, Reason.NOT_TRIED, id="it is to be found out"),
        pytest.param(False, USUAL, Stage.UNFIT, Reason.FIXED_AXIS, id="a fixed axis rules it out"),
        pytest.param(
            False, Terms(8, 0, True), Stage.UNFIT, Reason.FIXED_AXIS, id="whatever is stated"
        ),
        pytest.param(True, Terms(0), Stage.UNFIT, Reason.SWITCHED_OFF, id="no rows: off"),
        pytest.param(True, Terms(1), Stage.UNFIT, Reason.SWITCHED_OFF, id="one row: off"),
        pytest.param(True, Terms(8, 0, True), Stage.ON, Reason.STATED, id="stated: no trial"),
    ],
)
def test_where_a_copy_begins(fits: bool, wanted: Terms, stage: Stage, reason: Reason) -> None:
    found = begun(fits, wanted)
    assert (found.stage, found.reason) == (stage, reason)


@pytest.mark.parametrize(
    ("record", "model", "expected"),
    [
        pytest.param(Wished(), Wished(), Terms(64, 0, False), id="nobody says: the policy's"),
        pytest.param(Wished(8), Wished(16, 100), Terms(8, 100, True), id="the record comes first"),
        pytest.param(
            Wished(), Wished(16), Terms(16, 0, False), id="a bound of the model's file is no wish"
        ),
        pytest.param(Wished(), Wished(16, 0), Terms(16, 0, True), id="dynamic batching is one"),
        pytest.param(Wished(0), Wished(16, 100), Terms(0, 100, True), id="the record says never"),
        pytest.param(Wished(None, 5), Wished(), Terms(64, 5, True), id="a time alone"),
    ],
)
def test_who_says_what_holds(record: Wished, model: Wished, expected: Terms) -> None:
    assert terms(record, model, POLICY) == expected


FAILED = Trial(8, Times(1, 1), None)
OFF = judged(UNTRIED, POOR, 10, POLICY)
WAITING = Trial(8, Times(800 * US, 20 * US), Times(110 * US, 30 * US))
BUSY = Trial(8, Times(8_000 * US, 2_000 * US), Times(1_000 * US, 1_990 * US))


@pytest.mark.parametrize(
    ("standing", "found", "stage", "reason"),
    [
        pytest.param(UNTRIED, GOOD, Stage.ON, Reason.FASTER, id="faster: on"),
        pytest.param(UNTRIED, POOR, Stage.OFF, Reason.NOT_FASTER, id="no faster: off for now"),
        pytest.param(UNTRIED, trial(100, 89), Stage.OFF, Reason.NOT_FASTER, id="our cost counts"),
        pytest.param(OFF, GOOD, Stage.ON, Reason.FASTER, id="faster later: on"),
        pytest.param(
            UNTRIED, trial(800, 10, False), Stage.REFUSED, Reason.ANSWERS_DIFFER,
            id="other answers: never, however fast",
        ),
        pytest.param(
            ON, trial(800, 10, False), Stage.REFUSED, Reason.ANSWERS_DIFFER,
            id="other answers later: never again",
        ),
        pytest.param(
            UNTRIED, trial(800, 150, None), Stage.UNTRIED, Reason.NOT_TELLING,
            id="answers that show nothing do not switch on",
        ),
        pytest.param(ON, trial(800, 150, None), Stage.ON, Reason.FASTER, id="nor off"),
        pytest.param(ON, POOR, Stage.ON, Reason.FASTER, id="one slow trial is a lost time slice"),
        pytest.param(
            judged(ON, POOR, 20, POLICY), POOR, Stage.OFF, Reason.NOT_FASTER, id="two are not"
        ),
        pytest.param(UNTRIED, WAITING, Stage.ON, Reason.FASTER, id="who waits is timed by a clock"),
        pytest.param(UNTRIED, BUSY, Stage.OFF, Reason.NOT_FASTER, id="a busy machine is no gain"),
        pytest.param(UNTRIED, FAILED, Stage.UNTRIED, Reason.NOT_TRIED, id="one may fail"),
    ],
)  # fmt: skip
def test_after_a_trial(standing: Standing, found: Trial, stage: Stage, reason: Reason) -> None:
    after = judged(standing, found, 30, POLICY)
    assert (after.stage, after.reason) == (stage, reason)


@pytest.mark.parametrize(
    ("running", "inside", "waiting", "cores", "waits", "expected"),
    [
        pytest.param(0, 0, 1, 1, False, True, id="nothing runs"),
        pytest.param(1, 8, 7, 4, False, False, id="fewer wait than are inside"),
        pytest.param(1, 8, 8, 4, False, True, id="as many wait, and a core is free"),
        pytest.param(1, 8, 64, 1, False, False, id="no core is free"),
        pytest.param(1, 8, 64, 1, True, True, id="no core is needed"),
        pytest.param(1, 8, 7, 1, True, False, id="none is needed, but fewer wait"),
    ],
)
def test_a_joined_run_starts_beside_others(
    running: int, inside: int, waiting: int, cores: int, waits: bool, expected: bool
) -> None:
    assert beside(running, inside, waiting, cores, waits=waits) is expected


def test_joined_runs_that_fail_alone_are_given_up() -> None:
    standing = ON
    for _ in range(2):
        standing = blamed(standing, 50)
        assert standing.stage is Stage.ON
    assert blamed(standing, 50).stage is Stage.REFUSED


def test_one_that_goes_well_in_between_clears_the_others() -> None:
    standing = blamed(blamed(ON, 50), 50)
    standing = joined(standing, 2, USUAL)
    assert blamed(blamed(standing, 50), 50).stage is Stage.ON


def test_a_failed_joined_run_halves_the_rows_and_good_ones_double_them() -> None:
    assert blamed(ON, 50).rows == ON.rows // 2
    grown = [ON.rows]
    standing = ON
    for _ in range(6):
        standing = joined(standing, standing.rows, USUAL)
        grown.append(standing.rows)
    assert grown == [8, 16, 32, 64, 64, 64, 64]


def test_few_rows_do_not_raise_the_bound() -> None:
    assert joined(ON, 2, USUAL).rows == ON.rows


def test_trials_that_do_not_pay_come_ever_more_rarely() -> None:
    standing, requests, gaps = UNTRIED, 0, []
    for _ in range(5):
        standing = judged(standing, POOR, requests, POLICY)
        gaps.append(standing.next_trial - requests)
        requests = standing.next_trial
    assert gaps == [256, 1_024, 4_096, 16_384, 65_536]


def test_it_is_looked_at_again_while_on() -> None:
    due_at = ON.next_trial
    assert due_at == 10 + POLICY.batch_retrial_requests
    assert not trial_due(ON, USUAL, due_at - 1)
    assert trial_due(ON, USUAL, due_at)


@pytest.mark.parametrize(
    ("standing", "wanted"),
    [
        pytest.param(begun(True, Terms(8, 0, True)), Terms(8, 0, True), id="stated"),
        pytest.param(begun(False, USUAL), USUAL, id="unfit"),
        pytest.param(judged(ON, trial(8, 1, False), 9, POLICY), USUAL, id="refused"),
    ],
)
def test_there_is_never_a_trial(standing: Standing, wanted: Terms) -> None:
    assert not trial_due(standing, wanted, 10**9)


@pytest.mark.parametrize(
    ("standing", "before", "after", "stage"),
    [
        pytest.param(ON, USUAL, USUAL, Stage.ON, id="nothing new: what was found out stays"),
        pytest.param(ON, USUAL, Terms(0), Stage.UNFIT, id="switched off"),
        pytest.param(begun(True, Terms(0)), Terms(0), USUAL, Stage.UNTRIED, id="switched on"),
        pytest.param(OFF, USUAL, Terms(8, 0, True), Stage.ON, id="stated after all"),
        pytest.param(OFF, USUAL, Terms(32), Stage.OFF, id="other rows"),
        pytest.param(
            begun(True, Terms(8, 0, True)), Terms(8, 0, True), USUAL, Stage.UNTRIED,
            id="stated no more: it is to be found out",
        ),
    ],
)  # fmt: skip
def test_other_terms(standing: Standing, before: Terms, after: Terms, stage: Stage) -> None:
    assert changed(standing, True, before, after).stage is stage


EVENTS = st.one_of(
    st.builds(
        trial, st.integers(1, 10_000), st.integers(1, 10_000), st.sampled_from([True, True, None])
    ),
    st.just(FAILED),
    st.just("blamed"),
    st.just("told nothing"),
    st.integers(1, 64),
)


@given(events=st.lists(EVENTS, max_size=30), rows_max=st.integers(2, 256))
def test_whatever_happens_rows_stay_in_bounds_and_a_refusal_is_for_good(
    events: list[object], rows_max: int
) -> None:
    wanted = Terms(rows_max)
    standing, requests = begun(True, wanted), 0
    for event in events:
        requests += 8
        before = standing
        match event:
            case Trial():
                standing = judged(standing, event, requests, POLICY)
            case "blamed":
                standing = blamed(standing, requests)
            case "told nothing":
                standing = told_nothing(standing, requests)
            case int():
                standing = joined(standing, min(event, standing.rows), wanted)
        assert 2 <= standing.rows <= rows_max
        if standing.stage is Stage.REFUSED:
            assert not trial_due(standing, wanted, 10**9)
            return
        assert standing.next_trial >= before.next_trial or standing.next_trial >= requests


def test_a_record_that_stands_by_its_terms_is_not_reset() -> None:
    stated = Terms(8, 0, True)
    failing = replace(begun(True, stated), blames=2)
    assert changed(failing, True, stated, stated) is failing
