"""Who is passed over, for how long, and how one comes back: a sentence a rule."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.core.outliers import (
    ANSWERED,
    CONNECT_FAILED,
    FAILURES_IN_A_ROW,
    PROBE_FAILED,
    SILENT,
    Outliers,
)
from mesh.core.policy import Policy

POLICY = Policy(
    outlier_failures=3, outlier_eject_ms=1_000, outlier_eject_max_ms=4_000, outlier_share_max=0.5
)
KNOWN = 4


class Story:
    """Events at an instant, and what they brought about."""

    def __init__(self) -> None:
        self.outliers = Outliers(POLICY)
        self.now_ms = 0
        self.told: list[tuple[str, str, str]] = []

    def _tell(self, transition: object) -> Story:
        if transition is not None:
            kind, reason, who = (
                getattr(transition, name) for name in ("kind", "reason", "instance_id")
            )
            self.told.append((kind, reason, who))
        return self

    def connect_fails(self, who: str = "a") -> Story:
        return self._tell(self.outliers.connect_failed(who, self.now_ms))

    def fails(self, who: str = "a", times: int = 1, known: int = KNOWN) -> Story:
        for _ in range(times):
            self._tell(self.outliers.failed(who, self.now_ms, known=known))
        return self

    def is_silent(self, who: str = "a") -> Story:
        return self._tell(self.outliers.fell_silent(who, 1_000))

    def is_heard(self, who: str = "a") -> Story:
        return self._tell(self.outliers.heard(who))

    def answers(self, who: str = "a") -> Story:
        return self._tell(self.outliers.answered(who, self.now_ms))

    def passes(self, ms: int) -> Story:
        self.now_ms += ms
        self.outliers.tick(self.now_ms)
        return self

    def probed(self, who: str = "a") -> Story:
        assert self.outliers.wants_probe(who, self.now_ms)
        self.outliers.probe_sent(who, self.now_ms)
        return self


def ejected(reason: str, who: str = "a") -> tuple[str, str, str]:
    return ("eject", reason, who)


BACK = ("readmit", ANSWERED, "a")

RULES: list[tuple[str, Callable[[Story], Story], list[tuple[str, str, str]], str]] = [
    (
        "one failed connection passes an instance over",
        lambda s: s.connect_fails(),
        [ejected(CONNECT_FAILED)],
        "a",
    ),
    (
        "one unanswered PING passes an instance over",
        lambda s: s.is_silent(),
        [ejected(SILENT)],
        "a",
    ),
    (
        "fewer failures than the threshold are bad luck",
        lambda s: s.fails(times=2),
        [],
        "",
    ),
    (
        "so many failures in a row pass an instance over",
        lambda s: s.fails(times=3),
        [ejected(FAILURES_IN_A_ROW)],
        "a",
    ),
    (
        "an answer in between begins the row anew",
        lambda s: s.fails(times=2).answers().fails(times=2),
        [],
        "",
    ),
    (
        "failures of different instances are no row",
        lambda s: s.fails("a", 2).fails("b", 2).fails("c", 2),
        [],
        "",
    ),
    (
        "failures of what was under way before change nothing more",
        lambda s: s.fails(times=9),
        [ejected(FAILURES_IN_A_ROW)],
        "a",
    ),
    (
        "a silent instance comes back with the first byte",
        lambda s: s.is_silent().is_heard(),
        [ejected(SILENT), BACK],
        "",
    ),
    (
        "silence is told once however often it is noticed",
        lambda s: s.is_silent().is_silent().connect_fails(),
        [ejected(SILENT)],
        "a",
    ),
    (
        "a silent instance stays passed over whatever time passes",
        lambda s: s.is_silent().passes(60_000),
        [ejected(SILENT)],
        "a",
    ),
    (
        "an instance that could be connected to again is back at once",
        lambda s: s.connect_fails().passes(1_000).is_heard(),
        [ejected(CONNECT_FAILED), BACK],
        "",
    ),
    (
        "an instance that cannot be connected to is no candidate when its time is over",
        lambda s: s.connect_fails().passes(1_000),
        [ejected(CONNECT_FAILED)],
        "a",
    ),
    (
        "a connection that fails again passes it over anew",
        lambda s: s.connect_fails().passes(1_000).connect_fails(),
        [ejected(CONNECT_FAILED), ejected(PROBE_FAILED)],
        "a",
    ),
    (
        "connections that fail at the same time are one failure",
        lambda s: s.connect_fails().connect_fails().connect_fails(),
        [ejected(CONNECT_FAILED)],
        "a",
    ),
    (
        "when its time is over an instance that failed may be placed on again",
        lambda s: s.fails(times=3).passes(1_000),
        [ejected(FAILURES_IN_A_ROW)],
        "",
    ),
    (
        "the answer of its probe takes an instance back",
        lambda s: s.fails(times=3).passes(1_000).probed().answers(),
        [ejected(FAILURES_IN_A_ROW), BACK],
        "",
    ),
    (
        "a probe that fails passes it over again",
        lambda s: s.fails(times=3).passes(1_000).probed().fails(),
        [ejected(FAILURES_IN_A_ROW), ejected(PROBE_FAILED)],
        "a",
    ),
    (
        "a late answer of what was under way does not take back one that failed many",
        lambda s: s.fails(times=3).answers(),
        [ejected(FAILURES_IN_A_ROW)],
        "a",
    ),
    (
        "a byte of a silent instance that also failed many does not take it back",
        lambda s: s.fails(times=3).is_silent().is_heard(),
        [ejected(FAILURES_IN_A_ROW), ejected(SILENT)],
        "a",
    ),
    (
        "of four instances two are passed over for failures, not three",
        lambda s: s.fails("b", 3).fails("c", 3).fails("a", 3),
        [ejected(FAILURES_IN_A_ROW, "b"), ejected(FAILURES_IN_A_ROW, "c")],
        "bc",
    ),
    (
        "the last instance is never passed over for failures",
        lambda s: s.fails("a", 3, known=1),
        [],
        "",
    ),
    (
        "nor when the other one is silent",
        lambda s: s.is_silent("b").fails("a", 3, known=2),
        [ejected(SILENT, "b")],
        "b",
    ),
    (
        "who is silent or cannot be connected to does not count into that share",
        lambda s: s.is_silent("b").connect_fails("c").fails("a", 3),
        [ejected(SILENT, "b"), ejected(CONNECT_FAILED, "c"), ejected(FAILURES_IN_A_ROW)],
        "abc",
    ),
]


@pytest.mark.parametrize(
    ("story", "told", "avoided"),
    [pytest.param(story, told, avoided, id=name) for name, story, told, avoided in RULES],
)
def test_rule(
    story: Callable[[Story], Story], told: list[tuple[str, str, str]], avoided: str
) -> None:
    told_story = story(Story())
    assert told_story.told == told
    assert told_story.outliers.avoided == set(avoided)


@pytest.mark.parametrize(("times", "eject_ms"), [(1, 1_000), (2, 2_000), (3, 4_000), (4, 4_000)])
def test_each_time_in_a_row_lasts_twice_as_long_up_to_a_bound(times: int, eject_ms: int) -> None:
    story = Story().fails(times=3)
    for _ in range(times - 1):
        story.passes(60_000).probed().fails()
    story.passes(eject_ms - 1)
    assert not story.outliers.wants_probe("a", story.now_ms)
    story.passes(1)
    assert story.outliers.wants_probe("a", story.now_ms)


def test_who_was_taken_back_begins_with_a_short_time_again() -> None:
    story = Story().fails(times=3).passes(1_000).probed().fails().passes(2_000).probed().answers()
    story.fails(times=3).passes(1_000)
    assert story.outliers.wants_probe("a", story.now_ms)


def test_one_request_is_the_probe_and_another_when_nothing_is_heard_of_it() -> None:
    story = Story().fails(times=3).passes(1_000).probed()
    assert not story.outliers.wants_probe("a", story.now_ms)
    story.passes(1_000)
    assert story.outliers.wants_probe("a", story.now_ms)


def test_who_cannot_be_connected_to_is_tried_by_a_connection_and_not_by_a_request() -> None:
    story = Story().connect_fails()
    assert story.outliers.to_connect(story.now_ms) == ()
    story.passes(1_000)
    assert story.outliers.to_connect(story.now_ms) == ("a",)
    assert not story.outliers.wants_probe("a", story.now_ms)


def test_who_was_silent_until_its_connections_were_closed_is_tried_by_a_new_one() -> None:
    story = Story().is_silent()
    story.outliers.lost_sight("a", story.now_ms)
    assert story.outliers.down == {"a"}
    assert story.outliers.to_connect(story.now_ms) == ("a",)
    assert story.is_heard().told == [ejected(SILENT), BACK]


def test_only_who_is_silent_or_unreachable_is_down() -> None:
    story = Story().is_silent("b").connect_fails("c").fails("a", 3)
    assert story.outliers.down == {"b", "c"}
    assert story.outliers.passed_over == {"a", "b", "c"}


def test_who_has_left_is_forgotten() -> None:
    story = Story().is_silent().fails(times=2)
    story.outliers.forget("a")
    assert not story.outliers.passed_over and not story.outliers.standings
    story.outliers.forget("a")


def test_other_thresholds_hold_from_now_on() -> None:
    story = Story()
    story.outliers.use_policy(Policy(outlier_failures=1))
    assert story.fails().told == [ejected(FAILURES_IN_A_ROW)]


EVENTS = st.lists(
    st.tuples(
        st.sampled_from(
            ["connect", "fails", "silent", "heard", "answers", "pass", "lost", "probe"]
        ),
        st.sampled_from("abcd"),
        st.integers(0, 3_000),
    ),
    max_size=60,
)


@given(EVENTS)
def test_whatever_happens(events: list[tuple[str, str, int]]) -> None:
    """Who is down is avoided, suspicion alone covers not more than its share, and all come back
    when they answer."""
    story = Story()
    outliers = story.outliers
    for event, who, ms in events:
        match event:
            case "connect":
                story.connect_fails(who)
            case "fails":
                story.fails(who)
            case "silent":
                story.is_silent(who)
            case "heard":
                story.is_heard(who)
            case "answers":
                story.answers(who)
            case "lost":
                outliers.lost_sight(who, story.now_ms)
            case "probe":
                if outliers.wants_probe(who, story.now_ms):
                    story.probed(who)
            case _:
                story.passes(ms)
        assert outliers.down <= outliers.avoided <= outliers.passed_over
        assert outliers.avoided.isdisjoint(outliers.probing)
        suspected = outliers.passed_over - outliers.down
        assert len(suspected) <= KNOWN // 2 + len(outliers.down)
    for who in "abcd":
        story.is_heard(who).passes(60_000)
        if outliers.wants_probe(who, story.now_ms):
            story.probed(who)
        story.answers(who)
    assert not outliers.passed_over and not outliers.standings
    kinds = {who: [k for k, _, w in story.told if w == who] for who in "abcd"}
    assert all(told[-1:] in ([], ["readmit"]) for told in kinds.values())
