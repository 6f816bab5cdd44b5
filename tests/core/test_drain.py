"""Which copies a leaving instance hands over, and to whom: the rules as a table."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mesh.core.drain import Held, Move, Stay, anybody_there, next_move, worth_moving
from mesh.core.types import CopyState
from tests.core.cluster import (
    DRAINING,
    NOW,
    POLICY,
    Record,
    copy,
    failure,
    instance,
    model,
    view_of,
)

M = model("m")
HOUR_MS = 3_600_000
LATER = 10 * HOUR_MS
RULES = replace(POLICY, drain_recent_ms=HOUR_MS)


def held(model_id: str = "m", age_ms: int = 0, **fields: object) -> Held:
    return Held(model(model_id, **fields), LATER - age_ms)


def step(*records: Record, exclude: tuple[str, ...] = ()) -> Move | Stay:
    view = view_of(instance("own", state=DRAINING), copy("m", "own"), *records)
    return next_move(view, held(), own_id="own", now_ms=NOW, policy=RULES, exclude=exclude)


@pytest.mark.parametrize(
    ("copies", "expected"),
    [
        pytest.param([], [], id="nothing here, nothing to move"),
        pytest.param(
            [held("a", 3_000), held("b", 1_000), held("c", 2_000)],
            ["b", "c", "a"],
            id="the most recently used go first",
        ),
        pytest.param([held("b"), held("a")], ["a", "b"], id="equal ones in the order of names"),
        pytest.param(
            [held("a", HOUR_MS), held("b", HOUR_MS + 1)],
            ["a"],
            id="what was not used for drain_recent_ms is left",
        ),
        pytest.param([Held(M, 0)], [], id="what was never used is left"),
        pytest.param(
            [held("a", 2 * HOUR_MS, pinned=True), held("b")],
            ["b", "a"],
            id="a pinned model's copy goes however long it rested, in its turn",
        ),
        pytest.param(
            [held("a", 2 * HOUR_MS, min_copies=2), held("b", 2 * HOUR_MS, min_copies=1)],
            ["a"],
            id="so does one of a model with a minimum of two; one copy is no minimum",
        ),
    ],
)
def test_which_copies_are_moved(copies: list[Held], expected: list[str]) -> None:
    assert [c.model_id for c in worth_moving(copies, now_ms=LATER, policy=RULES)] == expected


@pytest.mark.parametrize(
    ("records", "exclude", "expected"),
    [
        pytest.param([], (), "no_instances|draining", id="nobody else is there"),
        pytest.param([instance("a")], (), "a", id="the placement says where"),
        pytest.param([instance("a"), copy("m", "a")], (), "held_elsewhere", id="another has it"),
        pytest.param(
            [instance("a", state=DRAINING), copy("m", "a"), instance("b")],
            (),
            "b",
            id="a copy on an instance that leaves too does not count",
        ),
        pytest.param(
            [instance("a", state=DRAINING)],
            (),
            "draining",
            id="an instance that leaves too is no target",
        ),
        pytest.param(
            [instance("a"), copy("m", "a", state=CopyState.LOADING), instance("b")],
            (),
            "a",
            id="where it is being loaded, that load is waited for",
        ),
        pytest.param(
            [instance("a"), copy("m", "a", state=CopyState.LOADING), instance("b")],
            ("a",),
            "b",
            id="unless that was waited for in vain",
        ),
        pytest.param(
            [instance("a"), failure("m", "a"), instance("b")],
            (),
            "b",
            id="not where it failed to load",
        ),
        pytest.param(
            [instance("a"), instance("b")], ("a", "b"), "all_excluded", id="all have refused it"
        ),
    ],
)
def test_where_a_copy_goes(records: list[Record], exclude: tuple[str, ...], expected: str) -> None:
    found = step(*records, exclude=exclude)
    assert (found.instance_id if isinstance(found, Move) else found.reason) in expected.split("|")


def test_a_move_says_why_there_and_what_came_second() -> None:
    found = step(instance("a", used_bytes=50), instance("b"))
    assert isinstance(found, Move)
    assert (found.instance_id, found.runner_up) == ("b", "a")
    assert found.reason
    assert found.detail


@pytest.mark.parametrize(
    ("records", "expected"),
    [
        pytest.param([], False, id="alone"),
        pytest.param([instance("own")], False, id="only itself"),
        pytest.param([instance("a", state=DRAINING)], False, id="others leave too"),
        pytest.param([instance("a")], True, id="one stays"),
    ],
)
def test_whether_anybody_can_take_something(records: list[Record], expected: bool) -> None:
    assert anybody_there(view_of(*records), "own") is expected
