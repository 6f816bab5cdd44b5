"""Models of a runtime in another process of the pod: ``mmesh.ModelRuntime``, or an adapter.

Owns the runtime's state as this pod knows it (ready or away), and the time-outs and retries of its
management calls; requests do not come by here (``mesh.runtimes.external_model``). ``start`` waits
for the runtime and refuses one that cannot be worked with. A load that failed half way, timed out
or was called off is followed by an unload at once, so that the runtime keeps nothing that the pod's
books do not know. A runtime that went away is asked until it is ready again; its models are gone
then, and each is loaded anew when a request finds that out.

``load``, ``predict_size_bytes`` and the models' ``unload`` block, in worker threads; everything
else runs in the event loop.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from concurrent.futures import CancelledError
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

import orjson

from mesh.core.errors import Code, LoadFailed, MeshError, Unavailable
from mesh.runtimes.api import ModelSpec
from mesh.runtimes.external_calls import LoadOrder, Management, ModelRuntimeClient
from mesh.runtimes.external_model import ExternalModel
from mesh.runtimes.external_status import RuntimeStatus, shortcoming
from mesh.runtimes.external_unloads import Unloads
from mesh.wire.client import Channel, RpcError

log = logging.getLogger(__name__)

T = TypeVar("T")

# ModelMesh's runtimes listen there unless told otherwise.
DEFAULT_SOCKET: Final = Path("/tmp/mmesh/grpc.sock")
DEFAULT_PORT: Final = 8085

# With these a load has not been attempted: there is nothing to undo, and the model is at fault.
_NOT_ATTEMPTED: Final = frozenset({Code.INVALID_ARGUMENT, Code.FAILED_PRECONDITION})
# What may be otherwise next time, or elsewhere.
_TRANSIENT: Final = frozenset(
    {
        Code.UNAVAILABLE,
        Code.DEADLINE_EXCEEDED,
        Code.CANCELLED,
        Code.RESOURCE_EXHAUSTED,
        Code.ABORTED,
    }
)


@dataclass(frozen=True, slots=True)
class ExternalTimes:
    """ModelMesh's own time-outs and retries, seconds."""

    poll_s: float = 2.0
    start_timeout_s: float = 180.0
    size_timeout_s: float = 30.0
    predict_timeout_s: float = 0.5
    unload_timeout_s: float = 60.0
    unload_retry_s: float = 10.0
    unload_tries: int = 90


def default_endpoint() -> str:
    """Where a runtime is looked for that nobody gave an address of."""
    return f"unix:{DEFAULT_SOCKET}" if DEFAULT_SOCKET.exists() else f"127.0.0.1:{DEFAULT_PORT}"


class ExternalRuntimes:
    """Implements ``mesh.instance.loader.Runtimes`` and ``Runtime`` for all its model types.

    ``await start()`` before the pod serves, ``await close()`` behind it. ``data`` is the channel
    that requests go by. ``server_name`` is set for a server that knows models by ``model_name``
    alone: how it calls the model of an id.
    """

    def __init__(
        self,
        model_types: tuple[str, ...],
        management: Management,
        data: Channel,
        *,
        times: ExternalTimes | None = None,
        server_name: Callable[[str], str] | None = None,
    ) -> None:
        self._model_types = model_types
        self._management = management
        self._data = data
        self._times = times or ExternalTimes()
        self._server_name = server_name
        self._loop: asyncio.AbstractEventLoop | None = None
        self._status: RuntimeStatus | None = None
        self._ready = asyncio.Event()
        self._coming_back: asyncio.Task[None] | None = None
        self._predicts = True
        self._loads: dict[str, asyncio.Task[Any]] = {}
        self._unloads = Unloads(
            management,
            tries=self._times.unload_tries,
            retry_s=self._times.unload_retry_s,
            timeout_s=self._times.unload_timeout_s,
            lost=self._lost,
        )

    @classmethod
    def at(
        cls,
        model_types: tuple[str, ...],
        endpoint: str = "",
        data_endpoint: str = "",
        *,
        times: ExternalTimes | None = None,
    ) -> ExternalRuntimes:
        """A runtime that implements ``mmesh.ModelRuntime``; "" is ModelMesh's default place, and
        for ``data_endpoint`` the same as ``endpoint``."""
        endpoint = endpoint or default_endpoint()
        management = ModelRuntimeClient(Channel(endpoint))
        return cls(model_types, management, Channel(data_endpoint or endpoint), times=times)

    # ---- what the pod asks ----

    @property
    def model_types(self) -> tuple[str, ...]:
        return self._model_types

    def runtime_for(self, model_type: str) -> ExternalRuntimes:
        return self

    @property
    def status(self) -> RuntimeStatus:
        """What the runtime said when it was ready last."""
        assert self._status is not None, "start() comes first"
        return self._status

    @property
    def pending_unloads(self) -> tuple[str, ...]:
        return self._unloads.pending

    async def start(self) -> RuntimeStatus:
        """Return when the runtime is ready. Raises FailedPrecondition when it says that it will
        not be, or cannot be worked with, Unavailable when it is not after ``start_timeout_s``."""
        self._loop = asyncio.get_running_loop()
        status = await self._until_ready(self._times.start_timeout_s)
        wrong = shortcoming(status)
        if wrong is not None:
            raise wrong
        self._status = status
        self._ready.set()
        log.info(
            "the runtime at %s is ready: version %r, %d bytes for models, %d loads at once",
            self._management.address,
            status.version,
            status.capacity_bytes,
            status.max_loading_concurrency,
        )
        return status

    async def close(self) -> None:
        """Ends what is under way; the runtime's process is not ours to end. Idempotent."""
        tasks = [*self._loads.values()]
        if self._coming_back is not None:
            tasks.append(self._coming_back)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._unloads.close()
        await self._management.close()
        await self._data.close()

    # ---- Runtime: in worker threads ----

    def predict_size_bytes(self, spec: ModelSpec) -> int:
        return self._in_loop(self._predict(order_of(spec)))

    def load(self, spec: ModelSpec) -> ExternalModel:
        return self._in_loop(self._load(order_of(spec)))

    def cancel_load(self, model_id: str) -> None:
        """Nobody wants it any more: its ``load`` raises, once it is unloaded again. In the event
        loop."""
        task = self._loads.get(model_id)
        if task is not None:
            task.cancel()

    def _in_loop(self, work: Coroutine[Any, Any, T]) -> T:
        assert self._loop is not None, "start() comes first"
        try:
            return asyncio.run_coroutine_threadsafe(work, self._loop).result()
        except CancelledError:
            raise Unavailable("the pod is shutting down") from None

    # ---- in the event loop ----

    async def _predict(self, order: LoadOrder) -> int:
        default = self.status.default_model_size_bytes
        if not self._predicts:
            return default
        try:
            size_bytes = await self._management.predict_size_bytes(
                order, self._times.predict_timeout_s
            )
        except RpcError as error:
            if error.code is Code.UNIMPLEMENTED:
                self._predicts = False
            else:
                self._lost(error)
            return default
        return size_bytes or default

    async def _load(self, order: LoadOrder) -> ExternalModel:
        timeout_s = self.status.loading_timeout_ms / 1_000
        task = asyncio.current_task()
        assert task is not None  # it was started as one
        self._loads[order.model_id] = task
        begun = False
        try:
            await self._until_free(order, timeout_s)
            begun = True
            loaded = await self._management.load(order, timeout_s)
            size_bytes = loaded.size_bytes or await self._size(order.model_id)
        except asyncio.CancelledError:
            if begun:
                await self._unloads.unload_soon(order.model_id)
            raise LoadFailed("the load was called off", code=Code.UNAVAILABLE) from None
        except RpcError as error:
            if error.code not in _NOT_ATTEMPTED:
                self._lost(error)
                await self._unloads.unload_soon(order.model_id)
            raise self._load_failure(order, error, timeout_s) from None
        finally:
            if self._loads.get(order.model_id) is task:
                del self._loads[order.model_id]
        return ExternalModel(
            order.model_id,
            self._data,
            self.status,
            size_bytes=size_bytes,
            max_concurrency=loaded.max_concurrency,
            let_go=self._let_go,
            lost=self._lost,
            server_name=self._server_name(order.model_id) if self._server_name else "",
        )

    async def _until_free(self, order: LoadOrder, timeout_s: float) -> None:
        """The runtime is there, and an unload that failed before has been tried once more."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._ready.wait()
                await self._unloads.make_way(order.model_id)
        except TimeoutError:
            raise self._timed_out(order, timeout_s) from None

    async def _size(self, model_id: str) -> int:
        """Of a loaded model whose load did not tell."""
        try:
            found = await self._management.size_bytes(model_id, self._times.size_timeout_s)
        except RpcError as error:
            log.warning("the runtime does not tell the size of %r: %s", model_id, error.message)
            found = 0
        return found or self.status.default_model_size_bytes

    def _load_failure(self, order: LoadOrder, error: RpcError, timeout_s: float) -> MeshError:
        if error.code is Code.DEADLINE_EXCEEDED:
            return self._timed_out(order, timeout_s)
        code = Code.UNAVAILABLE if error.code in _TRANSIENT else Code.FAILED_PRECONDITION
        return LoadFailed(
            f"the runtime at {self._management.address} did not load model {order.model_id!r} "
            f"({error.code.name}): {error.message}",
            code=code,
        )

    def _timed_out(self, order: LoadOrder, timeout_s: float) -> MeshError:
        return LoadFailed(
            f"Load of model {order.model_id!r} timed out after {timeout_s:g}s in the runtime at "
            f"{self._management.address}",
            code=Code.UNAVAILABLE,
        )

    def _let_go(self, model_id: str) -> None:
        """Worker threads end here: ``ExternalModel.unload``."""
        self._in_loop(self._unloads.unload(model_id))

    # ---- a runtime that went away ----

    def _lost(self, error: RpcError) -> None:
        """Any error of a call. One that says that nobody is there begins to wait for its return."""
        if error.code is not Code.UNAVAILABLE or error.trailers or self._loop is None:
            return
        if self._coming_back is None or self._coming_back.done():
            self._ready.clear()
            log.warning("the runtime at %s is away: %s", self._management.address, error.message)
            self._coming_back = self._loop.create_task(self._come_back(), name="external runtime")

    async def _come_back(self) -> None:
        """Until it is ready again, however long that takes: without it the pod loads nothing."""
        while True:
            with suppress(MeshError):
                status = await self._until_ready(self._times.start_timeout_s)
                wrong = shortcoming(status)
                if wrong is None:
                    break
                log.error("%s", wrong.message)
            await asyncio.sleep(self._times.poll_s)
        self._status = status
        self._predicts = True
        self._ready.set()
        self._unloads.nudge_all()
        log.info("the runtime at %s is back", self._management.address)

    async def _until_ready(self, timeout_s: float) -> RuntimeStatus:
        last = "it is STARTING"
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    try:
                        status = await self._management.status()
                    except RpcError as error:
                        last = error.message
                    else:
                        if status is not None:
                            return status
                        last = "it is STARTING"
                    await asyncio.sleep(self._times.poll_s)
        except TimeoutError:
            raise Unavailable(
                f"the runtime at {self._management.address} is not ready after {timeout_s:g}s: "
                f"{last}"
            ) from None


def order_of(spec: ModelSpec) -> LoadOrder:
    """As ModelMesh's puller tells a runtime: the local path, and a key that knows the size."""
    said = spec.parameters.get("key")
    try:
        key = orjson.loads(said) if said else {}
    except orjson.JSONDecodeError:
        key = None
    if isinstance(key, dict):
        key.setdefault("model_type", {"name": spec.model_type})
        key["disk_size_bytes"] = disk_size_bytes(spec.path)
        said = orjson.dumps(key).decode()
    return LoadOrder(spec.model_id, spec.model_type, spec.path, str(said))


def disk_size_bytes(path: Path) -> int:
    if path.is_file():
        return path.stat().st_size
    return sum(entry.stat().st_size for entry in path.rglob("*") if entry.is_file())
