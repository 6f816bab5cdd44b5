"""A mesh of real processes: etcd, one router, some instances, registered models.

Started through the command line that operators use (``mesh router``, ``mesh instance``).
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from bench.payload import INFER_PATH
from bench.process import BenchError, Child, Unavailable, free_port
from bench.scrape import sums, wait_for_series, wait_ready
from mesh.store.etcd_binary import EtcdNotFound, find_etcd
from protos import mmesh_pb2

READY_TIMEOUT_S = 60.0
LOAD_TIMEOUT_S = 60.0
# Registrations under way at once.
REGISTERING = 64


@dataclass(frozen=True, slots=True)
class Process:
    """One router or instance, its gRPC port and its metrics port."""

    child: Child
    port: int
    metrics_port: int


@dataclass(slots=True)
class Cluster:
    router: Process
    instances: list[Process]
    _channel: grpc.Channel = field(repr=False)

    def register(self, models: Sequence[tuple[str, Path]]) -> None:
        """Register ONNX models by their folders, and not load them."""
        call = self._channel.unary_unary("/mmesh.ModelMesh/registerModel")
        for start in range(0, len(models), REGISTERING):
            pending = []
            for name, folder in models[start : start + REGISTERING]:
                info = mmesh_pb2.ModelInfo(type="onnx", path=f"file://{folder}")
                request = mmesh_pb2.RegisterModelRequest(modelId=name, modelInfo=info)
                pending.append(call.future(request.SerializeToString(), timeout=LOAD_TIMEOUT_S))
            for future in pending:
                future.result()

    def register_uri(self, name: str, uri: str) -> None:
        """Register one ONNX model by where it is, and not load it."""
        info = mmesh_pb2.ModelInfo(type="onnx", path=uri)
        request = mmesh_pb2.RegisterModelRequest(modelId=name, modelInfo=info)
        call = self._channel.unary_unary("/mmesh.ModelMesh/registerModel")
        call(request.SerializeToString(), timeout=LOAD_TIMEOUT_S)

    def unregister(self, name: str) -> None:
        request = mmesh_pb2.UnregisterModelRequest(modelId=name)
        call = self._channel.unary_unary("/mmesh.ModelMesh/unregisterModel")
        call(request.SerializeToString(), timeout=LOAD_TIMEOUT_S)

    def infer(self, message: bytes, timeout_s: float = LOAD_TIMEOUT_S) -> bytes:
        """One request through the router, waiting for a load if it takes one."""
        reply: bytes = self._channel.unary_unary(INFER_PATH)(message, timeout=timeout_s)
        return reply

    def load(self, model: str) -> None:
        """Have a model loaded and wait for it."""
        request = mmesh_pb2.EnsureLoadedRequest(modelId=model, sync=True)
        call = self._channel.unary_unary("/mmesh.ModelMesh/ensureLoaded")
        status = mmesh_pb2.ModelStatusInfo.FromString(
            call(request.SerializeToString(), timeout=LOAD_TIMEOUT_S)
        )
        if status.status != mmesh_pb2.ModelStatusInfo.LOADED:
            raise BenchError(f"{model} did not load: {status}")

    def instance_sums(self, name: str) -> float:
        """One series, added up over the instances."""
        return sum(sums(process.metrics_port).get(name, 0.0) for process in self.instances)


@contextlib.contextmanager
def etcd(folder: Path) -> Iterator[str]:
    """A fresh etcd; gives its ``host:port``."""
    try:
        found = find_etcd()
    except EtcdNotFound as error:
        raise Unavailable(str(error)) from error
    port, peer = free_port(), free_port()
    client, member = f"http://127.0.0.1:{port}", f"http://127.0.0.1:{peer}"
    argv = [
        str(found.path), "--name=bench", f"--data-dir={folder}",
        f"--listen-client-urls={client}", f"--advertise-client-urls={client}",
        f"--listen-peer-urls={member}", f"--initial-advertise-peer-urls={member}",
        f"--initial-cluster=bench={member}", "--heartbeat-interval=20", "--election-timeout=200",
        "--log-level=error", "--logger=zap", "--unsafe-no-fsync",
    ]  # fmt: skip
    if found.version < (3, 5, 0):
        argv.remove("--unsafe-no-fsync")
    with Child("etcd", argv) as child:
        child.wait_for_port(port)
        yield f"127.0.0.1:{port}"


@contextlib.contextmanager
def cluster(
    endpoint: str,
    folder: Path,
    *,
    namespace: str,
    instances: int,
    capacity_bytes: int,
    core: int | None = None,
    instance_flags: Sequence[str] = (),
) -> Iterator[Cluster]:
    """A router and instances in a namespace of their own; ``folder`` is the allowed file root and
    holds their caches. ``core``: where all of them run; None: anywhere."""
    with contextlib.ExitStack() as stack:
        common = ("--etcd", endpoint, "--namespace", namespace, "--log-level", "warning")
        pods = []
        for number in range(instances):
            cache = folder / f"cache-{namespace}-{number}"
            own = (
                "--capacity", str(capacity_bytes), "--file-root", str(folder),
                "--cache-dir", str(cache), "--name", f"{namespace}-{number}", *instance_flags,
            )  # fmt: skip
            pods.append(stack.enter_context(_process("instance", (*common, *own), core)))
        router = stack.enter_context(
            _process("router", (*common, "--rest-port", str(free_port())), core)
        )
        for process in (*pods, router):
            wait_ready(process.child, process.metrics_port, READY_TIMEOUT_S)
        wait_for_series(router.child, router.metrics_port, "mesh_instances", instances)
        channel = stack.enter_context(
            grpc.insecure_channel(
                f"127.0.0.1:{router.port}", options=(("grpc.use_local_subchannel_pool", 1),)
            )
        )
        yield Cluster(router, pods, channel)


@contextlib.contextmanager
def _process(role: str, arguments: Sequence[str], core: int | None) -> Iterator[Process]:
    port, metrics_port = free_port(), free_port()
    argv = [
        sys.executable, "-m", "mesh.cli", role, "--grpc-port", str(port),
        "--metrics-port", str(metrics_port), *arguments,
    ]  # fmt: skip
    with Child(f"mesh {role}", argv, core=core) as child:
        yield Process(child, port, metrics_port)


def write_models(folder: Path, names: Sequence[str], content: bytes) -> list[tuple[str, Path]]:
    """One folder with one ONNX file a model."""
    made = []
    for name in names:
        place = folder / "models" / name
        place.mkdir(parents=True)
        (place / "model.onnx").write_bytes(content)
        made.append((name, place))
    return made
