"""Numbers of the benchmarks: spreads, pairs, percentiles, figures, tables."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.effort import FULL, SMOKE, USUAL
from bench.report import Figure, Report, machine, table
from bench.stats import Spread, pair_ratios, percentile, spread


def test_a_spread_is_the_median_with_its_extremes() -> None:
    assert spread([3.0, 1.0, 2.0]) == Spread(2.0, 1.0, 3.0, 3)
    assert spread([4.0, 1.0]).median == 2.5


def test_ratios_are_taken_pair_by_pair() -> None:
    # Both of the second pair were slow: the machine, not the code. Medians alone would say 5.5.
    assert pair_ratios([10.0, 1.0], [2.0, 0.2]) == Spread(5.0, 5.0, 5.0, 2)


@pytest.mark.parametrize(
    ("measure", "says"),
    [
        (lambda: spread([]), "made no run"),
        (lambda: pair_ratios([1.0], [1.0, 2.0]), "1 runs cannot be paired with 2"),
        (lambda: pair_ratios([1.0], [0.0]), "measured zero"),
        (lambda: percentile([], 0.5), "of nothing"),
    ],
)
def test_what_measured_nothing_is_refused(measure, says) -> None:
    with pytest.raises(ValueError, match=says):
        measure()


@given(
    st.lists(st.integers(0, 1_000), min_size=1, max_size=200), st.sampled_from([0.5, 0.9, 0.99, 1])
)
def test_a_percentile_is_the_smallest_value_that_covers_its_share(
    values: list[int], share: float
) -> None:
    found = percentile(values, share)
    assert found in values
    assert sum(value <= found for value in values) >= share * len(values) - 1e-6
    assert sum(value < found for value in values) < share * len(values)


@pytest.mark.parametrize(
    ("sense", "value", "reached"),
    [("at least", 2.0, True), ("at least", 1.99, False), ("at most", 2.0, True),
     ("at most", 2.01, False)],
)  # fmt: skip
def test_a_figure_is_reached_by_its_median(sense, value, reached) -> None:
    figure = Figure("f", Spread(value, 0.0, 100.0, 7), 2.0, sense)
    assert figure.reached is reached


def test_a_report_prints_rows_figures_and_notes() -> None:
    report = Report("relay")
    report.row("small", proxy="mesh", rate=Spread(30_000.0, 20_000.0, 40_000.0, 7))
    report.row("small", proxy="envoy", rate=10_000.0, only="here")
    report.figure("rate : envoy", spread([3.0]), "at least", 2.5)
    report.figure("latency", spread([7.0]), "at most", 5, "ms")
    report.note("skipped: haproxy is not installed")
    text = report.text()
    assert "mesh   30,000 (20,000..40,000)\n" in text
    assert "envoy  10,000                   here\n" in text
    assert "rate : envoy  3 ×                at least 2.5 ×  yes\n" in text
    assert "latency       7 ms               at most 5 ms    NO\n" in text
    assert text.endswith("note: skipped: haproxy is not installed")


def test_the_json_has_machine_commit_and_figures(tmp_path: Path) -> None:
    report = Report("relay")
    report.row("small", proxy="mesh", rate=spread([1.0, 2.0, 4.0]))
    report.figure("rate", spread([3.0]), "at least", 2.5)
    written = json.loads(report.write(tmp_path / "new", machine()).read_text("utf-8"))
    assert written["benchmark"] == "relay"
    assert {"cpu", "cores", "kernel", "python", "commit", "measured_at"} <= written[
        "machine"
    ].keys()
    assert written["rows"][0]["rate"] == {"median": 2.0, "low": 1.0, "high": 4.0, "count": 3}
    assert written["figures"][0]["reached"] is True


def test_a_table_lines_up() -> None:
    assert table(["a", "bb"], [["ccc", "d"]]) == "a    bb\n---  --\nccc  d"


def test_the_usual_effort_has_seven_pairs() -> None:
    assert USUAL.pairs >= 7
    assert FULL.pairs > USUAL.pairs
    assert SMOKE.scaled(10_000, 100) == 100
    assert USUAL.scaled(10_000) == 10_000
