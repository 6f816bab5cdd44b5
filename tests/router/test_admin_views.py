"""The admin service's JSON: what is encoded is decoded again, and versions mix."""

from __future__ import annotations

import json

import pytest

from mesh.admin_views import (
    ConcreteModel,
    CopyView,
    InstanceRow,
    ModelDescription,
    ModelRow,
    decode,
    decode_list,
    encode,
)
from mesh.core.errors import InvalidArgument

DESCRIPTION = ModelDescription(
    row=ModelRow(name="iris", model_id="iris__isvc-0123456789", alias=True, state="LOADED"),
    active=ConcreteModel(
        model_id="iris__isvc-0123456789",
        size_bytes_measured=4_096,
        labels={"team": "a"},
        copies=(CopyView("pod-1", "LOADED", details={"queue": 3}),),
    ),
    manifest={"kind": "InferenceService"},
    unreachable={"pod-2": "time-out"},
)


def test_a_description_survives_the_round_trip() -> None:
    assert decode(ModelDescription, encode(DESCRIPTION)) == DESCRIPTION


def test_a_list_survives_the_round_trip() -> None:
    rows = (InstanceRow("pod-1", model_types=("onnx", "sklearn")), InstanceRow("pod-2"))
    assert decode_list(InstanceRow, encode(rows)) == rows


def test_fields_of_a_newer_router_are_left_out_and_missing_ones_have_defaults() -> None:
    raw = json.dumps({"name": "iris", "invented_in_v9": [1, 2]})
    assert decode(ModelRow, raw) == ModelRow(name="iris")


@pytest.mark.parametrize(
    ("raw", "what"),
    [
        ("{", "not JSON"),
        ("[]", "object was expected"),
        ('{"name": 3}', r"ModelRow\.name: str was expected, got int"),
        ('{"name": "a", "instance_ids": "pod"}', r"ModelRow\.instance_ids: a list"),
        ('{"model_id": "a"}', "name"),
    ],
)
def test_wrong_json_is_named(raw: str, what: str) -> None:
    with pytest.raises(InvalidArgument, match=what):
        decode(ModelRow, raw)


def test_a_list_must_be_a_list() -> None:
    with pytest.raises(InvalidArgument, match="a list of ModelRow"):
        decode_list(ModelRow, "{}")
