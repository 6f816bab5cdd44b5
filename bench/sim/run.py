"""``python -m bench sim``: workloads through a simulated mesh, one table each.

A run is its options and its seed: what a check finds broken is printed with the command that
breaks it again.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from bench.effort import USUAL, Effort
from bench.process import BenchError
from bench.report import ROOT, Report, machine
from bench.sim import faults, one_cache, workloads
from bench.sim.baselines import PLACEMENTS, placing_by
from bench.sim.cluster import Cluster
from bench.sim.faults import Fault
from bench.sim.tables import Outcome
from bench.sim.workloads import Shape, Workload
from bench.sim.world import MIB, Settings
from bench.stats import spread
from mesh.core.policy import Policy, overridden

RESULTS: Final = ROOT / "bench/results"

WORKLOADS: Final[Mapping[str, Callable[[Shape], Workload]]] = {
    "zipf": lambda shape: workloads.zipf(shape, 0.9),
    "bursts": workloads.bursts,
    "diurnal": lambda shape: workloads.diurnal(shape, days=0.05),
    "scan": lambda shape: workloads.scan(shape, every_requests=shape.requests // 3),
    "drift": lambda shape: workloads.drift(shape, life_requests=shape.requests // 4),
    "trace": lambda shape: workloads.trace(),
}
# Of a mesh of ten, half-way through its minutes.
FAULTS: Final[Mapping[str, Callable[[float], list[Fault]]]] = {
    "nothing": lambda at: [],
    "two crashes": lambda at: [faults.Crash(at, 3), faults.Crash(at + 30_000, 5)],
    "SIGSTOP 5 s": lambda at: [faults.Stop(at, 3, 5_000)],
    "SIGSTOP 15 s": lambda at: [faults.Stop(at, 3, 15_000)],
    "rolling restart": lambda at: [faults.Drain(at + 15_000 * n, n) for n in range(10)],
    "restart of all": lambda at: [faults.RestartAll(at)],
    "etcd away 30 s": lambda at: [faults.StoreAway(at, 30_000)],
    "slow loads": lambda at: [faults.SlowLoads(at, 2, 120_000, 20.0)],
    "broken models": lambda at: [faults.BadModels(at, always=5, sometimes=50, share=0.3)],
    "router crash": lambda at: [faults.RouterCrash(at, 0)],
}
# Rows of each workload: what places, and which order evicts.
ROWS: Final = (
    ("production", "frequency"),
    ("production", "lru"),
    ("random", "frequency"),
    ("least-loaded", "frequency"),
    ("rendezvous", "frequency"),
)


@dataclass(frozen=True, slots=True)
class Options:
    """What a person chose."""

    workloads: tuple[str, ...] = tuple(WORKLOADS)
    seed: int = 1
    instances: int = 10
    models: int = 2_000
    minutes: float = 20.0
    requests_per_s: float = 20.0
    memory_share: float = 0.1  # of all models that fits into all instances
    exponent: float = 0.9  # of Zipf's law, in the workload of that name
    mixed: bool = False
    policy: tuple[str, ...] = ()  # name=value
    placements: tuple[str, ...] = ()
    faults: tuple[str, ...] = ()

    def command(self, workload: str, placement: str, fault: str) -> str:
        told = [f"python -m bench sim --workload {workload} --seed {self.seed}"]
        told.append(f"--instances {self.instances} --models {self.models}")
        told.append(f"--minutes {self.minutes:g} --rate {self.requests_per_s:g}")
        told.append(f"--memory-share {self.memory_share:g} --placement {placement}")
        told.append(f"--exponent {self.exponent:g}")
        told += ["--mixed"] if self.mixed else []
        told += [f"--policy {one}" for one in self.policy]
        told += [f"--fault '{fault}'"] if fault else []
        return " ".join(told)

    def workload(self, name: str) -> Workload:
        shape = Shape(
            models=self.models,
            requests=int(self.minutes * 60 * self.requests_per_s),
            per_s=self.requests_per_s,
            mixed=self.mixed,
        )
        if name == "zipf":
            return workloads.zipf(shape, self.exponent)
        return WORKLOADS[name](shape)


BIG: Final = Options(
    ("zipf",),
    instances=100,
    models=100_000,
    minutes=60.0,
    requests_per_s=280.0,
    memory_share=0.3,
    exponent=1.1,
    placements=("production",),
)


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


def run_one(
    name: str, options: Options, placement: str = "production", order: str = "", fault: str = ""
) -> Outcome:
    """Raises BenchError with the command that fails again."""
    workload = options.workload(name)
    settings = settings_of(options, workload)
    if order:
        settings = replace(settings, policy=overridden(settings.policy, {"eviction_order": order}))
    place = PLACEMENTS[placement]
    happening = FAULTS[fault](options.minutes * 30_000.0) if fault else []
    try:
        with placing_by(place(options.seed) if place is not None else None):
            return Cluster(settings, workload).run(placement, happening)
    except Exception as error:
        command = options.command(name, placement, fault)
        raise BenchError(f"{type(error).__name__}: {error}\nreplay: {command}") from error


def tables(report: Report, options: Options) -> None:
    """One a workload: production, the baselines, the clairvoyant bound."""
    for name in options.workloads:
        workload = options.workload(name)
        section = f"{workload.name}: {workload.text}"
        rows = [(p, "") for p in options.placements] or list(ROWS)
        for placement, order in rows:
            outcome = run_one(name, options, placement, order)
            label = f"{placement}, lru" if order == "lru" else placement
            report.row(section, **{**outcome.row(), "placement": label})
            print(f"  {workload.name}, {label}: {outcome.cpu_s:.0f} s", file=sys.stderr, flush=True)
        if not options.placements:
            _bound(report, section, workload, options)


def _bound(report: Report, section: str, workload: Workload, options: Options) -> None:
    """All memory as one cache that knows the future. Judged as the rows are, when warm."""
    capacity = settings_of(options, workload).capacity_bytes * options.instances
    stream = workload.all_requests(options.seed)
    bound = one_cache.clairvoyant(workload, stream, capacity)
    report.row(section, placement="(clairvoyant bound)", **{"warm hits": round(bound.hit_ratio, 4)})


def failures(report: Report, options: Options, names: Sequence[str] = tuple(FAULTS)) -> None:
    for name in names:
        outcome = run_one(options.workloads[0], options, fault=name)
        row = {key: cell for key, cell in outcome.row().items() if key != "placement"}
        report.row("failures, half-way through", failure=name, **row)
        print(f"  {name}: {outcome.cpu_s:.0f} s", file=sys.stderr, flush=True)


def big(report: Report) -> None:
    """The figure of the simulator itself. Most of its time goes into loads, half a millisecond each
    on an idle core: at Zipf 1.0 there are twice as many as here."""
    outcome = run_one("zipf", BIG)
    report.row("100,000 models, 100 instances, one hour", **outcome.row())
    report.figure("CPU time of the large run", spread([outcome.cpu_s]), "at most", 120.0, "s")
    report.figure("imbalance of its loads", spread([outcome.imbalance]), "at most", 1.3)
    report.figure("requests in it", spread([outcome.requests]), "at least", 1_000_000, "")


def measure(report: Report, effort: Effort, options: Options | None = None) -> None:
    """What ``python -m bench`` runs among the others."""
    chosen = options or Options(minutes=max(0.5, 20.0 * effort.scale))
    if effort.scale < 1.0:
        tables(report, replace(chosen, workloads=("zipf",), models=200))
        return
    tables(report, chosen)
    if not chosen.placements:
        failures(report, replace(chosen, workloads=("zipf",)))


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m bench sim",
        description="Run workloads through a simulated mesh in virtual time.",
    )
    usual = Options()
    made.add_argument("--workload", action="append", choices=tuple(WORKLOADS))
    made.add_argument("--seed", type=int, default=usual.seed)
    made.add_argument("--instances", type=int, default=usual.instances)
    made.add_argument("--models", type=int, default=usual.models)
    made.add_argument("--minutes", type=float, default=usual.minutes, help="of virtual time")
    made.add_argument("--rate", type=float, default=usual.requests_per_s, help="requests a second")
    made.add_argument("--memory-share", type=float, default=usual.memory_share,
                      help="of all models that fits into all instances")  # fmt: skip
    made.add_argument("--exponent", type=float, default=usual.exponent, help="of zipf")
    made.add_argument("--mixed", action="store_true", help="sizes and load times differ")
    made.add_argument("--policy", action="append", default=[], metavar="NAME=VALUE")
    made.add_argument("--placement", action="append", default=[], choices=tuple(PLACEMENTS),
                      help="these only; usually all, and the clairvoyant bound")  # fmt: skip
    made.add_argument("--fault", action="append", default=[], choices=tuple(FAULTS))
    made.add_argument("--big", action="store_true", help="100,000 models x 100 instances, an hour")
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
        exponent=given.exponent,
        mixed=given.mixed,
        policy=tuple(given.policy),
        placements=tuple(given.placement),
        faults=tuple(given.fault),
    )
    report = Report("sim-big" if given.big else "sim")
    began = time.perf_counter()
    try:
        if given.big:
            big(report)
        elif options.faults:
            failures(report, options, options.faults)
        else:
            measure(report, USUAL, options)
    except (BenchError, ValueError) as error:
        print(f"{report.text()}\nFAILED: {error}", file=sys.stderr)
        return 1
    report.note(f"took {time.perf_counter() - began:.0f} s")
    path = report.write(given.results, machine())
    print(f"{report.text()}\nwritten: {path}")
    return 0
