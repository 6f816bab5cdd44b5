"""``python -m bench``: run the benchmarks, print their tables, write their JSON."""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from bench import batching, controller, density, frameworks, inference, miss, placement, pull, relay
from bench.effort import FULL, SMOKE, USUAL, Effort
from bench.process import BenchError, Unavailable
from bench.report import ROOT, Report, machine
from bench.sim import run as sim

RESULTS = ROOT / "bench/results/local"

Part = tuple[str, Callable[[Report, Effort], None]]
PARTS: dict[str, Part] = {
    "relay": ("the router's relay against grpcio, Envoy and HAProxy", relay.measure),
    "instance": ("inference in one instance against a bare loop", inference.measure_instance),
    "end-to-end": ("router and instance against the instance", inference.measure_end_to_end),
    "batching": ("joined requests against the gain of bare rows at once", batching.measure),
    "density": ("10,000 registered models, Zipf requests", density.measure),
    "miss": ("what a miss adds, and hits beside a large load", miss.measure),
    "frameworks": (
        "cold start, scikit-learn against MLServer, 5,000 resident models",
        frameworks.measure,
    ),
    "placement": ("choosing among 1,000 instances; a view's CPU by events", placement.measure),
    "pull": ("a pull from S3 on loopback against raw clients", pull.measure),
    "controller": ("2,000 InferenceServices against a real API server", controller.measure),
    "sim": ("a mesh in virtual time; `sim --help` for its own options", sim.measure),
}


def parser() -> argparse.ArgumentParser:
    lines = "\n".join(f"  {name:12} {text}" for name, (text, _) in PARTS.items())
    made = argparse.ArgumentParser(
        prog="python -m bench",
        description="Measure the mesh against baselines of the same run.",
        epilog=f"parts:\n{lines}\n\nrelay scenarios: {', '.join(relay.SCENARIOS)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("parts", nargs="*", metavar="PART", help="all of them when none is named")
    made.add_argument("--full", action="store_true", help="more and longer pairs")
    made.add_argument("--smoke", action="store_true", help="does it run; the numbers mean nothing")
    made.add_argument("--pairs", type=int, help="interleaved pairs (usual: 7)")
    made.add_argument("--seconds", type=float, help="length of one run (usual: 0.35)")
    made.add_argument("--scenario", action="append", choices=relay.SCENARIOS, help="of the relay")
    made.add_argument(
        "--results", type=Path, default=RESULTS, help="folder of the JSON (%(default)s)"
    )
    made.add_argument("--strict", action="store_true", help="exit 1 when a figure is not reached")
    return made


def effort_of(options: argparse.Namespace) -> Effort:
    chosen = FULL if options.full else SMOKE if options.smoke else USUAL
    return Effort(
        pairs=options.pairs or chosen.pairs,
        seconds=options.seconds or chosen.seconds,
        scale=chosen.scale,
        wide=chosen.wide,
    )


def main(arguments: list[str], parts: Mapping[str, Part] = PARTS) -> int:
    if arguments[:1] == ["sim"] and parts is PARTS:
        return sim.main(arguments[1:])
    options = parser().parse_args(arguments)
    unknown = [name for name in options.parts if name not in parts]
    if unknown:
        parser().error(f"no part {', '.join(unknown)}; there are {', '.join(parts)}")
    effort = effort_of(options)
    found, missed, failed, skipped = 0, [], [], []
    for name in options.parts or parts:
        report = Report(name)
        started = time.perf_counter()
        try:
            if name == "relay" and options.scenario:
                relay.measure(report, effort, options.scenario)
            else:
                parts[name][1](report, effort)
        except Unavailable as missing:
            skipped.append(name)
            print(f"== {name} ==\nskipped: {missing}\n", flush=True)
            continue
        except (BenchError, ValueError) as error:
            failed.append(name)
            print(f"{report.text()}\nFAILED: {error}\n", flush=True)
            continue
        report.note(f"took {time.perf_counter() - started:.0f} s")
        path = report.write(options.results, machine())
        print(f"{report.text()}\nwritten: {_relative(path)}\n", flush=True)
        found += len(report.figures)
        missed += [figure.name for figure in report.figures if not figure.reached]
    print(f"{found - len(missed)} of {found} figures reached")
    for name in missed:
        print(f"  not reached: {name}")
    for name in skipped:
        print(f"  skipped: {name}")
    for name in failed:
        print(f"  failed: {name}")
    return 1 if failed or (options.strict and missed) else 0


def _relative(path: Path) -> Path:
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path


if __name__ == "__main__":
    # So that the children are stopped too: an exception unwinds what started them.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(main(sys.argv[1:]))
