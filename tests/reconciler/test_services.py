"""The patch by which a status is written where others write the object all the time."""

from __future__ import annotations

from typing import Any

import pytest

from mesh.reconciler.services import merge_patch


@pytest.mark.parametrize(
    ("before", "after", "patch"),
    [
        pytest.param({}, {"url": "a"}, {"url": "a"}, id="new"),
        pytest.param({"url": "a"}, {"url": "a"}, {}, id="the same"),
        pytest.param({"url": "a"}, {}, {"url": None}, id="gone"),
        pytest.param(
            {"model": {"states": {"a": 1, "b": 2}, "failure": {"reason": "x"}}},
            {"model": {"states": {"a": 1, "b": 3}}},
            {"model": {"states": {"b": 3}, "failure": None}},
            id="inside",
        ),
        pytest.param(
            {"conditions": [1, 2]}, {"conditions": [1]}, {"conditions": [1]}, id="lists are whole"
        ),
        pytest.param({"model": {"a": 1}}, {"model": 5}, {"model": 5}, id="another type"),
    ],
)
def test_merge_patch(before: dict[str, Any], after: dict[str, Any], patch: dict[str, Any]) -> None:
    assert merge_patch(before, after) == patch
