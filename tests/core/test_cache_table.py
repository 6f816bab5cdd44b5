"""Every pair of state and trigger is in the table or raises."""

from __future__ import annotations

import itertools

import pytest

from mesh.core.cache import _ACTIONS
from mesh.core.cache_events import (
    BecameIdle,
    LoadBroken,
    LoadFinished,
    LoadWanted,
    Reason,
    SizePredicted,
    TermsChanged,
    UnloadFinished,
    UnloadWanted,
)
from mesh.core.cache_table import TRANSITIONS, TRIGGER_OF, IllegalTransition, Trigger
from mesh.core.errors import Unavailable
from mesh.core.types import CopyState
from tests.core.cache_driver import Driver

EVENTS = {
    LoadWanted: LoadWanted("m", 10, 1_000),
    SizePredicted: SizePredicted("m", 10),
    LoadFinished: LoadFinished("m", 10),
    LoadBroken: LoadBroken("m", Unavailable("no")),
    UnloadWanted: UnloadWanted("m", Reason.ASKED),
    UnloadFinished: UnloadFinished("m"),
    BecameIdle: BecameIdle("m"),
    TermsChanged: TermsChanged("m", True),
}
LIVING = [s for s in CopyState if s not in (CopyState.FAILED, CopyState.REMOVED)]


def bring_to(state: CopyState) -> Driver:
    """A cache of 100 bytes in which the copy ``m`` of 10 bytes stands in ``state``."""
    driver = Driver(capacity=100, slots=1)
    if state is CopyState.QUEUED:
        driver.send(LoadWanted("blocker", 10, 1_000))
        driver.send(LoadWanted("m", 10, 1_000))
    elif state is CopyState.WAITING:
        driver.load("big", 95)
        driver.use("big", +1)
        driver.send(LoadWanted("m", 10, 1_000))
    else:
        driver.send(LoadWanted("m", 10, 1_000))
        if state in (CopyState.LOADED, CopyState.UNLOADING):
            driver.send(SizePredicted("m", 10))
            driver.send(LoadFinished("m", 10))
        if state is CopyState.UNLOADING:
            driver.use("m", +1)
            driver.send(UnloadWanted("m", Reason.ASKED))
        if state is CopyState.SIZING:
            driver.send(UnloadWanted("m", Reason.ASKED))
            driver = Driver(capacity=100, slots=2)
            driver.load("big", 60)
            driver.use("big", +1)
            driver.load("m", 10, measured=50)
    assert driver.cache.get("m").state is state
    return driver


@pytest.mark.parametrize("state", LIVING)
@pytest.mark.parametrize("kind", list(EVENTS))
def test_an_event_from_outside_is_in_the_table_or_raises(state: CopyState, kind: type) -> None:
    driver = bring_to(state)
    if (state, TRIGGER_OF[kind]) not in TRANSITIONS:
        with pytest.raises(IllegalTransition):
            driver.send(EVENTS[kind])
        return
    if (state, kind) in {
        (CopyState.UNLOADING, LoadFinished),  # only of an abandoned load
        (CopyState.UNLOADING, LoadBroken),
        (CopyState.UNLOADING, UnloadFinished),  # only once the unload has started
    }:
        with pytest.raises(IllegalTransition):
            driver.send(EVENTS[kind])
        return
    driver.send(EVENTS[kind])


def test_every_trigger_has_an_action_and_a_row() -> None:
    assert set(_ACTIONS) == set(Trigger)
    assert {trigger for _, trigger in TRANSITIONS} == set(Trigger)


def test_what_has_left_takes_no_trigger() -> None:
    for state, trigger in itertools.product((CopyState.FAILED, CopyState.REMOVED), Trigger):
        assert (state, trigger) not in TRANSITIONS


def test_every_living_state_can_be_left() -> None:
    for state in LIVING:
        ends = set().union(*(end for (s, _), end in TRANSITIONS.items() if s is state))
        assert ends - {state}, state


@pytest.mark.parametrize(
    "kind", [SizePredicted, LoadFinished, LoadBroken, UnloadFinished, BecameIdle]
)
def test_an_event_about_a_model_that_is_not_here_raises(kind: type) -> None:
    with pytest.raises(IllegalTransition, match="not here"):
        Driver().send(EVENTS[kind])


@pytest.mark.parametrize("kind", [UnloadWanted, TermsChanged])
def test_a_wish_about_a_model_that_is_not_here_is_no_event(kind: type) -> None:
    assert Driver().send(EVENTS[kind]) == ()
