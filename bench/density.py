"""(4) Ten thousand registered ONNX models, of which two instances hold about five hundred each.

Requests follow Zipf's law. No request may fail, resident bytes may never pass the capacity, and a
hit must not cost more because many models are registered.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bench import h2load
from bench.cluster import Cluster, cluster, etcd, write_models
from bench.effort import Effort
from bench.h2load import Load
from bench.models import check_reply, request_for, small_model
from bench.payload import INFER_PATH, framed
from bench.process import serving_core
from bench.report import Report
from bench.scrape import sums
from bench.stats import pair_ratios, percentile, spread
from mesh.core.errors import MeshError
from mesh.wire.client import Channel

MODELS = 10_000
FEW = 10
HELD_PER_INSTANCE = 500
INSTANCES = 2
REQUESTS = 5_000
IN_FLIGHT = 16
ZIPF_EXPONENT = 1.1
SEED = 20
PROBE_MODELS = 200
PROBE_CAPACITY_BYTES = 1 << 30
REQUEST_TIMEOUT_S = 60.0
WATCH_PERIOD_S = 0.05
MIB = 1 << 20
ROUTER_RSS_MB = 150.0


@dataclass(slots=True)
class Watched:
    """The worst that was seen while the requests ran."""

    used_bytes: float = 0.0  # of models in any one instance, those being unloaded included
    models: float = 0.0
    router_rss_bytes: int = 0
    latencies_s: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


def names_of(count: int) -> list[str]:
    return [f"model-{number:05d}" for number in range(count)]


def zipf_sequence(names: Sequence[str], requests: int, seed: int) -> list[str]:
    """``requests`` names, the n-th drawn with a weight of 1 / n^exponent."""
    weights = itertools.accumulate(1.0 / rank**ZIPF_EXPONENT for rank in range(1, len(names) + 1))
    return random.Random(seed).choices(list(names), cum_weights=list(weights), k=requests)


def capacity_for(
    endpoint: str, folder: Path, models: Sequence[tuple[str, Path]], held: int
) -> tuple[float, int]:
    """(bytes that one of these models counts for, as an instance measures it; the capacity with
    which an instance holds about ``held`` of them beside its unload buffer)."""
    with cluster(endpoint, folder, namespace="probe", instances=1, capacity_bytes=1 << 30) as probe:
        probe.register(models)
        for name, _ in models:
            probe.load(name)
        pod = sums(probe.instances[0].metrics_port)
    size = pod["modelmesh_instance_used_bytes"] / pod["modelmesh_instance_models_total"]
    buffer = PROBE_CAPACITY_BYTES / pod["modelmesh_instance_capacity_bytes"]
    return size, max(1 << 20, int(held * size * buffer))


def measure(report: Report, effort: Effort) -> None:
    count = effort.scaled(MODELS, 100)
    held = effort.scaled(HELD_PER_INSTANCE, 10)
    with tempfile.TemporaryDirectory(prefix="bench-") as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        models = write_models(folder, names_of(count), small_model())
        endpoint = stack.enter_context(etcd(folder / "etcd"))
        size, capacity = capacity_for(endpoint, folder, models[: min(PROBE_MODELS, count)], held)
        many = stack.enter_context(
            cluster(
                endpoint, folder, namespace="many", instances=INSTANCES, capacity_bytes=capacity
            )
        )
        started = time.perf_counter()
        many.register(models)
        registered_s = time.perf_counter() - started
        requests = effort.scaled(REQUESTS, 200)
        watched = run_requests(many, zipf_sequence(names_of(count), requests, SEED))
        report_run(report, watched, count, requests, registered_s, size, capacity)
        few = stack.enter_context(
            cluster(endpoint, folder, namespace="few", instances=INSTANCES, capacity_bytes=capacity)
        )
        few.register(models[:FEW])
        compare_hits(report, effort, folder, many, few, count)


def run_requests(mesh: Cluster, sequence: Sequence[str]) -> Watched:
    watched = Watched()
    with watching(mesh, watched):
        asyncio.run(_send_all(mesh.router.port, sequence, watched))
    return watched


async def _send_all(port: int, sequence: Sequence[str], watched: Watched) -> None:
    channel = Channel(f"127.0.0.1:{port}")
    left = iter(sequence)

    async def client() -> None:
        for name in left:
            started = time.perf_counter()
            try:
                reply = await channel.unary(
                    INFER_PATH, request_for(name), timeout_s=REQUEST_TIMEOUT_S
                )
                check_reply(name, reply.message)
            except (MeshError, ValueError) as error:
                watched.failures.append(f"{name}: {error}")
            watched.latencies_s.append(time.perf_counter() - started)

    await asyncio.gather(*(client() for _ in range(IN_FLIGHT)))
    await channel.close()


@contextlib.contextmanager
def watching(mesh: Cluster, watched: Watched) -> Iterator[None]:
    """Scrape the instances and the router's memory all the time, from a thread."""
    stop = threading.Event()

    def watch() -> None:
        while not stop.is_set():
            pages = [sums(process.metrics_port) for process in mesh.instances]
            for found in pages:
                used = found.get("modelmesh_instance_used_bytes", 0.0)
                watched.used_bytes = max(watched.used_bytes, used)
            models = sum(found.get("modelmesh_instance_models_total", 0.0) for found in pages)
            watched.models = max(watched.models, models)
            rss = mesh.router.child.rss_bytes()
            watched.router_rss_bytes = max(watched.router_rss_bytes, rss)
            stop.wait(WATCH_PERIOD_S)

    thread = threading.Thread(target=watch, name="watch")
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def report_run(
    report: Report,
    watched: Watched,
    count: int,
    requests: int,
    registered_s: float,
    size: float,
    capacity: int,
) -> None:
    report.row(
        f"density: {count} registered models, {requests} requests, Zipf {ZIPF_EXPONENT}",
        **{
            "registered/s": count / registered_s,
            "bytes a copy": size,
            "capacity MiB": capacity / MIB,
            "copies at most": watched.models,
            "requests/s": requests / sum(watched.latencies_s) * IN_FLIGHT,
            "p50 ms": percentile(watched.latencies_s, 0.5) * 1e3,
            "p99 ms": percentile(watched.latencies_s, 0.99) * 1e3,
            "failed": len(watched.failures),
        },
    )
    for failure in watched.failures[:5]:
        report.note(f"failed: {failure}")
    report.figure(
        "density, failed requests", spread([len(watched.failures)]), "at most", 0, "requests"
    )
    report.figure(
        "density, resident bytes : capacity, at worst",
        spread([watched.used_bytes / capacity]), "at most", 1.0,
    )  # fmt: skip
    report.figure(
        "density, router RSS", spread([watched.router_rss_bytes / 1e6]),
        "at most", ROUTER_RSS_MB, "MB",
    )  # fmt: skip


def compare_hits(
    report: Report, effort: Effort, folder: Path, many: Cluster, few: Cluster, count: int
) -> None:
    """One request at a time for a loaded model, in the full mesh and in an empty one, in turn."""
    name = names_of(1)[0]
    body = folder / "request"
    body.write_bytes(framed(request_for(name)))
    reply_bytes = {id(mesh): len(framed(mesh.infer(request_for(name)))) for mesh in (many, few)}
    requests = max(50, int(3_000 * effort.seconds))
    for mesh in (many, few):  # one core for both, the other for h2load: the same for each
        for process in (mesh.router, *mesh.instances):
            process.child.pin(serving_core())

    def p50_us(mesh: Cluster) -> float:
        run = h2load.run(
            mesh.router.port, body, Load(requests, 1, 1), reply_bytes=reply_bytes[id(mesh)],
            log=True,
        )  # fmt: skip
        return percentile(run.latencies_us, 0.5)

    pairs = [(p50_us(many), p50_us(few)) for _ in range(effort.pairs)]
    section = "latency of a lone hit, p50"
    report.row(section, registered=str(count), us=spread([a for a, _ in pairs]))
    report.row(section, registered=str(FEW), us=spread([b for _, b in pairs]))
    ratio = pair_ratios([a for a, _ in pairs], [b for _, b in pairs])
    report.figure(f"density, hit latency with {count} : {FEW} registered", ratio, "at most", 1.2)
