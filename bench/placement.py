"""Placement among 1,000 instances, and what a router's view costs at 1,000 copy events a second.

Placement is compared with plain ``min`` over the instances' free memory, in the same run: what the
simplest rule would cost. The view is fed twice: by ``ViewSync`` from events that are there already
(decoding and the view's own work), and from a real etcd in which another process writes at the
rate, on the other core (then the etcd client and gRPC's threads count, too). CPU is this process's,
less what it uses while nothing happens.
"""

from __future__ import annotations

import asyncio
import random
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Final

import uvloop

from bench.cluster import etcd
from bench.copy_events import events, instance_id, model_id
from bench.effort import Effort
from bench.process import BenchError, Child, Unavailable, load_core, pinned, serving_core
from bench.report import Report
from bench.stats import Spread, pair_ratios, spread
from mesh.core.placement import Placement, place
from mesh.core.policy import Policy
from mesh.core.types import (
    CopyRecord,
    CopyState,
    InstanceRecord,
    InstanceState,
    ModelRecord,
)
from mesh.core.view import ClusterView
from mesh.registry import encode, key_of
from mesh.store.api import Changes, KVStore, Put, Snapshot
from mesh.store.etcd import EtcdStore
from mesh.store.etcd_options import EtcdOptions
from mesh.view_sync import ViewSync

INSTANCES: Final = 1_000
MODELS: Final = 20_000
NOW_MS: Final = 1_700_000_000_000
CAPACITY_BYTES: Final = 32 << 30
RATE: Final = 1_000.0  # copy events a second
TARGET_MS: Final = 1.0
TARGET_SHARE: Final = 0.10  # of a core

POLICY: Final = Policy()
MODEL: Final = ModelRecord("m", "onnx", size_bytes_stated=50 << 20)
LABELLED: Final = replace(MODEL, required_labels=("gpu",), preferred_labels=("big",))


def measure(report: Report, effort: Effort) -> None:
    with pinned(serving_core()):
        placements(report, effort)
        decoding(report, effort)
        from_etcd(report, effort)


# ---- placement --------------------------------------------------------------------------------


def mesh_of(kind: str, instances: int) -> ClusterView:
    """``kind``: ``empty``, ``part`` full, ``full`` or ``worst`` (full, two replica sets, zones,
    labels, worths of victims, some hot)."""
    rng = random.Random(1)
    view = ClusterView()
    for number in range(instances):
        used = 0 if kind == "empty" else rng.randrange(CAPACITY_BYTES)
        record = InstanceRecord(
            instance_id(number),
            f"10.0.{number // 256}.{number % 256}:8001",
            InstanceState.READY,
            CAPACITY_BYTES,
            used_bytes=used if kind in ("empty", "part") else CAPACITY_BYTES,
            load_slots=2,
            lru_at_ms=0 if kind == "empty" else NOW_MS - rng.randrange(3_600_000),
            model_types=("onnx", "sklearn"),
        )
        if kind == "worst":
            record = replace(
                record,
                requests_per_minute=rng.randrange(20_000),
                zone="abc"[number % 3],
                labels=("gpu", "big") if number % 2 else ("gpu",),
                group="g",
                replica_set="new" if number % 5 else "old",
                started_at_ms=NOW_MS - (60_000 if number % 5 else 10**9),
                victim_score=100 + rng.random(),
            )
        view.put_instance(record)
    view.put_model(MODEL)
    if kind == "worst":
        view.put_copy(CopyRecord(MODEL.model_id, instance_id(1), CopyState.LOADED, 50 << 20))
    return view


def placements(report: Report, effort: Effort) -> None:
    section = f"choosing among {INSTANCES:,} instances (µs)"
    worst: list[float] = [0.0]
    for kind, model, avoid in (
        ("empty", MODEL, ()),
        ("part", MODEL, ()),
        ("full", MODEL, ()),
        ("worst", LABELLED, (instance_id(2), instance_id(3))),
    ):
        view = mesh_of(kind, INSTANCES)
        # Different models draw differently: the look of one must not be measured alone.
        asked = [replace(model, model_id=f"m{n}") for n in range(8)] if kind != "worst" else [model]
        ours, theirs, reason = _compare(view, asked, avoid, effort)
        report.row(
            section,
            mesh=kind,
            reason=reason,
            place=spread(ours),
            smallest=spread(theirs),
            ratio=pair_ratios(ours, theirs),
        )
        worst = max(worst, ours, key=median)
    in_ms = spread([us / 1e3 for us in worst])
    report.figure("choosing one of 1,000 instances, worst case", in_ms, "at most", TARGET_MS, "ms")
    report.note("smallest: plain min over the instances' free memory, no rule at all")


def _compare(
    view: ClusterView, asked: Sequence[ModelRecord], avoid: Sequence[str], effort: Effort
) -> tuple[list[float], list[float], str]:
    def ours() -> object:
        return [place(view, model, now_ms=NOW_MS, policy=POLICY, avoid=avoid) for model in asked]

    def theirs() -> object:
        slots = view.instances.values()
        return [min(slots, key=lambda slot: -slot.effective_free_bytes) for _ in asked]

    found = place(view, asked[0], now_ms=NOW_MS, policy=POLICY, avoid=avoid)
    if not isinstance(found, Placement):
        raise BenchError(f"nothing was placed: {found.detail}")
    pairs = [(_us(ours, effort), _us(theirs, effort)) for _ in range(effort.pairs)]
    each = len(asked)
    return [a / each for a, _ in pairs], [b / each for _, b in pairs], found.reason


def _us(call: Callable[[], object], effort: Effort) -> float:
    """Mean of calls for a share of the effort's time; of this thread's CPU, so that other
    processes on the core do not count."""
    calls = 0
    started_s = time.thread_time()
    until_s = started_s + max(0.02, effort.seconds / 4)
    while True:
        call()
        calls += 1
        now_s = time.thread_time()
        if now_s >= until_s:
            return (now_s - started_s) / calls * 1e6


# ---- the view ---------------------------------------------------------------------------------


def records(models: int) -> Iterable[ModelRecord | InstanceRecord]:
    for number in range(models):
        yield ModelRecord(model_id(number), "onnx", path=f"s3://bucket/models/{number}")
    for number in range(INSTANCES):
        yield InstanceRecord(
            instance_id(number), f"10.0.0.1:{number}", InstanceState.READY, CAPACITY_BYTES,
            model_types=("onnx",), load_slots=2,
        )  # fmt: skip


class _Recorded:
    """A store whose watch hands out what was made before: no client, no waiting."""

    def __init__(self, steps: Sequence[Snapshot | Changes]) -> None:
        self._steps = steps

    async def watch(self, prefix: str) -> AsyncIterator[Snapshot | Changes]:
        for step in self._steps:
            yield step


def decoding(report: Report, effort: Effort) -> None:
    """Decoded by ``ViewSync`` and taken in by the view; one event a step."""
    models = effort.scaled(MODELS, least=100)
    count = effort.scaled(50_000, least=1_000)
    source = events(models, INSTANCES, seed=2)
    steps: list[Changes] = []
    for revision in range(2, count + 2):
        event = next(source)
        stamped = replace(event, mod_revision=revision)
        steps.append(Changes((stamped,), revision))
    costs = []
    for _ in range(max(1, effort.pairs // 2)):
        view = ClusterView()
        for record in records(models):
            view.put_model(record) if isinstance(record, ModelRecord) else view.put_instance(record)
        sync = ViewSync(_Recorded(steps), view, on_step=_nothing)  # type: ignore[arg-type]
        began_s = time.process_time()
        asyncio.run(sync.run())
        costs.append((time.process_time() - began_s) / count * 1e6)
        if sync.events_total != count or sync.undecodable_total:
            raise BenchError(f"{sync.events_total} of {count} events were taken in")
    _row(report, "decoding and view, no store", RATE, spread(costs))
    _figure(report, "CPU of decoding and view at 1,000 copy events/s", costs)


def from_etcd(report: Report, effort: Effort) -> None:
    seconds = max(1.0, effort.seconds * 10)
    try:
        with (
            tempfile.TemporaryDirectory(prefix="bench-") as folder,
            etcd(Path(folder) / "etcd") as endpoint,
        ):
            costs = [
                uvloop.run(_watched(endpoint, f"events-{n}", effort, seconds))
                for n in range(max(1, effort.pairs // 2))
            ]
    except Unavailable as missing:
        report.note(f"without etcd: {missing}")
        return
    cost = spread([us for us, _ in costs])
    rate = sum(rate for _, rate in costs) / len(costs)
    _row(report, "etcd's watch, gRPC, decoding and view", rate, cost)
    _figure(report, "the same with etcd's client (gRPC)", [us for us, _ in costs])


def _figure(report: Report, name: str, costs_us: Sequence[float]) -> None:
    cores = spread([us * RATE / 1e6 for us in costs_us])
    report.figure(name, cores, "at most", TARGET_SHARE, "cores")


async def _watched(
    endpoint: str, namespace: str, effort: Effort, seconds: float
) -> tuple[float, float]:
    """(µs of CPU an event, events a second)"""
    store = EtcdStore(EtcdOptions((endpoint,)), namespace=namespace)
    models = effort.scaled(MODELS, least=100)
    await _fill(store, models)
    view = ClusterView()
    sync = ViewSync(store, view, on_step=_nothing)
    task = asyncio.create_task(sync.run())
    await sync.wait_synced()
    idle_s = await _idle_cpu_s(seconds / 2) * 2
    argv = [sys.executable, "-m", "bench.copy_events", endpoint, namespace]
    argv += [str(RATE), str(seconds), str(models)]
    with Child("copy events", argv) as writer:
        writer.pin(load_core())
        wanted = int(RATE * seconds)
        while not sync.events_total:
            writer.check()
            await asyncio.sleep(0.01)
        began, cpu_s, wall_s = sync.events_total, time.process_time(), time.perf_counter()
        while sync.events_total < wanted:
            if time.perf_counter() - wall_s > 10 * seconds + 30:
                raise BenchError(f"{sync.events_total} of {wanted} events came: {writer.output()}")
            await asyncio.sleep(0.05)
        taken = sync.events_total - began
        cpu_s, wall_s = time.process_time() - cpu_s, time.perf_counter() - wall_s
    if sync.undecodable_total:
        raise BenchError(f"{sync.undecodable_total} events could not be decoded")
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await store.close()
    used_s = max(0.0, cpu_s - idle_s * wall_s / seconds)
    return used_s / taken * 1e6, taken / wall_s


async def _idle_cpu_s(seconds: float) -> float:
    began_s = time.process_time()
    await asyncio.sleep(seconds)
    return time.process_time() - began_s


async def _fill(store: KVStore, models: int) -> None:
    puts = [Put(key_of(record), encode(record)) for record in records(models)]
    for start in range(0, len(puts), 100):
        await store.txn([], puts[start : start + 100])


def _row(report: Report, path: str, rate: float, cost: Spread) -> None:
    report.row(
        f"CPU of a router's view of {MODELS:,} models on {INSTANCES:,} instances",
        path=path,
        **{"events/s": rate, "µs an event": cost, "cores at 1,000/s": cost.median * RATE / 1e6},
    )


def _nothing(touched: frozenset[str] | None) -> None:
    """What a step is told to."""
