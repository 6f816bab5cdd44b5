"""``python -m bench sim``: workloads through a simulated mesh, one table each.

A run is its settings and its seed: whatever a check finds broken is printed with the command that
breaks it again.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bench.effort import USUAL, Effort
from bench.process import BenchError
from bench.report import ROOT, Report, machine
from bench.sim import workloads
from bench.sim.cluster import Cluster
from bench.sim.tables import Outcome
from bench.sim.workloads import Shape, Workload
from bench.sim.world import MIB, Settings
from mesh.core.policy import Policy, overridden

RESULTS: Final = ROOT / "bench/results"

WORKLOADS: Final[Mapping[str, Callable[[Shape], Workload]]] = {
    "zipf": lambda shape: workloads.zipf(shape, 0.9),
    "bursts": workloads.bursts,
    "diurnal": lambda shape: workloads.diurnal(shape, days=0.25),
    "scan": workloads.scan,
    "drift": workloads.drift,
    "trace": lambda shape: workloads.trace(),
}


@dataclass(frozen=True, slots=True)
class Options:
    """What a person chose."""

    workloads: tuple[str, ...]
    seed: int = 1
    instances: int = 10
    models: int = 10_000
    minutes: float = 20.0
    requests_per_s: float = 50.0
    memory_share: float = 0.1  # of all models that fits into all instances
    mixed: bool = False
    policy: tuple[str, ...] = ()  # name=value

    def command(self, workload: str) -> str:
        told = [f"python -m bench sim --workload {workload} --seed {self.seed}"]
        told.append(f"--instances {self.instances} --models {self.models}")
        told.append(f"--minutes {self.minutes:g} --rate {self.requests_per_s:g}")
        told.append(f"--memory-share {self.memory_share:g}")
        told += ["--mixed"] if self.mixed else []
        told += [f"--policy {one}" for one in self.policy]
        return " ".join(told)


def policy_of(overrides: Sequence[str]) -> Policy:
    """Raises InvalidArgument that names the field."""
    chosen: dict[str, object] = {}
    for one in overrides:
        name, _, value = one.partition("=")
        chosen[name] = _value(value)
    return overridden(Policy(default_model_size_bytes=MIB), chosen)


def _value(text: str) -> object:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def settings_of(options: Options, workload: Workload) -> Settings:
    total = int(workload.size_bytes.sum() * options.memory_share)
    # At least twice the largest model: a smaller instance could not change it for another.
    per_instance = max(total // options.instances, 2 * int(workload.size_bytes.max()))
    return Settings(
        seed=options.seed,
        instances=options.instances,
        capacity_bytes=per_instance,
        policy=policy_of(options.policy),
    )


def run_one(name: str, options: Options) -> Outcome:
    shape = Shape(
        models=options.models,
        requests=int(options.minutes * 60 * options.requests_per_s),
        per_s=options.requests_per_s,
        mixed=options.mixed,
    )
    workload = WORKLOADS[name](shape)
    try:
        return Cluster(settings_of(options, workload), workload).run()
    except Exception as error:
        raise BenchError(f"{error}\nseed {options.seed}: {options.command(name)}") from error


def measure(report: Report, effort: Effort, options: Options | None = None) -> None:
    """One table a workload."""
    chosen = options or Options(tuple(WORKLOADS), minutes=20.0 * effort.scale)
    for name in chosen.workloads:
        outcome = run_one(name, chosen)
        report.row(outcome.workload, **outcome.row())


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m bench sim",
        description="Run workloads through a simulated mesh in virtual time.",
    )
    made.add_argument("--workload", action="append", choices=tuple(WORKLOADS))
    made.add_argument("--seed", type=int, default=1)
    made.add_argument("--instances", type=int, default=10)
    made.add_argument("--models", type=int, default=10_000)
    made.add_argument("--minutes", type=float, default=20.0, help="of virtual time")
    made.add_argument("--rate", type=float, default=50.0, help="requests a second")
    made.add_argument("--memory-share", type=float, default=0.1, help="of all models that fits")
    made.add_argument("--mixed", action="store_true", help="sizes and load times differ")
    made.add_argument("--policy", action="append", default=[], metavar="NAME=VALUE")
    made.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON")
    return made


def main(arguments: Sequence[str]) -> int:
    """``python -m bench sim ...`` with options of its own."""
    given = parser().parse_args(arguments)
    options = Options(
        workloads=tuple(given.workload or WORKLOADS),
        seed=given.seed,
        instances=given.instances,
        models=given.models,
        minutes=given.minutes,
        requests_per_s=given.rate,
        memory_share=given.memory_share,
        mixed=given.mixed,
        policy=tuple(given.policy),
    )
    report = Report("sim")
    began = time.perf_counter()
    try:
        measure(report, USUAL, options)
    except (BenchError, ValueError) as error:
        print(f"{report.text()}\nFAILED: {error}", file=sys.stderr)
        return 1
    report.note(f"took {time.perf_counter() - began:.0f} s")
    path = report.write(given.results, machine())
    print(f"{report.text()}\nwritten: {path}")
    return 0
