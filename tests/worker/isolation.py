"""An isolated runtime with short limits, models that misbehave on request, and calls to them."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np

from mesh.core.errors import MeshError
from mesh.runtimes.api import ModelSpec
from mesh.runtimes.isolated import IsolatedModel, IsolatedRuntime, IsolationLimits
from mesh.runtimes.isolated_fork_server import ForkServers
from mesh.runtimes.settings import RuntimeSettings
from mesh.wire import hpack
from mesh.wire.client import Reply, RpcError
from protos import oip_pb2

INFER = "/inference.GRPCInferenceService/ModelInfer"
MIB = 1 << 20
WAIT_S = 60.0

# Does what the request's parameter ``do`` says, by a model that means no harm otherwise.
MODEL = """
import ctypes, os, signal, subprocess, sys, threading, time
import numpy as np

class Model:
    def predict(self, inputs, parameters):
        match parameters.get("do", ""):
            case "segfault":
                ctypes.string_at(0)
            case "exit":
                os._exit(7)
            case "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            case "allocate":
                self.kept = [bytearray(b"x" * (1 << 20)) for _ in range(10_000)]
            case "sleep":
                threading.Event().wait()
            case "sleep with the lock":
                ctypes.PyDLL(None).sleep(1_000_000)
            case "close everything":
                os.closerange(3, 1_000)
            case "allocate in a child":
                text = "x = bytearray(b'x' * (500 << 20)); import time; time.sleep(1000)"
                self.child = subprocess.Popen([sys.executable, "-c", text])
                self.child.wait()
            case "raise":
                raise RuntimeError("no such luck")
            case "start a child":
                self.child = subprocess.Popen(["sleep", "1000"], start_new_session=True)
                return {"y": np.array([self.child.pid])}
            case "environment":
                return {"y": np.array([f"{k}={v}".encode() for k, v in os.environ.items()], object)}
            case "descriptors":
                links = [os.readlink(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd")
                         if int(n) > 2 and os.path.exists(f"/proc/self/fd/{n}")]
                return {"y": np.array([link.encode() for link in links], object)}
            case "threads":
                return {"y": np.array([threading.active_count()])}
        return {"y": inputs["x"] * 2}
"""


def python_model(folder: Path, text: str = MODEL) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.py").write_text(text)
    return folder


def infer_request(x: Any, do: str = "", **names: str) -> bytes:
    array = np.asarray(x, dtype=np.float32)
    request = oip_pb2.ModelInferRequest(**names)
    tensor = request.inputs.add(name="x", datatype="FP32", shape=list(array.shape))
    tensor.contents.fp32_contents.extend(array.ravel().tolist())
    if do:
        request.parameters["do"].string_param = do
    return request.SerializeToString()


def answer_of(reply: Reply) -> list[Any]:
    tensor = oip_pb2.ModelInferResponse.FromString(reply.message).outputs[0]
    field = tensor.contents.ListFields()[0][1]
    return list(field)


async def answers_of(model: IsolatedModel, array: np.ndarray) -> np.ndarray:
    """The first output of a model with one input of that datatype (FP32)."""
    assert model.metadata is not None
    name = model.metadata.inputs[0].name
    request = oip_pb2.ModelInferRequest()
    request.inputs.add(name=name, datatype="FP32", shape=list(array.shape))
    request.raw_input_contents.append(array.tobytes())
    reply = await model.channel.unary(
        INFER,
        request.SerializeToString(),
        metadata=(("mm-model-id", model.model_id),),
        timeout_s=WAIT_S,
    )
    answer = oip_pb2.ModelInferResponse.FromString(reply.message)
    found = np.frombuffer(answer.raw_output_contents[0], np.float32)
    return found.reshape(list(answer.outputs[0].shape))


class Failed(AssertionError):
    """A call that was to be answered."""


class Isolation:
    """``load`` a model, ``call`` it as the pod does, ``ask`` for an answer or ``fail``."""

    def __init__(self, runtime: IsolatedRuntime, folder: Path) -> None:
        self.runtime = runtime
        self.folder = folder

    async def load(
        self, model_id: str, text: str = MODEL, *, path: Path | None = None, kind: str = "python"
    ) -> IsolatedModel:
        where = path or python_model(self.folder / model_id, text)
        spec = ModelSpec(model_id, kind, where)
        async with asyncio.timeout(WAIT_S):
            return await asyncio.to_thread(self.runtime.load, spec)

    async def load_error(self, model_id: str, text: str = MODEL, **place: Any) -> MeshError:
        try:
            await self.load(model_id, text, **place)
        except MeshError as error:
            return error
        raise AssertionError(f"{model_id} was loaded")

    async def call(
        self, model: IsolatedModel, do: str = "", x: Any = (1.0, 2.0), timeout_s: float = WAIT_S
    ) -> Reply | MeshError:
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[Reply | RpcError] = loop.create_future()
        block = hpack.encode([(b"mm-model-id", model.model_id.encode())])
        deadline_s = time.monotonic() + timeout_s
        begun = model.channel.begin(
            INFER, infer_request(x, do), block, deadline_s, ended.set_result
        )
        try:
            outcome = await ended
        except asyncio.CancelledError:
            begun.cancel()
            raise
        return model.error(INFER, outcome) if isinstance(outcome, RpcError) else outcome

    async def ask(self, model: IsolatedModel, do: str = "", x: Any = (1.0, 2.0)) -> list[Any]:
        outcome = await self.call(model, do, x)
        if isinstance(outcome, MeshError):
            raise Failed(f"{outcome.code.name}: {outcome.message}")
        return answer_of(outcome)

    async def fail(self, model: IsolatedModel, do: str, **how: Any) -> MeshError:
        outcome = await self.call(model, do, **how)
        assert isinstance(outcome, MeshError), "it was answered"
        return outcome

    async def until(self, condition: Callable[[], object]) -> None:
        async with asyncio.timeout(WAIT_S):
            while not condition():  # noqa: ASYNC110 - what it waits for has no event
                await asyncio.sleep(0.005)


def limits(**changes: Any) -> IsolationLimits:
    return IsolationLimits(**{"worker_memory_bytes": 200 * MIB, **changes})


@asynccontextmanager
async def isolation(
    folder: Path,
    servers: ForkServers | None = None,
    *,
    allow_pickle: bool = True,
    allow_python: bool = True,
    intra_op_threads: int = 1,
    **changes: Any,
) -> AsyncIterator[Isolation]:
    """``servers``: fork servers that other tests use as well."""
    settings = RuntimeSettings(
        allow_pickle=allow_pickle, allow_python=allow_python, intra_op_threads=intra_op_threads
    )
    runtime = IsolatedRuntime(settings, limits(**changes), asyncio.get_running_loop(), servers)
    try:
        yield Isolation(runtime, folder)
    finally:
        await runtime.close()


def alive(pid: int) -> bool:
    """A zombie is not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in ("Z", "X")


def end(pid: int, number: int) -> None:
    os.kill(pid, number)
