"""(7) Frameworks in an instance: cold start, scikit-learn, many models.

MLServer is measured where ``.venv-mlserver`` is there (``make .venv-mlserver/.installed``); the
same fitted model, client and core. What runs in the instance is the skops file, in the pod, and the
joblib file, in a process of its own. The linear model and the forest are answered in a shorter way
than their own ``predict`` (mesh/runtimes/sklearn_direct.py); the support vector machine by it.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from bench import h2load
from bench.cluster import Cluster, Process, cluster, etcd, write_models
from bench.effort import Effort
from bench.h2load import Load
from bench.models import small_model, write_big_model
from bench.payload import INFER_PATH, framed
from bench.process import (
    ROOT,
    BenchError,
    Child,
    Unavailable,
    free_port,
    pinned,
    python_child,
    serving_core,
)
from bench.report import Report
from bench.scrape import sums
from bench.stats import pair_ratios, spread
from protos import mmesh_pb2, oip_pb2

BIG_BYTES = 100 << 20
DENSE_MODELS = 5_000
CAPACITY_BYTES = 8 << 30
COLD = "cold"
COLD_SLACK_MS = 10.0
COLD_WAIT_S = 60.0
RESIDENT = "modelmesh_instance_models_total"
DENSE_KB_MAX = 20.0
MLSERVER = ROOT / ".venv-mlserver" / "bin" / "mlserver"
# Names of the linear model: in the pod, in a process of its own, in the pod without batching.
IN_POD, ISOLATED, UNBATCHED = "digits", "digits-joblib", "digits-one-by-one"
# Other models of the same data, one request at a time against their own ``predict`` in a loop.
FOREST, VECTORS = "forest-100", "svc"

_BARE_SESSION = """
import sys, time
import onnxruntime as ort
options = ort.SessionOptions()
options.intra_op_num_threads = options.inter_op_num_threads = 1
ort.InferenceSession(sys.argv[2], options, providers=["CPUExecutionProvider"])
started = time.perf_counter()
ort.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
print((time.perf_counter() - started) * 1e3)
"""
_BARE_SESSIONS = """
import sys
from pathlib import Path
import onnxruntime as ort
options = ort.SessionOptions()
options.intra_op_num_threads = options.inter_op_num_threads = 1
options.enable_cpu_mem_arena = False
def resident():
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) * 1024
kept = [ort.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])]
before = resident()
for _ in range(int(sys.argv[2])):
    kept.append(ort.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"]))
print((resident() - before) / int(sys.argv[2]))
"""
_BARE_PREDICT = """
import sys, time
import joblib, numpy as np
model = joblib.load(sys.argv[1])
row = np.load(sys.argv[2])
for _ in range(200):
    model.predict(row)
started, done = time.perf_counter(), 0
until = started + float(sys.argv[3])
while time.perf_counter() < until:
    for _ in range(20):
        model.predict(row)
    done += 20
print(done / (time.perf_counter() - started))
"""


def measure(report: Report, effort: Effort) -> None:
    cold_start(report, effort)
    scikit_learn(report, effort)
    density(report, effort)


def _bare(script: str, *arguments: str, core: int | None = None) -> float:
    """What one of the scripts above prints."""
    with contextlib.nullcontext() if core is None else pinned(core):
        done = subprocess.run(
            [sys.executable, "-c", script, *arguments],
            cwd=ROOT, capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
    if done.returncode != 0:
        raise BenchError(f"the bare run failed: {done.stderr[-1_000:]}")
    return float(done.stdout)


# ---- cold start ----


def cold_start(report: Report, effort: Effort) -> None:
    """A large ONNX model that was pulled from S3 before, and is in the disk cache: the instance's
    whole load (asking the store included) against a session on the same file."""
    size_bytes = effort.scaled(BIG_BYTES, 1 << 20)
    with tempfile.TemporaryDirectory(prefix="bench-") as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        small = write_models(folder, ["small"], small_model())
        store = folder / "model.onnx"
        write_big_model(store, size_bytes)
        endpoint = stack.enter_context(etcd(folder / "etcd"))
        mesh = stack.enter_context(
            cluster(
                endpoint, folder, namespace=COLD, instances=1, capacity_bytes=CAPACITY_BYTES,
                instance_flags=("--storage-config", str(_storage(stack, folder, store))),
            )
        )  # fmt: skip
        series = "modelmesh_loadmodel_milliseconds_sum"
        ours: list[float] = []
        bare: list[float] = []
        for number in range(effort.pairs + 1):
            model = f"big-{number}"
            cached = _pulled(mesh, folder, model)
            before = mesh.instance_sums(series)
            mesh.load(model)
            if number > 0:  # the first one also imported onnxruntime
                ours.append(mesh.instance_sums(series) - before)
                warm = str(small[0][1] / "model.onnx")
                bare.append(_bare(_BARE_SESSION, str(cached), warm))
    report.row(
        f"cold start of an ONNX model of {size_bytes >> 20} MiB in the disk cache",
        **{"fetch, size and load ms": spread(ours), "bare InferenceSession ms": spread(bare)},
    )
    added = [mine - other for mine, other in zip(ours, bare, strict=True)]
    report.figure(
        "cold start, load : bare session, difference", spread(added), "at most", COLD_SLACK_MS, "ms"
    )


def _storage(stack: contextlib.ExitStack, folder: Path, served: Path) -> Path:
    """An S3 server with that file in every bucket; the storage secret that leads to it."""
    port = free_port()
    arguments = (str(served), '"0123456789abcdef0123456789abcdef-2"', str(port))
    server = stack.enter_context(python_child("s3 server", "bench.s3_server", *arguments))
    server.wait_for_port(port)
    entry = {"type": "s3", "endpoint_url": f"http://127.0.0.1:{port}"}
    (folder / "storage").mkdir()
    (folder / "storage" / "default_s3").write_text(json.dumps(entry))
    return folder / "storage"


def _pulled(mesh: Cluster, folder: Path, model: str) -> Path:
    """A model that has been loaded and is in memory no more; where its file is in the cache."""
    entries = folder / f"cache-{COLD}-0" / "entries"
    there = set(entries.glob("*"))
    mesh.register_uri(model, f"s3://{model}/model.onnx")
    mesh.load(model)
    (entry,) = set(entries.glob("*")) - there
    metrics_port = mesh.instances[0].metrics_port
    resident = sums(metrics_port)[RESIDENT]
    mesh.unregister(model)
    pod = mesh.instances[0].child
    # Else its bytes would be on their way to the disk beside the load that is measured.
    _until(pod, entry.joinpath("synced").exists)
    _until(pod, lambda: sums(metrics_port)[RESIDENT] < resident)
    mesh.register_uri(model, f"s3://{model}/model.onnx")
    return entry / "content" / "model.onnx"


def _until(child: Child, condition: Callable[[], bool]) -> None:
    end = time.monotonic() + COLD_WAIT_S
    while not condition():
        child.check()
        if time.monotonic() > end:
            raise BenchError("the instance did not unload, or did not sync, what it had pulled")
        time.sleep(0.02)


# ---- scikit-learn ----


def _fitted(folder: Path) -> np.ndarray[Any, Any]:
    """Writes the models as skops and joblib; gives one row."""
    import joblib
    import skops.io
    from sklearn.datasets import load_digits
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.linear_model import LogisticRegression
    from sklearn.svm import SVC

    x, y = load_digits(return_X_y=True)
    model = LogisticRegression(max_iter=2_000).fit(x, y)
    for name in (IN_POD, UNBATCHED):
        (folder / "models" / name).mkdir(parents=True)
        skops.io.dump(model, folder / "models" / name / "model.skops")
    for name, other in (
        (ISOLATED, model),
        (FOREST, RandomForestClassifier(100, random_state=0).fit(x, y)),
        (VECTORS, SVC().fit(x, y)),
    ):
        place = folder / "models" / name
        place.mkdir()
        joblib.dump(other, place / "model.joblib")
        if name != ISOLATED:
            skops.io.dump(other, place / "model.skops")
    row: np.ndarray[Any, Any] = x[:1]
    np.save(folder / "row.npy", row)
    return row


def _request(name: str, row: np.ndarray[Any, Any]) -> bytes:
    request = oip_pb2.ModelInferRequest(model_name=name, id="1")
    request.inputs.add(name="predict", datatype="FP64", shape=row.shape)
    request.raw_input_contents.append(row.tobytes())
    return request.SerializeToString()


def scikit_learn(report: Report, effort: Effort) -> None:
    with tempfile.TemporaryDirectory(prefix="bench-") as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        row = _fitted(folder)
        endpoint = stack.enter_context(etcd(folder / "etcd"))
        mesh = stack.enter_context(
            cluster(
                endpoint, folder, namespace="sklearn", instances=1, core=serving_core(),
                capacity_bytes=1 << 30, instance_flags=("--allow-pickle",),
            )
        )  # fmt: skip
        models = (IN_POD, ISOLATED, UNBATCHED)
        _register(mesh, folder, (*models, FOREST, VECTORS))
        servers: dict[str, int] = dict.fromkeys(models, mesh.instances[0].port)
        if MLSERVER.exists():
            servers["MLServer"] = stack.enter_context(_mlserver(folder))
        else:
            report.note("MLServer is not installed here: make .venv-mlserver/.installed")
        shapes = {1: Load(0, 1, 1), 64: Load(0, 8, 8)}
        rates: dict[tuple[str, int], list[float]] = {}
        bare: list[float] = []
        others: dict[str, tuple[list[float], list[float]]] = {FOREST: ([], []), VECTORS: ([], [])}
        for _ in range(effort.pairs):
            bare.append(_bare_rate(folder, ISOLATED, effort.seconds))
            for other, (own, ours) in others.items():
                own.append(_bare_rate(folder, other, effort.seconds))
                port = mesh.instances[0].port
                ours.append(_rate(folder, other, port, row, shapes[1], effort.seconds))
            for server, port in servers.items():
                for inflight, shape in shapes.items():
                    rate = _rate(folder, server, port, row, shape, effort.seconds)
                    rates.setdefault((server, inflight), []).append(rate)
    section = "scikit-learn: LogisticRegression on digits, one row a request, one core"
    report.row(section, what="bare predict loop", **{"requests/s": spread(bare)})
    for (server, inflight), found in rates.items():
        report.row(section, what=f"{server}, {inflight} in flight", **{"requests/s": spread(found)})
    ratio = pair_ratios(rates[IN_POD, 1], bare)
    report.figure("scikit-learn, 1 in flight, rate : bare loop", ratio, "at least", 0.6)
    for other, (own, ours) in others.items():
        report.row(section, what=f"{other}, bare predict loop", **{"requests/s": spread(own)})
        report.row(section, what=f"{other}, 1 in flight", **{"requests/s": spread(ours)})
        ratio = pair_ratios(ours, own)
        report.figure(f"{other}, 1 in flight, rate : bare loop", ratio, "at least", 0.6)
    if "MLServer" in servers:
        theirs = rates["MLServer", 64]
        for server, least in ((IN_POD, 8.0), (UNBATCHED, 4.0)):
            ratio = pair_ratios(rates[server, 64], theirs)
            report.figure(f"{server}, 64 in flight, rate : MLServer", ratio, "at least", least)


def _bare_rate(folder: Path, name: str, seconds: float) -> float:
    """The model's own ``predict`` of one row in a loop, on the serving core."""
    return _bare(
        _BARE_PREDICT, str(folder / "models" / name / "model.joblib"), str(folder / "row.npy"),
        str(seconds), core=serving_core(),
    )  # fmt: skip


def _register(mesh: Cluster, folder: Path, models: tuple[str, ...]) -> None:
    """By manifest: batching is off for the one that says so."""
    for model in models:
        annotations = {"mesh.serving/max-batch-size": "0"} if model == UNBATCHED else {}
        resource = {
            "apiVersion": "serving.kserve.io/v1beta1",
            "kind": "InferenceService",
            "metadata": {"name": model, "annotations": annotations},
            "spec": {"predictor": {"model": {
                "modelFormat": {"name": "sklearn"},
                "storageUri": f"file://{folder}/models/{model}",
            }}},
        }  # fmt: skip
        path = folder / f"{model}.json"
        path.write_text(json.dumps(resource))
        address = f"127.0.0.1:{mesh.router.port}"
        done = subprocess.run(
            [sys.executable, "-m", "mesh.cli", "--address", address, "apply", "-f", str(path)],
            cwd=ROOT, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        if done.returncode != 0:
            raise BenchError(f"mesh apply failed: {done.stderr}")
        mesh.load(_concrete(folder, model))


def _rate(
    folder: Path, server: str, port: int, row: np.ndarray[Any, Any], shape: Load, seconds: float
) -> float:
    """Through the instance itself (by the concrete model's id), or MLServer."""
    name = server
    headers: tuple[str, ...] = ()
    if server != "MLServer":
        name = _concrete(folder, server)
        headers = (f"mm-model-id: {name}",)
    message = _request(name, row)
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        reply: bytes = channel.unary_unary(INFER_PATH)(
            message, metadata=[tuple(h.split(": ")) for h in headers], timeout=60
        )
    body = folder / f"request-{server}"
    body.write_bytes(framed(message))
    size = len(framed(reply))
    tries = Load(shape.connections * shape.streams * 30, shape.connections, shape.streams)
    rough = h2load.run(port, body, tries, reply_bytes=size, headers=headers).rate
    count = max(tries.requests, int(rough * seconds))
    load = Load(count, shape.connections, shape.streams)
    return h2load.run(port, body, load, reply_bytes=size, headers=headers).rate


def _concrete(folder: Path, name: str) -> str:
    from mesh.manifest import parse_manifests

    (applied,) = parse_manifests((folder / f"{name}.json").read_text())
    return applied.model.model_id


@contextlib.contextmanager
def _mlserver(folder: Path) -> Iterator[int]:
    """MLServer with the joblib model under its own name, on the serving core; its gRPC port."""
    place = folder / "mlserver" / "MLServer"
    place.mkdir(parents=True)
    source = folder / "models" / ISOLATED / "model.joblib"
    (place / "model.joblib").write_bytes(source.read_bytes())
    settings = {"name": "MLServer", "implementation": "mlserver_sklearn.SKLearnModel",
                "parameters": {"uri": "./model.joblib"}}  # fmt: skip
    (place / "model-settings.json").write_text(json.dumps(settings))
    ports = [free_port() for _ in range(3)]
    server = {"host": "127.0.0.1", "http_port": ports[0], "grpc_port": ports[1],
              "metrics_port": ports[2], "parallel_workers": 0, "debug": False}  # fmt: skip
    (place.parent / "settings.json").write_text(json.dumps(server))
    argv = [str(MLSERVER), "start", str(place.parent)]
    with Child("MLServer", argv, core=serving_core()) as child:
        child.wait_for_port(ports[1], 120.0)
        with grpc.insecure_channel(f"127.0.0.1:{ports[1]}") as channel:
            ready = channel.unary_unary("/inference.GRPCInferenceService/ModelReady")
            request = oip_pb2.ModelReadyRequest(name="MLServer").SerializeToString()
            for _ in range(100):
                with contextlib.suppress(grpc.RpcError):
                    if oip_pb2.ModelReadyResponse.FromString(ready(request, timeout=5)).ready:
                        break
                child.check()
        yield ports[1]


# ---- density ----


def density(report: Report, effort: Effort) -> None:
    """Small ONNX models resident in one instance, against as many bare sessions."""
    count = effort.scaled(DENSE_MODELS, 20)
    with tempfile.TemporaryDirectory(prefix="bench-") as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        models = write_models(
            folder, [f"m-{number}" for number in range(count + 20)], small_model()
        )
        endpoint = stack.enter_context(etcd(folder / "etcd"))
        mesh = stack.enter_context(
            cluster(endpoint, folder, namespace="dense", instances=1, capacity_bytes=CAPACITY_BYTES)
        )
        mesh.register(models)
        pod = mesh.instances[0]
        _load_all(mesh, [name for name, _ in models[:20]])
        before = pod.child.rss_bytes()
        _load_all(mesh, [name for name, _ in models[20:]])
        held = (pod.child.rss_bytes() - before) / count
        _check_resident(pod, count)
        bare = _bare(_BARE_SESSIONS, str(models[0][1] / "model.onnx"), str(count))
    report.row(
        f"{count} small ONNX models resident in one instance",
        **{"bytes a model": round(held), "a bare session": round(bare)},
    )
    kb = (held - bare) / 1024
    report.figure(
        "density, a model beyond its session", spread([kb]), "at most", DENSE_KB_MAX, "KiB"
    )


def _load_all(mesh: Cluster, names: list[str]) -> None:
    with grpc.insecure_channel(f"127.0.0.1:{mesh.router.port}") as channel:
        call = channel.unary_unary("/mmesh.ModelMesh/ensureLoaded")
        for start in range(0, len(names), 32):
            pending = [
                call.future(
                    mmesh_pb2.EnsureLoadedRequest(modelId=name, sync=True).SerializeToString(),
                    timeout=120,
                )
                for name in names[start : start + 32]
            ]
            for future in pending:
                status = mmesh_pb2.ModelStatusInfo.FromString(future.result())
                if status.status != mmesh_pb2.ModelStatusInfo.LOADED:
                    raise BenchError(f"a model did not load: {status}")


def _check_resident(pod: Process, count: int) -> None:
    resident = sums(pod.metrics_port).get(RESIDENT, 0.0)
    if resident < count:
        raise Unavailable(f"only {resident:g} of {count} models are resident")
