"""Live settings: what they mean to placement, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from mesh.core.errors import InvalidArgument
from mesh.core.live_config import RUNTIMES, LiveConfig, pod_runtimes, type_constraints
from mesh.core.types import TypeConstraint
from mesh.core.view import ClusterView

GPU = {"required": ["gpu"], "preferred": ["big"]}


def test_constraints_are_by_format() -> None:
    assert type_constraints({"onnx": GPU, "sklearn": {}}) == {
        "onnx": TypeConstraint("onnx", ("gpu",), ("big",)),
        "sklearn": TypeConstraint("sklearn"),
    }


@pytest.mark.parametrize(
    ("value", "place", "found"),
    [
        pytest.param({"onnx": ["gpu"]}, "type_constraints.onnx", "['gpu']", id="not an object"),
        pytest.param(
            {"onnx": {"needed": []}}, "type_constraints.onnx", "'needed'", id="an unknown part"
        ),
        pytest.param(
            {"onnx": {"required": "gpu"}}, "type_constraints.onnx.required", "'gpu'", id="one text"
        ),
        pytest.param(
            {"onnx": {"preferred": [1]}}, "type_constraints.onnx.preferred", "[1]", id="a number"
        ),
        pytest.param(
            {"onnx": {"required": [""]}}, "type_constraints.onnx.required", "['']", id="no text"
        ),
    ],
)
def test_what_makes_no_sense_is_refused_and_changes_nothing(
    value: dict[str, Any], place: str, found: str
) -> None:
    view = ClusterView()
    view.put_config("type_constraints", {"onnx": GPU})
    with pytest.raises(InvalidArgument) as caught:
        view.put_config("type_constraints", value)
    assert caught.value.message.startswith(f"{place}: ") and found in caught.value.message
    assert view.type_constraints == type_constraints({"onnx": GPU})
    assert view.config == {"type_constraints": {"onnx": GPU}}


def test_a_format_without_an_entry_has_the_default_one() -> None:
    view = ClusterView()
    assert view.constraint_of("onnx") is None
    view.put_config("type_constraints", {"onnx": GPU})
    assert view.constraint_of("sklearn") is None
    view.put_config("type_constraints", {"onnx": {}, "_default": GPU})
    assert view.constraint_of("onnx") == TypeConstraint("onnx")
    assert view.constraint_of("sklearn") == TypeConstraint("_default", ("gpu",), ("big",))


def test_deleted_constraints_hold_no_more() -> None:
    view = ClusterView()
    view.put_config("type_constraints", {"onnx": GPU})
    view.delete_config("type_constraints")
    view.delete_config("never there")
    assert view.constraint_of("onnx") is None and view.config == {}


def test_a_snapshot_replaces_all_settings() -> None:
    settings = LiveConfig()
    settings.put("policy", {"hops_max": 2})
    settings.put("type_constraints", {"onnx": GPU})
    settings.replace({"policy": {"hops_max": 3}, "from_the_future": {"x": 1}})
    assert settings.by_name == {"policy": {"hops_max": 3}, "from_the_future": {"x": 1}}
    assert settings.type_constraints == {}


# --- runtimes whose pods come on demand ---------------------------------------------------------


def test_a_runtime_serves_its_formats_to_models_that_ask_for_no_more_than_its_labels() -> None:
    config = LiveConfig()
    config.put(
        RUNTIMES,
        {"cpu": {"formats": ["onnx"], "labels": ["rt:cpu"]}, "gpu": {"formats": ["onnx", "torch"]}},
    )
    found = [
        (config.runtime_for("onnx", ()), config.runtime_for("torch", ())),
        (config.runtime_for("onnx", ("rt:cpu",)), config.runtime_for("torch", ("rt:cpu",))),
    ]
    assert [[one.name if one else None for one in pair] for pair in found] == [
        ["cpu", "gpu"],
        ["cpu", None],
    ]
    config.delete(RUNTIMES)
    assert config.runtime_for("onnx", ()) is None


@pytest.mark.parametrize(
    ("value", "place"),
    [
        pytest.param({"r": "onnx"}, "runtimes.r", id="not an object"),
        pytest.param({"r": {"formats": "onnx"}}, "runtimes.r.formats", id="one text"),
        pytest.param({"r": {"labels": [3]}}, "runtimes.r.labels", id="a number"),
    ],
)
def test_runtimes_that_make_no_sense_are_refused(value: dict[str, Any], place: str) -> None:
    with pytest.raises(InvalidArgument, match=place):
        pod_runtimes(value)
