"""The Open Inference Protocol's calls that the router answers by itself, from its view.

ServerLive, ServerReady, ServerMetadata, ModelReady and the repository calls. Inference, metadata,
configuration and statistics are a copy's answers and are relayed (``RELAYED``).

A registered model is ready when it is loaded, or when nothing that is known stands in the way of
loading it: it need not be in memory, because a request brings it there. RepositoryIndex tells the
difference: READY is in memory, UNAVAILABLE with a reason is not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from mesh.core import loads as core_loads
from mesh.core.errors import InvalidArgument, MeshError, NotFound, Unimplemented
from mesh.core.policy import Policy
from mesh.core.status import ModelStatus, name_status
from mesh.core.types import ModelState
from mesh.core.view import ClusterView, Resolved
from mesh.metrics import RouterMetrics
from mesh.wire.server import AsyncUnary
from protos import oip_pb2 as pb
from router.loads import Loads
from router.names import NameLookup
from router.readiness import Readiness
from router.rpc import Rpcs, methods_of

SERVICE: Final = "inference.GRPCInferenceService"
SERVER_NAME: Final = "modelmesh-py"
# Only what is implemented, here and in every instance.
EXTENSIONS: Final = (
    "binary_tensor_data",
    "classification",
    "model_configuration",
    "model_repository",
    "statistics",
)

# Relayed to a copy of the model that their first field names.
RELAYED: Final = frozenset(
    f"/{SERVICE}/{rpc}"
    for rpc in ("ModelInfer", "ModelStreamInfer", "ModelMetadata", "ModelConfig", "ModelStatistics")
)
# ... and sent again after delivery, as long as no byte of a reply was passed on.
IDEMPOTENT: Final = RELAYED - {f"/{SERVICE}/ModelStreamInfer"}

NOT_IN_MEMORY: Final = "not in memory; the first request loads it"


@dataclass(frozen=True, slots=True)
class IndexEntry:
    """One line of the repository index. ``state``: READY, LOADING or UNAVAILABLE."""

    name: str
    state: str
    reason: str
    version: str = "1"


@dataclass(slots=True)
class Oip:
    """The answers, for gRPC (``methods``) and for REST. ``now_ms`` is the wall clock's reading."""

    view: ClusterView
    loads: Loads
    names: NameLookup
    readiness: Readiness
    policy: Policy
    now_ms: Callable[[], int]
    software_version: str = ""

    def use_policy(self, policy: Policy) -> None:
        self.policy = policy

    def methods(self, metrics: RouterMetrics) -> dict[str, AsyncUnary]:
        """Full path to method."""
        table: Rpcs = {
            "ServerLive": (pb.ServerLiveRequest, self._server_live),
            "ServerReady": (pb.ServerReadyRequest, self._server_ready),
            "ServerMetadata": (pb.ServerMetadataRequest, self._server_metadata),
            "ModelReady": (pb.ModelReadyRequest, self._model_ready),
            "RepositoryIndex": (pb.RepositoryIndexRequest, self._repository_index),
            "RepositoryModelLoad": (pb.RepositoryModelLoadRequest, self._repository_load),
            "RepositoryModelUnload": (pb.RepositoryModelUnloadRequest, self._repository_unload),
        }
        return methods_of(SERVICE, table, metrics)

    # ---- the answers ----------------------------------------------------------------------------

    async def model_status(self, name: str) -> ModelStatus:
        """Raises NotFound, or Unavailable while neither view nor store can tell."""
        if not name:
            raise InvalidArgument("the request names no model")
        if not isinstance(self.view.resolve(name), Resolved):
            await self.names.find(name)
        return name_status(self.view, name, self.now_ms())

    async def model_ready(self, name: str) -> tuple[bool, str]:
        """(ready, why not). Raises NotFound."""
        status = await self.model_status(name)
        if status.state in (ModelState.LOADED, ModelState.LOADING):
            return True, ""
        if status.state is ModelState.NOT_FOUND:
            raise NotFound(f"model not found: {name!r} is not registered")
        _, step = core_loads.first_step(
            self.view, status.model_id, now_ms=self.now_ms(), policy=self.policy
        )
        if isinstance(step, core_loads.GiveUp):
            return False, step.detail
        return True, ""

    def client_names(self) -> list[str]:
        """Names that clients use: aliases, and models that were registered by themselves."""
        names = set(self.view.vmodels)
        names.update(
            model_id
            for model_id, model in self.view.models.items()
            if not model.auto_delete and not self.view.aliases_of(model_id)
        )
        return sorted(names)

    def index(self, *, ready_only: bool) -> Iterator[IndexEntry]:
        now_ms = self.now_ms()
        for name in self.client_names():
            entry = _entry(name_status(self.view, name, now_ms))
            if entry.state == "READY" or not ready_only:
                yield entry

    async def load(self, name: str) -> None:
        """Have a copy in memory. Raises the cause when that fails."""
        status = await self.model_status(name)
        await self.loads.load(status.model_id)

    async def unload(self, name: str) -> int:
        """Drop every copy once its requests have ended; returns how many. It stays registered,
        and the next request loads it again."""
        status = await self.model_status(name)
        dropped = 0
        for copy in self.view.copies_of(status.model_id):
            dropped += await self.loads.unload(status.model_id, copy.instance_id)
        return dropped

    # ---- as gRPC --------------------------------------------------------------------------------

    async def _server_live(self, _: pb.ServerLiveRequest) -> pb.ServerLiveResponse:
        return pb.ServerLiveResponse(live=True)

    async def _server_ready(self, _: pb.ServerReadyRequest) -> pb.ServerReadyResponse:
        return pb.ServerReadyResponse(ready=self.readiness.ready)

    async def _server_metadata(self, _: pb.ServerMetadataRequest) -> pb.ServerMetadataResponse:
        return pb.ServerMetadataResponse(
            name=SERVER_NAME, version=self.software_version, extensions=EXTENSIONS
        )

    async def _model_ready(self, request: pb.ModelReadyRequest) -> pb.ModelReadyResponse:
        ready, _ = await self.model_ready(request.name)
        return pb.ModelReadyResponse(ready=ready)

    async def _repository_index(
        self, request: pb.RepositoryIndexRequest
    ) -> pb.RepositoryIndexResponse:
        return pb.RepositoryIndexResponse(
            models=[
                pb.RepositoryIndexResponse.ModelIndex(
                    name=entry.name, version=entry.version, state=entry.state, reason=entry.reason
                )
                for entry in self.index(ready_only=request.ready)
            ]
        )

    async def _repository_load(
        self, request: pb.RepositoryModelLoadRequest
    ) -> pb.RepositoryModelLoadResponse:
        if request.parameters:
            raise no_load_parameters(request.parameters)
        await self.load(request.model_name)
        return pb.RepositoryModelLoadResponse()

    async def _repository_unload(
        self, request: pb.RepositoryModelUnloadRequest
    ) -> pb.RepositoryModelUnloadResponse:
        await self.unload(request.model_name)
        return pb.RepositoryModelUnloadResponse()


def no_load_parameters(names: object) -> MeshError:
    """The repository here is what is registered; a load brings nothing of its own."""
    listed = ", ".join(sorted(map(str, names)))  # type: ignore[call-overload]
    return Unimplemented(
        f"parameters of a load are not supported ({listed}): apply a changed resource instead"
    )


def _entry(status: ModelStatus) -> IndexEntry:
    match status.state:
        case ModelState.LOADED:
            return IndexEntry(status.name, "READY", "")
        case ModelState.LOADING:
            return IndexEntry(status.name, "LOADING", "")
        case ModelState.NOT_LOADED:
            return IndexEntry(status.name, "UNAVAILABLE", NOT_IN_MEMORY)
        case _:
            reason = status.errors[0] if status.errors else status.state.value
            return IndexEntry(status.name, "UNAVAILABLE", reason)
