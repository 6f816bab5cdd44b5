"""The example runtime as a process of its own, behind a real instance on a store in memory."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from mesh import registry
from mesh.core.types import ModelRecord
from mesh.instance.flights import Wish
from mesh.instance.instance import Instance
from mesh.instance.settings import InstanceSettings
from mesh.internal_calls import REST_PATH
from mesh.runtimes.external import ExternalRuntimes, ExternalTimes
from mesh.store.memory import MemoryStore
from protos import oip_pb2 as oip
from puller.puller import Puller
from puller.settings import PullerSettings

OIP = "/inference.GRPCInferenceService/"
ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "deploy" / "examples" / "runtime" / "affine_runtime.py"
WAIT_S = 60.0

# As ModelMesh does it, only sooner.
QUICK = ExternalTimes(poll_s=0.02, start_timeout_s=WAIT_S, unload_retry_s=0.05)


class ExampleRuntime:
    """Its process. ``address`` stays the same when it is started again."""

    def __init__(self, folder: Path, loading_timeout_ms: int = 30_000) -> None:
        self.address = f"unix:{folder}/rt.sock"
        self._timeout_ms = loading_timeout_ms
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            str(EXAMPLE),
            "--listen",
            self.address,
            "--loading-timeout-ms",
            str(self._timeout_ms),
            stdout=asyncio.subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        assert self._process.stdout is not None
        async with asyncio.timeout(WAIT_S):
            assert await self._process.stdout.readline() == b"ready\n"

    async def kill(self) -> None:
        if self._process is not None and self._process.returncode is None:
            self._process.kill()
            await self._process.wait()


class Pod:
    """An instance with an external runtime behind it."""

    def __init__(self, folder: Path, runtimes: ExternalRuntimes, model_type: str) -> None:
        self.folder = folder
        self.runtimes = runtimes
        self.model_type = model_type
        self.store = MemoryStore()
        settings = InstanceSettings(
            puller=PullerSettings(cache_dir=folder / "cache", file_roots=(folder / "models",)),
            capacity_bytes=64 << 20,
            drain_notice_ms=0,
            metrics_port=None,
        )
        self.channel: grpc.aio.Channel | None = None
        self.instance = Instance(settings, self.store, Puller(settings.puller), runtimes)

    async def start(self) -> None:
        await self.runtimes.start()
        await self.instance.start()
        async with asyncio.timeout(WAIT_S):
            await self.instance.membership.joined.wait()
        self.channel = grpc.aio.insecure_channel(self.instance.address)

    async def close(self) -> None:
        if self.channel is not None:
            await self.channel.close()
        await self.instance.close()
        await self.runtimes.close()
        await self.store.close()

    def write(self, name: str, **document: Any) -> None:
        folder = self.folder / "models" / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "model.json").write_text(json.dumps(document))

    async def load(self, name: str, **fields: Any) -> Any:
        fields.setdefault("path", f"file://{self.folder}/models/{name}")
        record = ModelRecord(name, self.model_type, **fields)
        revision = await self.store.put(registry.key_of(record), registry.encode(record))
        return await self.again(name, revision)

    async def again(self, name: str, revision: int = 0) -> Any:
        async with asyncio.timeout(WAIT_S):
            return await self.instance.pod.load(Wish(name, revision or self.store.server.revision))

    async def infer(self, name: str, *values: float, **options: Any) -> oip.ModelInferResponse:
        raw = await self.call(OIP + "ModelInfer", request(name, *values), name, **options)
        return oip.ModelInferResponse.FromString(raw)

    async def call(self, path: str, message: Any, model_id: str, alias: str = "") -> bytes:
        metadata = [("mm-model-id", model_id)]
        if alias:
            metadata.append(("mm-vmodel-id", alias))
        method = self.channel.unary_unary(path)
        raw: bytes = await method(message.SerializeToString(), metadata=metadata, timeout=WAIT_S)
        return raw

    async def rest(self, model_id: str, kind: str, body: dict[str, Any], alias: str) -> Any:
        """What a router sends on of an HTTP request, and the answer's JSON."""
        metadata = [
            ("mm-model-id", model_id),
            ("mesh-rest-kind", kind),
            ("mesh-client-model-name", alias),
        ]
        method = self.channel.unary_unary(REST_PATH)
        return json.loads(
            await method(json.dumps(body).encode(), metadata=metadata, timeout=WAIT_S)
        )


def request(name: str, *values: float) -> oip.ModelInferRequest:
    message = oip.ModelInferRequest(model_name=name, id="r1")
    tensor = message.inputs.add(name="x", datatype="FP64", shape=[len(values)])
    tensor.contents.fp64_contents.extend(values)
    return message


def answer(reply: oip.ModelInferResponse) -> list[float]:
    return list(reply.outputs[0].contents.fp64_contents)


@asynccontextmanager
async def served(
    folder: Path, *, loading_timeout_ms: int = 30_000
) -> AsyncIterator[tuple[Pod, ExampleRuntime]]:
    runtime = ExampleRuntime(folder, loading_timeout_ms)
    try:
        await runtime.start()
        pod = Pod(folder, ExternalRuntimes.at(("affine",), runtime.address, times=QUICK), "affine")
        try:
            await pod.start()
            yield pod, runtime
        finally:
            await pod.close()
    finally:
        await runtime.kill()
