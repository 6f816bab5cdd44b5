"""``python -m bench sim``: what it prints, and how a run that breaks is replayed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from bench.process import BenchError
from bench.sim import run
from bench.sim.baselines import placing_by
from bench.sim.run import Options, run_one
from mesh.core.placement import Placement

QUICK = Options(workloads=("zipf",), models=60, minutes=0.5, instances=3)


def test_a_broken_run_names_its_seed_and_the_command_that_replays_it() -> None:
    nobody = Placement("nobody", "a joke", None, 1, False, "")
    with placing_by(lambda *_, **__: nobody), pytest.raises(BenchError) as caught:
        run_one("zipf", replace(QUICK, seed=9))
    assert "Broken" in str(caught.value)
    assert "python -m bench sim --workload zipf --seed 9 --instances 3" in str(caught.value)


def test_a_table_with_the_baselines_and_the_bound(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = ["--workload", "scan", "--models", "60", "--minutes", "0.5", "--instances", "3"]
    assert run.main([*told, "--placement", "rendezvous", "--results", str(tmp_path)]) == 0
    assert "rendezvous" in capsys.readouterr().out
    rows = json.loads((tmp_path / "sim.json").read_text())["rows"]
    assert rows[0]["requests"] == 600 and rows[0]["failed"] == 0


def test_a_threshold_that_does_not_exist_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = ["--workload", "zipf", "--policy", "hops=3", "--results", str(tmp_path)]
    with pytest.raises(Exception, match="hops"):
        run.main(told)


@pytest.mark.parametrize("name", sorted(set(run.WORKLOADS) - {"trace"}))
def test_every_workload_runs(name: str) -> None:
    assert run_one(name, QUICK).failed == 0
