"""Outward states."""

from __future__ import annotations

import pytest

from mesh.core.status import model_status, name_status, vmodel_phase
from mesh.core.types import ModelState
from tests.core.cluster import (
    DRAINING,
    LOADING,
    NOW,
    Record,
    copy,
    failure,
    instance,
    model,
    view_of,
    vmodel,
)


@pytest.mark.parametrize(
    ("records", "state"),
    [
        pytest.param([], ModelState.NOT_FOUND, id="not registered"),
        pytest.param([copy("m", "a")], ModelState.NOT_FOUND, id="a copy alone is not registered"),
        pytest.param([model()], ModelState.NOT_LOADED, id="registered"),
        pytest.param([model(), copy("m", "a", LOADING)], ModelState.LOADING, id="being loaded"),
        pytest.param([model(), copy("m", "a")], ModelState.LOADED, id="loaded"),
        pytest.param(
            [model(), copy("m", "a"), copy("m", "b", LOADING), failure("m", "c")],
            ModelState.LOADED,
            id="loaded somewhere",
        ),
        pytest.param(
            [model(), failure("m", "b"), copy("m", "a", LOADING)],
            ModelState.LOADING,
            id="being loaded after a failure",
        ),
        pytest.param([model(), failure("m", "a")], ModelState.LOADING_FAILED, id="failed"),
        pytest.param(
            [model(), failure("m", "a", expires_at_ms=NOW)], ModelState.NOT_LOADED, id="long ago"
        ),
        pytest.param(
            [model(), copy("m", "gone")], ModelState.NOT_LOADED, id="its instance has gone"
        ),
        pytest.param(
            [model(), instance("d", DRAINING), copy("m", "d")],
            ModelState.LOADED,
            id="a draining instance still has it in memory",
        ),
    ],
)
def test_state(records: list[Record], state: ModelState) -> None:
    view = view_of(instance("a"), instance("b"), *records)
    assert model_status(view, "m", NOW).state is state


def test_a_load_that_this_router_asked_for_is_loading() -> None:
    view = view_of(model(), instance("a"), failure("m", "b"))
    view.add_pending("m", "a", size_bytes=10, now_ms=NOW)
    assert model_status(view, "m", NOW).state is ModelState.LOADING


def test_copies_are_the_latest_first_with_failures_among_them() -> None:
    view = view_of(
        model(),
        instance("a"),
        instance("b"),
        copy("m", "a", loaded_at_ms=NOW - 50),
        copy("m", "b", LOADING, claimed_at_ms=NOW - 5),
        failure("m", "c", failed_at_ms=NOW - 20, message="bad magic"),
    )
    status = model_status(view, "m", NOW)
    assert [(c.instance_id, c.state) for c in status.copies] == [
        ("b", ModelState.LOADING),
        ("c", ModelState.LOADING_FAILED),
        ("a", ModelState.LOADED),
    ]
    assert status.errors == ("c: FAILED_PRECONDITION: bad magic",)


def test_an_alias_has_its_active_models_state() -> None:
    view = view_of(vmodel("v", "m"), model(), instance("a"), copy("m", "a"))
    status = name_status(view, "v", NOW)
    assert (status.name, status.model_id, status.state) == ("v", "m", ModelState.LOADED)
    assert name_status(view, "nope", NOW).state is ModelState.NOT_FOUND


def test_phases_of_an_alias() -> None:
    assert vmodel_phase(None) == "NOT_FOUND"
    assert vmodel_phase(vmodel("v", "a")) == "DEFINED"
    assert vmodel_phase(vmodel("v", "a", "b")) == "TRANSITIONING"
    assert vmodel_phase(vmodel("v", "a", "b", failed="x")) == "TRANSITION_FAILED"
