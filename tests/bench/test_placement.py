"""The benchmark of placement runs, and its stream of copies is one that a store can take."""

from __future__ import annotations

from itertools import islice

from bench import placement
from bench.copy_events import events
from bench.effort import SMOKE
from bench.report import Report
from mesh.store.api import Delete, Put


def test_it_runs_and_tells_each_kind_of_mesh() -> None:
    report = Report("placement")
    placement.placements(report, SMOKE)
    placement.decoding(report, SMOKE)
    assert [row["mesh"] for row in report.rows[:4]] == ["empty", "part", "full", "worst"]
    assert [figure.unit for figure in report.figures] == ["ms", "cores"]
    assert report.rows[4]["path"] == "decoding and view, no store"


def test_copies_are_claimed_loaded_and_removed_in_turn() -> None:
    there: dict[str, int] = {}
    for event in islice(events(models=300, instances=50, seed=1), 2_000):
        if isinstance(event, Put):
            there[event.key] = there.get(event.key, 0) + 1
            assert there[event.key] <= 2  # LOADING, then LOADED
        else:
            assert isinstance(event, Delete) and there.pop(event.key) == 2
    assert len(there) in (50, 51)
