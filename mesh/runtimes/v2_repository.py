"""Servers that speak the v2 repository API, as runtimes: MLServer and Triton, unmodified.

Each model is a folder in the server's own repository (``root``), made for it before a load and
removed when it is unloaded; the artifact stays where the puller has put it, and is named or linked.
The server must load nothing by itself (MLServer: ``load_models_at_startup: false``, Triton:
``--model-control-mode=explicit``), and see ``root`` and the artifacts at the same paths as we.

Sizes are the artifact's on the disk times a factor, capacity is the container's memory without a
buffer: neither server tells. Everything runs in the event loop and raises ``RpcError``; folders
that cannot be made are one with FAILED_PRECONDITION.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import sha1
from pathlib import Path
from typing import Final, Protocol
from urllib.parse import quote

from google.protobuf.message import Message

from mesh.core.errors import Code, InvalidArgument, MeshError
from mesh.runtimes.external_calls import Loaded, LoadOrder, M, call
from mesh.runtimes.external_model import is_lost
from mesh.runtimes.external_status import RuntimeStatus
from mesh.wire.client import Channel, RpcError
from protos import oip_pb2 as oip

_SERVICE: Final = "/inference.GRPCInferenceService/"
_ASK_TIMEOUT_S: Final = 5.0
# Triton ends an unload behind its answer; so often it is asked whether it has.
_UNLOAD_POLL_S: Final = 0.1
_NAME_MAX_CHARS: Final = 200  # a folder's name has 255 at most
# What ``AdapterSettings.from_environment`` and ``external_choice`` read: ModelMesh's names, and
# MODEL_REPOSITORY, the server's repository where it is not ROOT_MODEL_DIR/_repository.
VARIABLES: Final = frozenset(
    [
        "CONTAINER_MEM_REQ_BYTES",
        "MEM_BUFFER_BYTES",
        "MODEL_REPOSITORY",
        "ROOT_MODEL_DIR",
        "RUNTIME_PORT",
        "LOADING_CONCURRENCY",
        "LOADTIME_TIMEOUT",
        "DEFAULT_MODELSIZE",
        "MODELSIZE_MULTIPLIER",
        "LIMIT_PER_MODEL_CONCURRENCY",
    ]
)
_GONE: Final = frozenset({"", "UNAVAILABLE", "UNKNOWN"})


@dataclass(frozen=True, slots=True)
class AdapterSettings:
    """Names and defaults of ModelMesh's adapters (``from_environment``)."""

    root: Path = Path("/models/_repository")
    capacity_bytes: int = 1 << 30
    loading_concurrency: int = 1
    loading_timeout_ms: int = 30_000
    default_model_size_bytes: int = 1_000_000
    size_multiplier: float = 1.25
    per_model_concurrency: int = 0  # 0: no bound

    @classmethod
    def from_environment(cls, env: Mapping[str, str], *, capacity_bytes: int) -> AdapterSettings:
        """``capacity_bytes`` counts where CONTAINER_MEM_REQ_BYTES is not set. Raises
        InvalidArgument for a value that is no number in range."""
        number = _Numbers(env)
        memory = number.whole("CONTAINER_MEM_REQ_BYTES", 0)
        buffer = number.whole("MEM_BUFFER_BYTES", 256 << 20)
        if memory:
            capacity_bytes = memory - buffer
            if capacity_bytes <= 0:
                raise InvalidArgument(
                    f"CONTAINER_MEM_REQ_BYTES ({memory}) leaves nothing for models: "
                    f"MEM_BUFFER_BYTES is {buffer}"
                )
        folder = env.get("MODEL_REPOSITORY")
        return cls(
            root=Path(folder or f"{env.get('ROOT_MODEL_DIR') or '/models'}/_repository"),
            capacity_bytes=capacity_bytes,
            loading_concurrency=number.whole("LOADING_CONCURRENCY", 1, least=1),
            loading_timeout_ms=number.whole("LOADTIME_TIMEOUT", 30_000, least=100),
            default_model_size_bytes=number.whole("DEFAULT_MODELSIZE", 1_000_000, least=1),
            size_multiplier=number.fraction("MODELSIZE_MULTIPLIER", 1.25),
            per_model_concurrency=number.whole("LIMIT_PER_MODEL_CONCURRENCY", 0),
        )


class _Numbers:
    """Variables of an environment, read as numbers."""

    def __init__(self, env: Mapping[str, str]) -> None:
        self._env = env

    def whole(self, name: str, default: int, *, least: int = 0) -> int:
        text = self._env.get(name, "")
        if not text:
            return default
        if not (text.isascii() and text.isdigit() and len(text) < 19) or int(text) < least:
            raise InvalidArgument(
                f"{name}: expected a whole number of at least {least}; found {text!r:.60}"
            )
        return int(text)

    def fraction(self, name: str, default: float) -> float:
        text = self._env.get(name, "")
        try:
            value = float(text) if text else default
        except ValueError:
            value = -1.0
        if not 0.0 < value < 1_000.0:
            raise InvalidArgument(
                f"{name}: expected a number above 0 and below 1000; found {text!r:.60}"
            )
        return value


class Layout(Protocol):
    """How one kind of server wants a model's folder. ``unloads_later``: it answers an unload before
    the model is gone. ``formats``: those that it has a way for; with others a model's own settings
    or configuration must tell."""

    @property
    def unloads_later(self) -> bool: ...

    @property
    def formats(self) -> tuple[str, ...]: ...

    def write(self, folder: Path, name: str, order: LoadOrder) -> None:
        """Fill the empty ``folder``. Raises InvalidArgument, OSError."""
        ...


class V2Repository:
    """Implements ``Management`` for one server. ``disk_size_bytes`` measures an artifact."""

    def __init__(
        self,
        channel: Channel,
        settings: AdapterSettings,
        layout: Layout,
        disk_size_bytes: Callable[[Path], int],
    ) -> None:
        self._channel = channel
        self._settings = settings
        self._layout = layout
        self._disk_size_bytes = disk_size_bytes

    @property
    def address(self) -> str:
        return self._channel.address

    async def status(self) -> RuntimeStatus | None:
        """READY once the server lives, and holds no model that an earlier pod has left.

        Not ServerReady: Triton is not ready for ever after one model that it could not load.
        """
        found = await self._call(
            "ServerLive", oip.ServerLiveRequest(), oip.ServerLiveResponse, _ASK_TIMEOUT_S
        )
        if not found.live:
            return None
        await self._purge()
        said = self._settings
        return RuntimeStatus(
            capacity_bytes=said.capacity_bytes,
            max_loading_concurrency=said.loading_concurrency,
            loading_timeout_ms=said.loading_timeout_ms,
            default_model_size_bytes=said.default_model_size_bytes,
            limits_concurrency=said.per_model_concurrency > 0,
        )

    async def _purge(self) -> None:
        root = self._settings.root
        await asyncio.to_thread(root.mkdir, parents=True, exist_ok=True)
        for name, state in (await self._index()).items():
            if state not in _GONE and await asyncio.to_thread((root / name).is_dir):
                await self._unload(name, self._settings.loading_timeout_ms / 1_000)
        await asyncio.to_thread(_empty, root)

    async def load(self, order: LoadOrder, timeout_s: float) -> Loaded:
        name = server_name(order.model_id)
        size_bytes = await self._measure(order)
        try:
            await asyncio.to_thread(self._write, self._settings.root / name, name, order)
        except (OSError, MeshError) as error:
            raise RpcError(
                Code.FAILED_PRECONDITION, f"its folder for the server was not made: {error}"
            ) from None
        request = oip.RepositoryModelLoadRequest(model_name=name)
        try:
            await self._call(
                "RepositoryModelLoad", request, oip.RepositoryModelLoadResponse, timeout_s
            )
        except RpcError as error:
            if error.code in (Code.INVALID_ARGUMENT, Code.FAILED_PRECONDITION):
                # A ModelRuntime says so when it attempted nothing, these servers also half way:
                # an unload has to follow, which tidies up too.
                raise RpcError(Code.INTERNAL, error.message) from None
            raise
        return Loaded(size_bytes, self._settings.per_model_concurrency)

    def _write(self, folder: Path, name: str, order: LoadOrder) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        self._layout.write(folder, name, order)

    async def size_bytes(self, model_id: str, timeout_s: float) -> int:
        return 0  # a load tells

    async def predict_size_bytes(self, order: LoadOrder, timeout_s: float) -> int:
        return await self._measure(order)

    async def _measure(self, order: LoadOrder) -> int:
        on_disk = await asyncio.to_thread(self._disk_size_bytes, order.path)
        return max(1, round(on_disk * self._settings.size_multiplier))

    async def unload(self, model_id: str, timeout_s: float) -> None:
        await self._unload(server_name(model_id), timeout_s)

    async def _unload(self, name: str, timeout_s: float) -> None:
        """And its folder is removed. One that the server does not have is unloaded."""
        try:
            await self._unload_and_wait(name, timeout_s)
        except RpcError as error:
            if not is_lost(error):
                raise
        await asyncio.to_thread(shutil.rmtree, self._settings.root / name, ignore_errors=True)

    async def _unload_and_wait(self, name: str, timeout_s: float) -> None:
        request = oip.RepositoryModelUnloadRequest(model_name=name)
        await self._call(
            "RepositoryModelUnload", request, oip.RepositoryModelUnloadResponse, timeout_s
        )
        if not self._layout.unloads_later:
            return
        try:
            async with asyncio.timeout(timeout_s):
                while (await self._index()).get(name, "") not in _GONE:  # noqa: ASYNC110 - polled
                    await asyncio.sleep(_UNLOAD_POLL_S)
        except TimeoutError:
            raise RpcError(
                Code.DEADLINE_EXCEEDED, f"{name!r} is not unloaded after {timeout_s:g}s"
            ) from None

    async def _index(self) -> dict[str, str]:
        """Name to state; of several versions the one that is most there."""
        answer = await self._call(
            "RepositoryIndex",
            oip.RepositoryIndexRequest(),
            oip.RepositoryIndexResponse,
            _ASK_TIMEOUT_S,
        )
        found: dict[str, str] = {}
        for model in answer.models:
            if found.get(model.name, "") in _GONE:
                found[model.name] = model.state
        return found

    async def close(self) -> None:
        await self._channel.close()

    async def _call(self, rpc: str, request: Message, kind: type[M], timeout_s: float) -> M:
        return await call(self._channel, _SERVICE + rpc, request, kind, timeout_s)


def server_name(model_id: str) -> str:
    """A model's name in the server, which is its folder's too: not hidden, no path."""
    name = quote(model_id, safe="")
    if name.startswith("."):
        name = "%2E" + name[1:]
    if len(name) > _NAME_MAX_CHARS:
        digest = sha1(model_id.encode(), usedforsecurity=False).hexdigest()
        name = f"{name[: _NAME_MAX_CHARS - len(digest) - 1]}-{digest}"
    return name


def _empty(root: Path) -> None:
    for folder in root.iterdir():
        if folder.is_dir() and not folder.is_symlink():
            shutil.rmtree(folder, ignore_errors=True)
