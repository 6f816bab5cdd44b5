"""Streams are what they say, the same for a seed, and a bad trace is told where it is bad."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from bench.sim import workloads
from bench.sim.workloads import Shape, Workload

SHAPE = Shape(models=300, requests=6_000)
MADE = [
    workloads.zipf(SHAPE, 0.9),
    workloads.drift(SHAPE, life_requests=1_000),
    workloads.turnover(SHAPE, every_requests=2_000),
    workloads.bursts(SHAPE),
    workloads.diurnal(SHAPE),
    workloads.scan(SHAPE, every_requests=2_000),
    workloads.zipf(Shape(models=300, requests=6_000, mixed=True), 0.9),
    workloads.trace(),
]


@pytest.mark.parametrize("workload", MADE, ids=lambda workload: workload.name)
def test_a_stream_is_in_order_complete_and_the_same_for_a_seed(workload: Workload) -> None:
    stream, again = workload.all_requests(7), workload.all_requests(7)
    assert len(stream.model) == workload.request_count
    assert (np.diff(stream.at_ms) >= 0).all()
    assert stream.model.min() >= 0 and stream.model.max() < workload.model_count
    assert (stream.model == again.model).all() and (stream.at_ms == again.at_ms).all()
    assert (workload.size_bytes > 0).all() and (workload.load_ms > 0).all()


@pytest.mark.parametrize("workload", MADE[:-1], ids=lambda workload: workload.name)
def test_another_seed_is_another_stream(workload: Workload) -> None:
    assert (workload.all_requests(1).model != workload.all_requests(2).model).any()


def test_a_scan_asks_for_every_model() -> None:
    stream = workloads.scan(SHAPE, every_requests=2_000).all_requests(1)
    assert len(np.unique(stream.model)) == SHAPE.models


def test_a_plain_trace_is_read_and_terms_stand_where_a_model_comes_first(tmp_path: Path) -> None:
    path = tmp_path / "small.csv"
    path.write_text("at_ms,model_id,size_bytes,load_ms\n0,a,10,5\n3,b,20,6\n9,a,,\n", "utf-8")
    workload = workloads.trace(path)
    assert workload.size_bytes.tolist() == [10, 20]
    assert workload.load_ms.tolist() == [5, 6]
    assert workload.all_requests(0).model.tolist() == [0, 1, 0]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("at,model\n", "the first line must be"),
        ("at_ms,model_id,size_bytes,load_ms\n0,a,10,5\nx,a,,\n", "line 3"),
        ("at_ms,model_id,size_bytes,load_ms\n0,a,,\n", "line 2"),
        ("at_ms,model_id,size_bytes,load_ms\n5,a,1,1\n4,a,,\n", "goes back in time"),
    ],
)
def test_a_bad_trace_says_what_and_where(tmp_path: Path, content: str, told: str) -> None:
    path = tmp_path / "bad.csv"
    path.write_text(content, "utf-8")
    with pytest.raises(ValueError, match=told):
        workloads.trace(path)
