"""A worker process: one model, served by the pod's own handlers on a Unix socket.

Beside them it answers Load, which brings the model in, Terms, by which it runs requests from then
on, and Ping, which tells how long inferences have been inside it. It judges nothing: the pod ends
it when it takes too long or too much. SIGTERM lets the model unload for a moment and ends the
process.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from threading import get_ident
from time import monotonic_ns
from typing import Any, Final

from mesh.core.policy import Policy
from mesh.core.usage import Use
from mesh.instance.carrier import Carrier
from mesh.instance.clock import Clock
from mesh.instance.executor import Executor
from mesh.instance.inference import MODEL_INFER, MODEL_STREAM_INFER, Inference
from mesh.instance.loader import as_load_failure
from mesh.instance.model_info import ModelInfo
from mesh.instance.servable import Servable
from mesh.instance.threads import in_thread
from mesh.internal_calls import REST_PATH
from mesh.metrics import InstanceMetrics
from mesh.runtimes.api import Array, LoadedModel, ModelMetadata, Tensor, VersionedModel
from mesh.runtimes.isolated_protocol import (
    LOAD_PATH,
    PING_PATH,
    TERMS_PATH,
    Order,
    Pulse,
    load_reply,
    load_spec,
    terms_told,
)
from mesh.runtimes.layout import lay_out
from mesh.runtimes.registry import RuntimeRegistry
from mesh.wire.limits import INSIDE
from mesh.wire.server import AsyncUnary, Method, Server, ServerCall, Streaming, Unary
from mesh.worker.library_threads import LibraryThreads

log = logging.getLogger(__name__)

# In a pod a run in the event loop holds up other models' requests, here those of its own only, and
# the hand-over to a thread and back takes longer than most models of code do.
_INLINE_US: Final = 1_000
_INLINE_TURN_US: Final = 2_000
# A model that is told to unload has so long before the process ends anyway.
_UNLOAD_S: Final = 1.0


def policy_inside(policy: Policy) -> Policy:
    """The pod's policy as it holds in a worker. 0 stays: nothing runs in the event loop."""
    if not policy.inline_max_us:
        return policy
    return replace(
        policy,
        inline_max_us=max(policy.inline_max_us, _INLINE_US),
        inline_turn_max_us=max(policy.inline_turn_max_us, _INLINE_TURN_US),
    )


class Inside:
    """Which threads are inside the model, and since when (``monotonic_ns``)."""

    __slots__ = ("since_ns",)

    def __init__(self) -> None:
        self.since_ns: dict[int, int] = {}

    def pulse(self) -> Pulse:
        begun = list(self.since_ns.values())
        oldest_ms = (monotonic_ns() - min(begun)) // 1_000_000 if begun else 0
        return Pulse(len(begun), oldest_ms)


class TimedModel:
    """The model itself; it is only noted who is inside, and each thread is given the libraries'
    threads that the model may use (``mesh.worker.library_threads``)."""

    __slots__ = ("_inside", "_model", "_threads", "infer_inside", "metadata")

    def __init__(self, model: LoadedModel, inside: Inside, threads: LibraryThreads) -> None:
        self._model = model
        self._threads = threads
        self._inside = inside.since_ns
        self.infer_inside = model.infer
        self.metadata: ModelMetadata = model.metadata

    def __getattr__(self, name: str) -> Any:
        """Whatever else a runtime's model offers to the executor."""
        return getattr(self._model, name)

    @property
    def size_bytes(self) -> int:
        return self._model.size_bytes

    def infer(
        self, inputs: Mapping[str, Array], outputs: Sequence[str], parameters: Mapping[str, Any]
    ) -> list[Tensor]:
        thread = get_ident()
        self._inside[thread] = monotonic_ns()
        if thread not in self._threads.limited:
            self._threads.limit(thread)
        try:
            return self.infer_inside(inputs, outputs, parameters)
        finally:
            self._inside.pop(thread, None)

    def unload(self) -> None:
        self._model.unload()


class Worker:
    """See the module's docstring. Made in the event loop."""

    def __init__(self, order: Order) -> None:
        policy, metrics, clock = policy_inside(Policy()), InstanceMetrics(), Clock()
        offset_ms = clock.offset_ms
        never: dict[str, Any] = {"on_idle": lambda _: None, "idle_wanted": lambda: False}
        self._threads = order.threads
        self._settings = order.settings
        self._registry = RuntimeRegistry(order.settings)
        self._servables: dict[str, Servable] = {}
        self._inside = Inside()
        # One more than may be inside the model: a copy is never given all threads.
        self._executor = Executor(policy, order.threads + 1, metrics, offset_ms, **never)
        carrier = Carrier(policy, metrics, offset_ms, on_lost=lambda _: None, **never)
        inference = Inference(self._servables, self._executor, carrier)
        info = ModelInfo(self._servables, "", lambda: bool(self._servables), carrier)
        methods: dict[str, Method] = {
            MODEL_INFER: Unary(inference.model_infer, inference.accept),
            MODEL_STREAM_INFER: Streaming(inference.model_stream_infer, inference.accept),
            REST_PATH: Unary(inference.rest, inference.accept),
            **info.methods(),
            LOAD_PATH: AsyncUnary(self._load),
            PING_PATH: Unary(self._ping),
            TERMS_PATH: Unary(self._use_terms),
        }
        limits = replace(INSIDE, max_message_bytes=order.max_message_bytes)
        self.server = Server(methods, limits=limits)

    def _ping(self, call: ServerCall, message: bytes) -> None:
        call.reply(self._inside.pulse().encode())

    def _use_terms(self, call: ServerCall, message: bytes) -> None:
        record, policy = terms_told(message)
        self._executor.use_policy(policy_inside(policy))
        for servable in self._servables.values():
            servable.use_batching(record, policy)
        call.reply(b"")

    async def _load(self, _: ServerCall, message: bytes) -> bytes:
        """Fails with the runtime's own error; the process is then ended by the pod."""
        spec = load_spec(message)
        runtime = self._registry.runtime_for(spec.model_type)
        try:
            model = await in_thread("load", lambda: runtime.load(spec))
        except Exception as error:
            raise as_load_failure(spec.model_id, error) from None
        options = lay_out(spec.path, spec.model_type, spec.model_id).options
        threads = LibraryThreads(options.threads or self._settings.intra_op_threads)
        timed = self._timed(model, threads)
        servable = Servable(spec.model_id, spec.model_type, timed, Use(), self._threads)
        self._servables[spec.model_id] = servable
        gc.collect()
        gc.freeze()
        return load_reply(servable.metadata)

    def _timed(self, model: Any, threads: LibraryThreads) -> TimedModel | VersionedModel:
        if not isinstance(model, VersionedModel):
            return TimedModel(model, self._inside, threads)
        versions = {
            name: TimedModel(one, self._inside, threads) for name, one in model.versions.items()
        }
        return VersionedModel(versions, model.options)

    async def unload(self) -> None:
        for servable in self._servables.values():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_UNLOAD_S):
                    await in_thread("unload", servable.model.unload)


async def _serve(order: Order, ready_fd: int) -> None:
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    worker = Worker(order)
    await worker.server.start_unix(order.socket_path)
    os.write(ready_fd, b"1")
    os.close(ready_fd)
    await stop.wait()
    await worker.unload()


def run(order: Order, ready_fd: int) -> None:
    """In a fresh fork: serve until SIGTERM. Tells by a byte on ``ready_fd`` that it listens."""
    # As in the pod: a thread that runs Python gives way to the event loop after this long.
    sys.setswitchinterval(0.001)
    numpy = sys.modules.get("numpy")
    if numpy is not None:  # or all workers would draw the same numbers
        numpy.random.seed()
    try:
        import uvloop
    except ImportError:
        asyncio.run(_serve(order, ready_fd))
        return
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(order, ready_fd))
