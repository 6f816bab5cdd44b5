"""An executor on its own, with models that count their runs, and sinks that keep what comes."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from time import monotonic, thread_time_ns
from typing import Any

import numpy as np

from mesh.core.batching import Wished
from mesh.core.errors import InvalidArgument, MeshError
from mesh.core.policy import Policy
from mesh.core.usage import Use
from mesh.instance.clock import Clock
from mesh.instance.executor import Executor
from mesh.instance.forms import GrpcForm
from mesh.instance.servable import Servable
from mesh.metrics import InstanceMetrics
from mesh.runtimes.api import Array, ModelMetadata, Tensor, TensorSpec
from protos import oip_pb2

WAIT_S = 60.0
POISON = 666.0

Answer = Callable[[Array], Array]


class RowModel:
    """``answer`` of the rows, and the sum of each: every row for itself unless ``answer`` is not.
    A row that begins with POISON is refused."""

    size_bytes = 1

    def __init__(self, answer: Answer, first_axis: int = -1) -> None:
        shape = (first_axis, -1)
        self.metadata = ModelMetadata(
            "rows",
            (),
            (TensorSpec("x", "FP32", shape),),
            (TensorSpec("y", "FP32", shape), TensorSpec("sums", "FP32", (first_axis,))),
        )
        self.answer = answer
        self.gate = threading.Event()
        self.gate.set()
        self.lock = threading.Lock()
        self.inside = 0
        self.runs: list[tuple[int, str]] = []  # rows, thread

    def infer(
        self, inputs: Mapping[str, Array], outputs: Sequence[str], parameters: Mapping[str, Any]
    ) -> list[Tensor]:
        x = inputs["x"]
        with self.lock:
            self.runs.append((len(x), threading.current_thread().name))
            self.inside += 1
        try:
            assert self.gate.wait(WAIT_S)
            if (x[:, :1] == POISON).any():
                raise InvalidArgument("poison")
            y = self.answer(x) * np.float32(parameters.get("factor", 1))
            made = {"y": y.astype(np.float32), "sums": x.sum(axis=1, dtype=np.float32)}
            return [Tensor(name, "FP32", made[name]) for name in outputs or ("y", "sums")]
        finally:
            with self.lock:
                self.inside -= 1

    def unload(self) -> None:
        pass


def doubled(x: Array) -> Array:
    return x * 2


def costly(x: Array) -> Array:
    """The same, at a price for the run whatever its rows are."""
    until_ns = thread_time_ns() + 300_000
    while thread_time_ns() < until_ns:
        pass
    return x * 2


def centred(x: Array) -> Array:
    """Not each row for itself."""
    return x - x.mean(axis=0, keepdims=True)


class Reply:
    """A sink."""

    def __init__(self, deadline_s: float = float("inf")) -> None:
        self.cancelled = False
        self.deadline_s = deadline_s
        self.told: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    def reply(self, message: bytes, *, initial: object = (), trailers: object = ()) -> None:
        self.told.set_result(message)

    def fail(self, error: MeshError, *, trailers: object = ()) -> None:
        self.told.set_exception(error)

    async def tensors(self) -> tuple[str, dict[str, list[Any]]]:
        """(id, values of each output)."""
        async with asyncio.timeout(WAIT_S):
            return values(await self.told)


def request(
    rows: Sequence[Sequence[float]],
    ident: str = "",
    outputs: Sequence[str] = (),
    factor: int | None = None,
) -> bytes:
    data = np.array(rows, np.float32)
    message = oip_pb2.ModelInferRequest(model_name="m", id=ident)
    message.inputs.add(name="x", datatype="FP32", shape=data.shape)
    for name in outputs:
        message.outputs.add(name=name)
    if factor is not None:
        message.parameters["factor"].int64_param = factor
    message.raw_input_contents.append(data.tobytes())
    return message.SerializeToString()


def values(message: bytes) -> tuple[str, dict[str, list[Any]]]:
    reply = oip_pb2.ModelInferResponse.FromString(message)
    found = {
        out.name: np.frombuffer(raw, np.float32).reshape(out.shape).tolist()
        for out, raw in zip(reply.outputs, reply.raw_output_contents, strict=True)
    }
    return reply.id, found


class Rig:
    def __init__(self, model: RowModel, policy: Policy, threads: int, cores: int) -> None:
        self.model = model
        self.policy = policy
        self.changes: list[tuple[str, str]] = []
        self.metrics = InstanceMetrics()
        self.executor = Executor(
            policy,
            threads,
            self.metrics,
            Clock().offset_ms,
            on_idle=lambda model_id: None,
            idle_wanted=lambda: False,
            cores=cores,
            on_batching=lambda model_id, reason, _: self.changes.append((model_id, reason)),
        )
        self.servable = Servable("m", "rows", model, Use(), 64)
        self.servable.use_batching(Wished(), policy)
        self.form = GrpcForm("m")

    def state(self, rows: int, wait_us: int | None = None) -> None:
        """What the model's owner says."""
        self.servable.use_batching(Wished(rows, wait_us), self.policy)

    def submit(self, message: bytes, deadline_s: float = float("inf")) -> Reply:
        reply = Reply(deadline_s)
        self.executor.submit(self.servable, self.form, reply, message, "ModelInfer")
        return reply

    def quick(self) -> None:
        """From now on the model is taken to be quick enough for the event loop."""
        self.servable.estimates[:] = [1_000] * len(self.servable.estimates)
        self.servable.batch.joined_ns = dict.fromkeys(range(12), 1_000)

    @property
    def rows(self) -> list[int]:
        return [rows for rows, _ in self.model.runs]

    @property
    def reason(self) -> str:
        return self.servable.batch.standing.reason.value

    async def quiet(self) -> None:
        async with asyncio.timeout(WAIT_S):
            while self.executor.busy:  # noqa: ASYNC110 - what it waits for has no event
                await asyncio.sleep(0.001)


@asynccontextmanager
async def executing(
    model: RowModel, *, threads: int = 2, cores: int = 2, **policy: Any
) -> AsyncIterator[Rig]:
    """With two threads a copy has one run at a time: the second is for others."""
    rig = Rig(model, replace(Policy(), **{"inline_max_us": 0, **policy}), threads, cores)
    try:
        yield rig
        await rig.quiet()
        assert rig.servable.use.in_flight == 0
        assert rig.executor._held_bytes == 0
        assert rig.servable.running == rig.servable.batch.inside == 0
    finally:
        model.gate.set()
        rig.executor.close()


def past() -> float:
    return monotonic() - 1.0
