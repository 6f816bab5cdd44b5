"""(1) The router's relay against grpc.aio, Envoy and HAProxy.

Proxy and back end share one core, h2load has the other. The back end echoes and obeys windows. Our
proxy is the complete router: names, routes, metrics, limits, retained request bytes, deadlines.
Before anything is measured each proxy's content is compared byte for byte (``bench.verify``).
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench import h2load, proxies
from bench.effort import Effort
from bench.h2load import Load
from bench.payload import framed, infer_message
from bench.process import BenchError, Child, Unavailable, load_core
from bench.proxies import Proxy
from bench.report import Report
from bench.slow_reader import slow_reader_growth
from bench.stats import Spread, pair_ratios, percentile, spread
from bench.verify import verify_echo

MODEL = "bench-model"
SMALL_BYTES = 400
LARGE_BYTES = 4 << 20
MIB = 1 << 20

SMALL = Load(0, 8, 8)
LONE = Load(0, 1, 1)
LARGE = Load(0, 4, 1)
# Beside four streams of 4 MiB: eight clients, each with one request at a time.
BESIDE = Load(0, 8, 1)
STORM_CONNECTIONS = 1_000
STORM_REQUESTS = 15_000
FRESH_STORMS = 3
LONGEST_REQUEST_MS = 1_000.0
# What a proxy may hold when a client reads nothing of 16 replies of 4 MiB (64 MiB in all).
SLOW_READER_GROWTH_MIB = 16.0

SCENARIOS = ("small", "lone", "many", "large", "mixed", "slow-reader")


@dataclass(frozen=True, slots=True)
class Sample:
    """One run against one proxy. ``cpu_us``: CPU of the proxy per request."""

    run: h2load.Run
    cpu_us: float

    def percentile_us(self, share: float) -> float:
        return percentile(self.run.latencies_us, share)


Samples = dict[str, list[Sample]]


@dataclass(frozen=True, slots=True)
class Bodies:
    """The request bodies as files, for h2load."""

    small: Path
    large: Path


def measure(report: Report, effort: Effort, scenarios: Sequence[str] = SCENARIOS) -> None:
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
        bodies = Bodies(folder / "small", folder / "large")
        bodies.small.write_bytes(framed(infer_message(MODEL, SMALL_BYTES)))
        bodies.large.write_bytes(framed(infer_message(MODEL, LARGE_BYTES)))
        direct = stack.enter_context(proxies.echo_backend())
        running = [direct]
        for start in (proxies.mesh_router, proxies.haproxy, proxies.envoy, proxies.grpcio):
            try:
                running.append(stack.enter_context(start(direct.port)))
            except Unavailable as missing:
                report.note(f"skipped: {missing}")
        for proxy in running:
            verify_echo(proxy.name, proxy.port, MODEL)
        report.note(f"content checked with grpcio: {', '.join(proxy.name for proxy in running)}")
        by_name = {proxy.name: proxy for proxy in running}
        for scenario in scenarios:
            RUNNERS[scenario](report, effort, by_name, bodies)


def interleaved(
    targets: Sequence[Proxy], effort: Effort, body: Path, shape: Load, *, log: bool = False
) -> Samples:
    """A B C A B C ...: each target once a round, with as many requests as last ``seconds``."""
    reply_bytes = body.stat().st_size
    counts = {
        target.name: h2load.calibrated(
            target.port, body, shape, reply_bytes=reply_bytes, seconds=effort.seconds
        )
        for target in targets
    }
    samples: Samples = {target.name: [] for target in targets}
    for _ in range(effort.pairs):
        for target in targets:
            load = Load(counts[target.name], shape.connections, shape.streams)
            samples[target.name].append(sample(target, body, load, log=log))
    return samples


def sample(target: Proxy, body: Path, load: Load, *, log: bool = False) -> Sample:
    before = target.child.cpu_seconds()
    run = h2load.run(target.port, body, load, reply_bytes=body.stat().st_size, log=log)
    used = target.child.cpu_seconds() - before
    return Sample(run, used / load.requests * 1e6)


def chosen(running: dict[str, Proxy], *names: str) -> list[Proxy]:
    return [running[name] for name in names if name in running]


def _without_target(effort: Effort) -> tuple[str, ...]:
    """Baselines that a scenario can do without."""
    return ("envoy",) if effort.wide else ()


def ratio_of(samples: Samples, other: str, value: Callable[[Sample], float]) -> Spread | None:
    """Our value through the other's, pair by pair; None when there are no two of them."""
    if other == "mesh" or not {"mesh", other} <= samples.keys():
        return None
    return pair_ratios([value(s) for s in samples["mesh"]], [value(s) for s in samples[other]])


def rates(report: Report, section: str, samples: Samples) -> None:
    for name, mine in samples.items():
        report.row(
            section,
            proxy=name,
            **{
                "requests/s": spread([s.run.rate for s in mine]),
                "mean ms": spread([s.run.mean_us / 1e3 for s in mine]),
                "CPU us/request": spread([s.cpu_us for s in mine]),
                "mesh : it": ratio_of(samples, name, lambda s: s.run.rate) or "",
            },
        )


def small(report: Report, effort: Effort, running: dict[str, Proxy], bodies: Bodies) -> None:
    targets = chosen(running, "mesh", "haproxy", "envoy", "grpcio")
    samples = interleaved(targets, effort, bodies.small, SMALL)
    rates(report, "small: 400-byte messages, 8 connections × 8 streams", samples)
    for other, target in (("grpcio", 15.0), ("envoy", 2.5), ("haproxy", 1.0)):
        ratio = ratio_of(samples, other, lambda s: s.run.rate)
        if ratio is not None:
            report.figure(f"relay, small, rate : {other}", ratio, "at least", target)


def lone(report: Report, effort: Effort, running: dict[str, Proxy], bodies: Bodies) -> None:
    targets = chosen(running, "direct", "mesh", "haproxy", *_without_target(effort))
    samples = interleaved(targets, effort, bodies.small, LONE, log=True)
    added: dict[str, list[float]] = {}
    for name, mine in samples.items():
        medians = [s.percentile_us(0.5) for s in mine]
        base = [s.percentile_us(0.5) for s in samples["direct"]]
        added[name] = [value - without for value, without in zip(medians, base, strict=True)]
        report.row(
            "lone: one 400-byte request at a time",
            proxy=name,
            **{
                "p50 us": spread(medians),
                "p99 us": spread([s.percentile_us(0.99) for s in mine]),
                "added p50 us": "" if name == "direct" else spread(added[name]),
                "CPU us/request": spread([s.cpu_us for s in mine]),
            },
        )
    if "mesh" in added and "haproxy" in added:
        ratio = pair_ratios(added["mesh"], added["haproxy"])
        report.figure("relay, lone, added latency : haproxy", ratio, "at most", 1.0)


def many(report: Report, effort: Effort, running: dict[str, Proxy], bodies: Bodies) -> None:
    connections = effort.scaled(STORM_CONNECTIONS, 10)
    storm = Load(effort.scaled(STORM_REQUESTS, connections), connections, 1)
    section = f"many: {connections} connections × 1 stream"
    targets = chosen(running, "mesh", "haproxy", *_without_target(effort))
    for target in targets:  # connections to the back end exist from here on
        sample(target, bodies.small, storm)
    samples: Samples = {target.name: [] for target in targets}
    for _ in range(effort.pairs):
        for target in targets:
            samples[target.name].append(sample(target, bodies.small, storm, log=True))
    for name, mine in samples.items():
        report.row(
            section,
            proxy=name,
            **{
                "requests/s": spread([s.run.rate for s in mine]),
                "p99 ms": spread([s.percentile_us(0.99) / 1e3 for s in mine]),
                "slowest ms": spread([s.run.max_us / 1e3 for s in mine]),
                "CPU us/request": spread([s.cpu_us for s in mine]),
                "mesh : it": ratio_of(samples, name, lambda s: s.run.rate) or "",
            },
        )
    ratio = ratio_of(samples, "haproxy", lambda s: s.run.rate)
    if ratio is not None:
        report.figure("relay, many connections, rate : haproxy", ratio, "at least", 0.9)
    if "mesh" in samples:
        slowest = max(s.run.max_us / 1e3 for s in samples["mesh"])
        report.figure(
            "relay, many connections, slowest of all requests",
            spread([slowest]), "at most", LONGEST_REQUEST_MS, "ms",
        )  # fmt: skip
        fresh_storms(report, running["direct"].port, bodies, storm)


def fresh_storms(report: Report, backend: int, bodies: Bodies, storm: Load) -> None:
    """The first storm on a process that has served nothing yet: where a stall once showed."""
    worst: list[float] = []
    for _ in range(FRESH_STORMS):
        with proxies.mesh_router(backend) as fresh:
            worst.append(sample(fresh, bodies.small, storm).run.max_us / 1e3)
    report.row("first storm on a fresh process", proxy="mesh", **{"slowest ms": spread(worst)})
    report.figure(
        "relay, first storm on a fresh process, slowest request",
        spread([max(worst)]), "at most", LONGEST_REQUEST_MS, "ms",
    )  # fmt: skip


def large(report: Report, effort: Effort, running: dict[str, Proxy], bodies: Bodies) -> None:
    targets = chosen(running, "mesh", "haproxy", "envoy")
    samples = interleaved(targets, effort, bodies.large, LARGE)
    for name, mine in samples.items():
        report.row(
            "large: 4 MiB messages, 4 connections × 1 stream",
            proxy=name,
            **{
                "MB/s each way": spread([s.run.rate * LARGE_BYTES / 1e6 for s in mine]),
                "CPU us/MiB": spread([s.cpu_us / (LARGE_BYTES / MIB) for s in mine]),
                "mesh : it": ratio_of(samples, name, lambda s: s.run.rate) or "",
            },
        )
    ratio = ratio_of(samples, "envoy", lambda s: s.run.rate)
    if ratio is not None:
        report.figure("relay, 4 MiB, bytes/s : envoy", ratio, "at least", 1.2)


def mixed(report: Report, effort: Effort, running: dict[str, Proxy], bodies: Bodies) -> None:
    """Small requests while four streams of 4 MiB go through the same proxy all the time."""
    targets = chosen(running, "mesh", "haproxy")
    samples: Samples = {target.name: [] for target in targets}
    for _ in range(effort.pairs):
        for target in targets:
            samples[target.name].append(beside_large(target, bodies, effort))
    for name, mine in samples.items():
        report.row(
            "mixed: 400-byte requests (8 × 1) beside four 4 MiB streams",
            proxy=name,
            **{
                "p50 ms": spread([s.percentile_us(0.5) / 1e3 for s in mine]),
                "p99 ms": spread([s.percentile_us(0.99) / 1e3 for s in mine]),
                "small requests/s": spread([s.run.rate for s in mine]),
            },
        )
    for share, name in ((0.5, "p50"), (0.99, "p99")):
        ratio = ratio_of(samples, "haproxy", lambda s, share=share: s.percentile_us(share))  # type: ignore[misc]
        if ratio is not None:
            report.figure(f"relay, mixed, small {name} : haproxy", ratio, "at most", 1.0)


def beside_large(target: Proxy, bodies: Bodies, effort: Effort) -> Sample:
    endless = Load(1_000_000, LARGE.connections, LARGE.streams)
    argv = h2load.command(target.port, bodies.large, endless)
    with Child("h2load of the large messages", argv, core=load_core()) as background:
        busy_from = target.child.cpu_seconds() + 0.05
        while target.child.cpu_seconds() < busy_from:  # the large streams are under way
            background.check()
        reply_bytes = bodies.small.stat().st_size
        probe = Load(BESIDE.connections * 5, BESIDE.connections, BESIDE.streams)
        found = h2load.run(target.port, bodies.small, probe, reply_bytes=reply_bytes)
        count = max(200, int(found.rate * effort.seconds))
        load = Load(count, BESIDE.connections, BESIDE.streams)
        result = sample(target, bodies.small, load, log=True)
        background.check()
    return result


def slow_reader(report: Report, effort: Effort, running: dict[str, Proxy], bodies: Bodies) -> None:
    """What a proxy holds for a client that sends large requests and reads no reply."""
    growth: dict[str, float] = {}
    for target in chosen(running, "mesh", "haproxy", "envoy"):
        try:
            grown, others_served = slow_reader_growth(
                target, infer_message(MODEL, LARGE_BYTES), infer_message(MODEL, SMALL_BYTES)
            )
        except Unavailable as missing:
            report.note(f"skipped: {missing}")
            return
        growth[target.name] = grown / MIB
        report.row(
            "slow reader: 16 replies of 4 MiB that nobody reads",
            proxy=target.name,
            **{
                "RSS growth MiB": growth[target.name],
                "others served meanwhile": "yes" if others_served else "NO",
            },
        )
        if target.name == "mesh" and not others_served:
            raise BenchError("a client that does not read stopped another client's requests")
    if "mesh" in growth:
        report.figure(
            "relay, slow reader, RSS growth of the router",
            spread([growth["mesh"]]), "at most", SLOW_READER_GROWTH_MIB, "MiB",
        )  # fmt: skip


RUNNERS: dict[str, Callable[[Report, Effort, dict[str, Proxy], Bodies], None]] = {
    "small": small,
    "lone": lone,
    "many": many,
    "large": large,
    "mixed": mixed,
    "slow-reader": slow_reader,
}
