"""(2) The instance against a bare loop, and (3) router and instance together against it alone.

One small ONNX model. The processes that are measured share one core, h2load has the other.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc

from bench import h2load
from bench.cluster import Cluster, cluster, etcd, write_models
from bench.effort import Effort
from bench.h2load import Load
from bench.models import check_reply, request_for, small_model
from bench.payload import INFER_PATH, framed
from bench.process import ROOT, BenchError, pinned, serving_core
from bench.report import Report
from bench.stats import pair_ratios, spread

MODEL = "bench-small"
CAPACITY_BYTES = 256 << 20
# In flight -> how h2load makes it.
SHAPES = {1: Load(0, 1, 1), 64: Load(0, 8, 8)}


@dataclass(frozen=True, slots=True)
class Bench:
    """What is measured, ready: a loaded model, its request and the size of its reply."""

    mesh: Cluster
    body: Path
    reply_bytes: int
    header: str

    def instance_run(self, load: Load) -> tuple[h2load.Run, float]:
        """Against the instance itself; gives (run, CPU us per request)."""
        pod = self.mesh.instances[0]
        before = pod.child.cpu_seconds()
        run = self._run(pod.port, load, (self.header,))
        return run, (pod.child.cpu_seconds() - before) / load.requests * 1e6

    def mesh_run(self, load: Load) -> tuple[h2load.Run, float, float]:
        """Through the router; gives (run, CPU us of the router, of the instance per request)."""
        router, pod = self.mesh.router.child, self.mesh.instances[0].child
        before, pod_before = router.cpu_seconds(), pod.cpu_seconds()
        run = self._run(self.mesh.router.port, load, ())
        scale = 1e6 / load.requests
        used = (router.cpu_seconds() - before) * scale
        return run, used, (pod.cpu_seconds() - pod_before) * scale

    def count(self, port: int, shape: Load, seconds: float, headers: tuple[str, ...]) -> Load:
        run = self._run(port, Load(shape.connections * shape.streams * 50, *_grid(shape)), headers)
        count = max(shape.connections * shape.streams, int(run.rate * seconds))
        return Load(count, *_grid(shape))

    def _run(self, port: int, load: Load, headers: tuple[str, ...]) -> h2load.Run:
        return h2load.run(
            port, self.body, load, reply_bytes=self.reply_bytes, headers=headers, log=True
        )


def _grid(shape: Load) -> tuple[int, int]:
    return shape.connections, shape.streams


@contextlib.contextmanager
def prepared() -> Iterator[Bench]:
    with tempfile.TemporaryDirectory(prefix="bench-") as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        models = write_models(folder, [MODEL], small_model())
        endpoint = stack.enter_context(etcd(folder / "etcd"))
        mesh = stack.enter_context(
            cluster(
                endpoint, folder, namespace="bench", instances=1,
                capacity_bytes=CAPACITY_BYTES, core=serving_core(),
            )
        )  # fmt: skip
        mesh.register(models)
        message = request_for(MODEL)
        reply = mesh.infer(message)
        header = f"mm-model-id: {MODEL}"
        direct = _direct(mesh.instances[0].port, message)
        for found in (reply, direct):
            check_reply(MODEL, found)
        if len(reply) != len(direct):
            raise BenchError("the instance answers the router and a direct client differently")
        body = folder / "request"
        body.write_bytes(framed(message))
        (folder / "message").write_bytes(message)
        yield Bench(mesh, body, len(framed(reply)), header)


def _direct(port: int, message: bytes) -> bytes:
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        reply: bytes = channel.unary_unary(INFER_PATH)(
            message, metadata=(("mm-model-id", MODEL),), timeout=20
        )
    return reply


def bare_loop(folder: Path, seconds: float) -> tuple[float, float]:
    """(requests per second, CPU us per request) of the bare loop on the serving core."""
    with pinned(serving_core()):
        done = subprocess.run(
            [sys.executable, "-m", "bench.bare_loop", str(folder / "models" / MODEL / "model.onnx"),
             str(folder / "message"), str(seconds)],
            cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
    if done.returncode != 0:
        raise BenchError(f"the bare loop failed: {done.stderr[-1_000:]}")
    found = json.loads(done.stdout)
    requests = float(found["requests"])
    return requests / found["seconds"], found["cpu_seconds"] / requests * 1e6


def measure_instance(report: Report, effort: Effort) -> None:
    with prepared() as bench:
        folder = bench.body.parent
        port = bench.mesh.instances[0].port
        loads = {
            inflight: bench.count(port, shape, effort.seconds, (bench.header,))
            for inflight, shape in SHAPES.items()
        }
        bare: list[tuple[float, float]] = []
        runs: dict[int, list[tuple[h2load.Run, float]]] = {inflight: [] for inflight in SHAPES}
        for _ in range(effort.pairs):
            bare.append(bare_loop(folder, effort.seconds))
            for inflight, load in loads.items():
                runs[inflight].append(bench.instance_run(load))
    section = "instance: small ONNX model, one core"
    report.row(
        section,
        what="bare loop",
        **{
            "requests/s": spread([rate for rate, _ in bare]),
            "CPU us/request": spread([cpu for _, cpu in bare]),
        },
    )
    for inflight, mine in runs.items():
        report.row(
            section,
            what=f"instance, {inflight} in flight",
            **{
                "requests/s": spread([run.rate for run, _ in mine]),
                "CPU us/request": spread([cpu for _, cpu in mine]),
                "mean ms": spread([run.mean_us / 1e3 for run, _ in mine]),
            },
        )
    ratio = pair_ratios([run.rate for run, _ in runs[64]], [rate for rate, _ in bare])
    report.figure("instance, 64 in flight, rate : bare loop", ratio, "at least", 0.4)


def measure_end_to_end(report: Report, effort: Effort) -> None:
    with prepared() as bench:
        shape = SHAPES[64]
        pod_port, router_port = bench.mesh.instances[0].port, bench.mesh.router.port
        alone_load = bench.count(pod_port, shape, effort.seconds, (bench.header,))
        both_load = bench.count(router_port, shape, effort.seconds, ())
        alone, both = [], []
        for _ in range(effort.pairs):
            alone.append(bench.instance_run(alone_load))
            both.append(bench.mesh_run(both_load))
    section = "end to end: small ONNX model, 8 × 8 in flight, router and instance on one core"
    report.row(
        section,
        what="instance alone",
        **{
            "requests/s": spread([run.rate for run, _ in alone]),
            "mean ms": spread([run.mean_us / 1e3 for run, _ in alone]),
            "CPU us/request": spread([cpu for _, cpu in alone]),
        },
    )
    report.row(
        section,
        what="router and instance",
        **{
            "requests/s": spread([run.rate for run, _, _ in both]),
            "mean ms": spread([run.mean_us / 1e3 for run, _, _ in both]),
            "CPU us/request": spread([a + b for _, a, b in both]),
            "of it the router": spread([a for _, a, _ in both]),
        },
    )
    ratio = pair_ratios([a + b for _, a, b in both], [cpu for _, cpu in alone])
    report.figure("end to end, CPU per request : instance alone", ratio, "at most", 2.0)
