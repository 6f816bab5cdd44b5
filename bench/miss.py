"""(5) What a miss adds to pulling and loading, and what a large load does to hits beside it."""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from bench import h2load
from bench.cluster import Cluster, cluster, etcd, write_models
from bench.effort import Effort
from bench.h2load import Load
from bench.models import check_reply, request_for, small_model, write_big_model
from bench.payload import framed
from bench.process import Child, load_core
from bench.report import Report
from bench.stats import percentile, spread

COLD_MODELS = 25
HOT = "hot"
BIG_BYTES = 100 << 20
CAPACITY_BYTES = 1 << 30
# Four clients with one request at a time each: traffic, not saturation.
HITS = Load(0, 4, 1)
ADDED_MS = 10.0
P99_RATIO = 2.0
P99_SLACK_MS = 5.0


def measure(report: Report, effort: Effort) -> None:
    with tempfile.TemporaryDirectory(prefix="bench-") as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        cold = [f"cold-{number}" for number in range(max(2, effort.scaled(COLD_MODELS)))]
        models = write_models(folder, [HOT, *cold], small_model())
        big = write_big_models(folder, effort.pairs, effort.scaled(BIG_BYTES, 1 << 20))
        endpoint = stack.enter_context(etcd(folder / "etcd"))
        mesh = stack.enter_context(
            cluster(endpoint, folder, namespace="miss", instances=1, capacity_bytes=CAPACITY_BYTES)
        )
        mesh.register([*models, *big])
        check_reply(HOT, mesh.infer(request_for(HOT)))
        misses(report, mesh, cold)
        hits_beside_loads(report, effort, mesh, folder, [name for name, _ in big])


def write_big_models(folder: Path, count: int, size_bytes: int) -> list[tuple[str, Path]]:
    """Models of their own for the puller (a path each), one content on the disk."""
    original = folder / "big.onnx"
    write_big_model(original, size_bytes)
    made = []
    for number in range(count):
        place = folder / "models" / f"big-{number}"
        place.mkdir(parents=True)
        os.link(original, place / "model.onnx")
        made.append((place.name, place))
    return made


def misses(report: Report, mesh: Cluster, cold: Sequence[str]) -> None:
    """First requests, one after the other; the instance says what its load (pull included) took."""
    series = "modelmesh_loadmodel_milliseconds_sum"
    totals: list[float] = []
    loads: list[float] = []
    for name in cold:
        before = mesh.instance_sums(series)
        started = time.perf_counter()
        reply = mesh.infer(request_for(name))
        totals.append((time.perf_counter() - started) * 1e3)
        check_reply(name, reply)
        loads.append(mesh.instance_sums(series) - before)
    added = [total - load for total, load in zip(totals, loads, strict=True)]
    report.row(
        "miss: first request of a small model",
        **{
            "first request ms": spread(totals),
            "pulling and loading ms": spread(loads),
            "added ms": spread(added),
        },
    )
    report.figure("miss, added to pulling and loading", spread(added), "at most", ADDED_MS, "ms")


def hits_beside_loads(
    report: Report, effort: Effort, mesh: Cluster, folder: Path, big: Sequence[str]
) -> None:
    body = folder / "request"
    body.write_bytes(framed(request_for(HOT)))
    reply_bytes = len(framed(mesh.infer(request_for(HOT))))
    requests = h2load.calibrated(
        mesh.router.port, body, HITS, reply_bytes=reply_bytes, seconds=effort.seconds
    )
    load = Load(requests, HITS.connections, HITS.streams)
    quiet: list[float] = []
    beside: list[float] = []
    took: list[float] = []
    for name in big:
        run = h2load.run(mesh.router.port, body, load, reply_bytes=reply_bytes, log=True)
        quiet.append(percentile(run.latencies_us, 0.99) / 1e3)
        latencies_us, load_s = hits_while_loading(mesh, body, folder / f"log-{name}", name)
        beside.append(percentile(latencies_us, 0.99) / 1e3)
        took.append(load_s * 1e3)
    report.row(
        f"hits while a model of {effort.scaled(BIG_BYTES, 1 << 20) >> 20} MiB is pulled and loaded",
        **{
            "quiet p99 ms": spread(quiet),
            "beside p99 ms": spread(beside),
            "pulling and loading ms": spread(took),
        },
    )
    # "within twice its quiet value or 5 ms of it": what is allowed is the larger of the two.
    used = [b / max(P99_RATIO * q, q + P99_SLACK_MS) for b, q in zip(beside, quiet, strict=True)]
    report.figure(
        "miss, p99 of hits beside a large load : what is allowed", spread(used), "at most", 1.0
    )


def hits_while_loading(mesh: Cluster, body: Path, log: Path, model: str) -> tuple[list[int], float]:
    """(latencies of the requests that overlap the load in us, seconds of the load)."""
    endless = Load(100_000_000, HITS.connections, HITS.streams)
    argv = h2load.command(mesh.router.port, body, endless, log=log)
    with Child("h2load of the hits", argv, core=load_core()) as background:
        while not log.exists() or log.stat().st_size == 0:  # the hits are under way
            background.check()
            time.sleep(0.01)
        span: list[float] = []

        def load() -> None:
            span.append(time.time())
            mesh.load(model)
            span.append(time.time())

        thread = threading.Thread(target=load, name="load")
        thread.start()
        thread.join()
        time.sleep(0.1)  # what was in flight at the end is in the log
        background.check()
    started_us, ended_us = (int(instant * 1e6) for instant in span)
    latencies: list[int] = []
    for line in log.read_text("ascii").splitlines():
        fields = line.split("\t")
        if len(fields) < 3 or not fields[2].isdigit() or not fields[1].startswith("2"):
            continue  # the last line may be cut
        start, latency = int(fields[0]), int(fields[2])
        if start + latency >= started_us and start <= ended_us:
            latencies.append(latency)
    return latencies, span[1] - span[0]
