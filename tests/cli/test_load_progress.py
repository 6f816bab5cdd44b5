"""How far a pull is, as `mesh describe model` tells it."""

from __future__ import annotations

from typing import Any

import pytest

from mesh.admin_views import CopyView
from mesh.cli import output
from mesh.cli.quantities import format_progress

MIB = 1 << 20


@pytest.mark.parametrize(
    ("load", "shown"),
    [
        (
            {"phase": "fetching", "fetched_bytes": 120 * MIB, "total_bytes": 512 * MIB},
            "fetching: 120 MiB of 512 MiB (23 %)",
        ),
        (
            {"phase": "fetching", "fetched_bytes": 3 * MIB, "total_bytes": None},
            "fetching: 3 MiB of an unknown size",
        ),
        ({"phase": "fetching", "fetched_bytes": 0, "total_bytes": 0}, "fetching: 0 B of 0 B"),
        ({"phase": "loading", "fetched_bytes": 5, "total_bytes": 5}, "loading"),
    ],
)
def test_a_copy_that_loads_tells_how_far_it_is(load: dict[str, Any], shown: str) -> None:
    copy = CopyView(
        instance_id="pod-1", state="LOADING", address="h:1", size_bytes=1, claimed_at_ms=1,
        loaded_at_ms=0, pinned=False, inflight=0, details={"load": load, "priority": "LOW"},
    )  # fmt: skip
    lines = output._copy(copy, 1_000)
    assert lines[1].strip() == shown
    assert "load=" not in "\n".join(lines)
    assert "priority=LOW" in lines[2]


def test_progress_without_a_total_names_no_share() -> None:
    assert "%" not in format_progress(10, None)
