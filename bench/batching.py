"""What joining requests gains, against what the bare framework gains from rows at once.

One instance on one core, h2load on the other, 64 requests of one row in flight. Each model is
registered twice: with ``max_batch_size`` 0, and with nothing said, so that the instance finds out
itself. Bare: the framework's own call in a loop on the serving core, with 1 and with 64 rows.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc
import numpy as np

from bench import h2load
from bench.bare_rows import ROWS
from bench.cluster import Cluster, cluster, etcd
from bench.effort import Effort
from bench.h2load import Load
from bench.models import perceptron
from bench.payload import INFER_PATH, framed
from bench.process import ROOT, BenchError, Unavailable, pinned, serving_core
from bench.report import Report
from bench.stats import pair_ratios, percentile, spread
from mesh import registry
from mesh.core.types import ModelRecord
from mesh.internal_calls import DESCRIBE_PATH
from mesh.store.api import Put
from mesh.store.etcd import EtcdStore
from mesh.store.etcd_options import EtcdOptions
from protos import mesh_internal_pb2, oip_pb2

NAMESPACE = "bench-batching"
CAPACITY_BYTES = 1 << 30
SHAPE = Load(0, 8, 8)
SHARE_WANTED = 0.75
OFF, ON = "off", "on"


@dataclass(frozen=True, slots=True)
class Subject:
    """One model, as a file of its framework. ``target``: the figure is asked of it."""

    name: str
    kind: str
    file: str
    width: int
    target: bool = False

    @property
    def dtype(self) -> type[np.floating]:
        return np.float32 if self.kind == "onnx" else np.float64

    def content(self) -> bytes:
        if self.kind == "onnx":
            return perceptron([int(part) for part in self.name.split("-")])
        return _linear_model()

    def request(self, model: str) -> bytes:
        request = oip_pb2.ModelInferRequest(model_name=model, id="1")
        datatype = "FP32" if self.kind == "onnx" else "FP64"
        request.inputs.add(name="x", datatype=datatype, shape=[1, self.width])
        values = np.random.default_rng(5).random(self.width)
        request.raw_input_contents.append(values.astype(self.dtype).tobytes())
        return request.SerializeToString()


SUBJECTS = (
    Subject("512-2048-2048-10", "onnx", "model.onnx", 512, target=True),
    Subject("64-256-256-10", "onnx", "model.onnx", 64),
    Subject("4-16-3", "onnx", "model.onnx", 4),
    Subject("digits", "sklearn", "model.skops", 64),
)


def _linear_model() -> bytes:
    """scikit-learn's logistic regression on its own digits."""
    try:
        import skops.io
        from sklearn.datasets import load_digits
        from sklearn.linear_model import LogisticRegression
    except ImportError as missing:
        raise Unavailable(f"the model of digits needs scikit-learn and skops: {missing}") from None
    data, labels = load_digits(return_X_y=True)
    made: bytes = skops.io.dumps(LogisticRegression(max_iter=500).fit(data / 16.0, labels))
    return made


@dataclass(frozen=True, slots=True)
class Bench:
    mesh: Cluster
    folder: Path

    @property
    def port(self) -> int:
        return self.mesh.instances[0].port

    def path(self, subject: Subject) -> Path:
        return self.folder / "models" / subject.name / subject.file

    def load(self, subject: Subject, side: str, seconds: float) -> Load:
        """How many requests take about so long; the instance has found out about joining then."""
        run = self.run(subject, side, Load(2_000, SHAPE.connections, SHAPE.streams))
        count = max(256, int(run.rate * seconds))
        return Load(count, SHAPE.connections, SHAPE.streams)

    def run(self, subject: Subject, side: str, load: Load) -> h2load.Run:
        name = _model_id(subject, side)
        body = self.folder / f"request-{name}"
        message = subject.request(name)
        body.write_bytes(framed(message))
        reply = self._call(INFER_PATH, message, name)
        return h2load.run(
            self.port, body, load, reply_bytes=len(framed(reply)),
            headers=(f"mm-model-id: {name}",), log=True,
        )  # fmt: skip

    def batching(self, subject: Subject, side: str) -> dict[str, object]:
        """What the instance says of the copy."""
        request = mesh_internal_pb2.DescribeRequest(model_id=_model_id(subject, side))
        reply = self._call(DESCRIBE_PATH, request.SerializeToString(), "")
        document = json.loads(mesh_internal_pb2.DescribeResponse.FromString(reply).json)
        found: dict[str, object] = document["batching"]
        return found

    def _call(self, path: str, message: bytes, model: str) -> bytes:
        metadata = (("mm-model-id", model),) if model else ()
        with grpc.insecure_channel(f"127.0.0.1:{self.port}") as channel:
            reply: bytes = channel.unary_unary(path)(message, metadata=metadata, timeout=20)
        return reply

    def bare(self, subject: Subject, seconds: float) -> dict[int, float]:
        """CPU us for a row, by rows in one call of the framework."""
        argv = [sys.executable, "-m", "bench.bare_rows", subject.kind, str(self.path(subject)),
                str(subject.width), str(seconds)]  # fmt: skip
        with pinned(serving_core()):
            done = subprocess.run(
                argv, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
            )
        if done.returncode != 0:
            raise BenchError(f"the bare calls failed: {done.stderr[-1_000:]}")
        return {int(rows): us for rows, us in json.loads(done.stdout).items()}


def _model_id(subject: Subject, side: str) -> str:
    return f"{subject.name}-{side}"


async def _register(endpoint: str, records: Sequence[ModelRecord]) -> None:
    store = EtcdStore(EtcdOptions((endpoint,)), namespace=NAMESPACE)
    try:
        await store.txn(
            [], [Put(registry.key_of(record), registry.encode(record)) for record in records]
        )
    finally:
        await store.close()


@contextlib.contextmanager
def prepared(subjects: Sequence[Subject]) -> Iterator[Bench]:
    with tempfile.TemporaryDirectory(prefix="bench-") as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        records = []
        for subject in subjects:
            place = folder / "models" / subject.name
            place.mkdir(parents=True)
            (place / subject.file).write_bytes(subject.content())
            for side, rows in ((OFF, 0), (ON, None)):
                records.append(
                    ModelRecord(
                        _model_id(subject, side), subject.kind, f"file://{place}",
                        max_batch_size=rows,
                    )
                )  # fmt: skip
        endpoint = stack.enter_context(etcd(folder / "etcd"))
        mesh = stack.enter_context(
            cluster(
                endpoint, folder, namespace=NAMESPACE, instances=1,
                capacity_bytes=CAPACITY_BYTES, core=serving_core(),
            )
        )  # fmt: skip
        asyncio.run(_register(endpoint, records))
        for record in records:
            mesh.load(record.model_id)
        yield Bench(mesh, folder)


def measure(report: Report, effort: Effort, subjects: Sequence[Subject] = SUBJECTS) -> None:
    with prepared(subjects) as bench:
        for subject in subjects:
            _measure(report, effort, bench, subject)


def _measure(report: Report, effort: Effort, bench: Bench, subject: Subject) -> None:
    loads = {side: bench.load(subject, side, effort.seconds) for side in (OFF, ON)}
    runs: dict[str, list[h2load.Run]] = {OFF: [], ON: []}
    bare = []
    for _ in range(effort.pairs):
        bare.append(bench.bare(subject, effort.seconds))
        for side, load in loads.items():
            runs[side].append(bench.run(subject, side, load))
    section = f"{subject.kind} {subject.name}, 8 × 8 in flight, one core"
    for rows in ROWS:
        report.row(
            section, what=f"bare, {rows} rows", **{"CPU us/row": spread([b[rows] for b in bare])}
        )
    late = {}
    for side, mine in runs.items():
        late[side] = [percentile(run.latencies_us, 0.99) / 1e3 for run in mine]
        told = bench.batching(subject, side)
        report.row(
            section,
            what=f"batching {side}",
            **{
                "requests/s": spread([run.rate for run in mine]),
                "p99 ms": spread(late[side]),
                "state": f"{told['state']} ({told['reason']})",
                "mean rows": told["mean_rows"],
            },
        )
    gain = pair_ratios([r.rate for r in runs[ON]], [r.rate for r in runs[OFF]])
    most = pair_ratios([b[ROWS[0]] for b in bare], [b[ROWS[-1]] for b in bare])
    share = pair_ratios(
        [on.rate / off.rate for on, off in zip(runs[ON], runs[OFF], strict=True)],
        [b[ROWS[0]] / b[ROWS[-1]] for b in bare],
    )
    name = f"{subject.kind} {subject.name}"
    report.row(section, what="gain", **{"rate on : off": gain, "bare 1 : 64": most})
    if subject.target:
        report.figure(f"{name}, gain : bare gain", share, "at least", SHARE_WANTED)
    else:
        report.figure(f"{name}, rate on : off", gain, "at least", 0.97)
    report.figure(f"{name}, p99 on : off", pair_ratios(late[ON], late[OFF]), "at most", 1.05)
