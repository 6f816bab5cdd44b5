"""ModelMesh's management service, ``mmesh.ModelMesh``: register, unregister, status, ensure loaded.

Semantics are ModelMesh's: registering is idempotent, unregistering what is not there succeeds, and
a status never fails because of the model: NOT_FOUND and LOADING_FAILED stand inside the answer.
The vmodel calls are not there yet (UNIMPLEMENTED).

Writes go through ``mesh.catalog``; without the store they are UNAVAILABLE, while a status still
comes from the view.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from mesh.catalog import Catalog
from mesh.core.errors import InvalidArgument, MeshError, Unimplemented
from mesh.core.names import check_model_id
from mesh.core.status import ModelStatus, name_status
from mesh.core.types import ModelRecord, ModelState
from mesh.core.view import ClusterView
from mesh.metrics import RouterMetrics
from mesh.wire.server import AsyncUnary
from protos import mmesh_pb2 as mm
from router.loads import Loads
from router.names import NameLookup
from router.rpc import Rpcs, methods_of

SERVICE: Final = "mmesh.ModelMesh"

# A model that was never used gets an age, so that those registered first are not evicted last
# (ModelMesh's values).
_HOUR_MS: Final = 3_600_000
LAST_USED_BEFORE_WHEN_LOADED_MS: Final = _HOUR_MS
LAST_USED_BEFORE_MS: Final = 6 * _HOUR_MS


@dataclass(frozen=True, slots=True)
class Management:
    """``now_ms`` is the wall clock's reading."""

    view: ClusterView
    catalog: Catalog
    loads: Loads
    names: NameLookup
    now_ms: Callable[[], int]

    def methods(self, metrics: RouterMetrics) -> dict[str, AsyncUnary]:
        """Full path to method."""
        table: Rpcs = {
            "registerModel": (mm.RegisterModelRequest, self.register),
            "unregisterModel": (mm.UnregisterModelRequest, self.unregister),
            "getModelStatus": (mm.GetStatusRequest, self.status),
            "ensureLoaded": (mm.EnsureLoadedRequest, self.ensure_loaded),
            "setVModel": (mm.SetVModelRequest, self.no_vmodels),
            "deleteVModel": (mm.DeleteVModelRequest, self.no_vmodels),
            "getVModelStatus": (mm.GetVModelStatusRequest, self.no_vmodels),
        }
        return methods_of(SERVICE, table, metrics)

    async def register(self, request: mm.RegisterModelRequest) -> mm.ModelStatusInfo:
        model_id = check_model_id(request.modelId, "modelId")
        info = request.modelInfo
        if not info.type:
            raise InvalidArgument(
                f"modelInfo.type of model {model_id!r}: expected the model's format, for example "
                "'onnx'; found nothing"
            )
        now_ms = self.now_ms()
        before_ms = LAST_USED_BEFORE_WHEN_LOADED_MS if request.loadNow else LAST_USED_BEFORE_MS
        last_used_at_ms = min(request.lastUsedTime, now_ms) or now_ms - before_ms
        record = ModelRecord(
            model_id=model_id,
            model_type=info.type,
            path=info.path,
            key=info.key,
            created_at_ms=now_ms,
            last_used_at_ms=last_used_at_ms,
        )
        await self.catalog.register(record)
        if not request.loadNow:
            return self._status(model_id)
        return await self._load(model_id, model_id, last_used_at_ms, wait=request.sync)

    async def unregister(self, request: mm.UnregisterModelRequest) -> mm.UnregisterModelResponse:
        model_id = check_model_id(request.modelId, "modelId")
        copies = [copy.instance_id for copy in self.view.copies_of(model_id)]
        if await self.catalog.unregister(model_id):
            self.loads.unload_soon(model_id, copies)
        return mm.UnregisterModelResponse()

    async def status(self, request: mm.GetStatusRequest) -> mm.ModelStatusInfo:
        await self._look_up(check_model_id(request.modelId, "modelId"))
        return self._status(request.modelId)

    async def ensure_loaded(self, request: mm.EnsureLoadedRequest) -> mm.ModelStatusInfo:
        name = check_model_id(request.modelId, "modelId")
        await self._look_up(name)
        now_ms = self.now_ms()
        model_id = name_status(self.view, name, now_ms).model_id
        if not model_id:
            return self._status(name)
        last_used_at_ms = min(request.lastUsedTime, now_ms) or now_ms
        return await self._load(name, model_id, last_used_at_ms, wait=request.sync)

    async def no_vmodels(self, request: object) -> mm.VModelStatusInfo:
        raise Unimplemented(
            "vmodels are not managed by this call yet: apply an InferenceService instead, its "
            "name is an alias that moves when a changed spec has loaded"
        )

    async def _look_up(self, name: str) -> None:
        """A model that was registered elsewhere a moment ago is known after this. While the store
        is away the view's word counts."""
        if name not in self.view.vmodels and name not in self.view.models:
            with contextlib.suppress(MeshError):
                await self.names.find(name)

    async def _load(
        self, name: str, model_id: str, last_used_at_ms: int, *, wait: bool
    ) -> mm.ModelStatusInfo:
        """Have it loaded. What stands in the way is told by the status, never as an error."""
        try:
            if wait:
                await self.loads.load(model_id, last_used_at_ms=last_used_at_ms)
            else:
                self.loads.begin(model_id, last_used_at_ms=last_used_at_ms)
        except MeshError as error:
            status = self._status(name)
            if status.status == mm.ModelStatusInfo.NOT_LOADED:
                # Nothing was tried (no room anywhere, no runtime): there is no failure record.
                status.errors.append(error.message)
                if not error.retryable:
                    status.status = mm.ModelStatusInfo.LOADING_FAILED
            return status
        return self._status(name)

    def _status(self, name: str) -> mm.ModelStatusInfo:
        return status_info(name_status(self.view, name, self.now_ms()))


_STATUS: Final = {
    ModelState.NOT_FOUND: mm.ModelStatusInfo.NOT_FOUND,
    ModelState.NOT_LOADED: mm.ModelStatusInfo.NOT_LOADED,
    ModelState.LOADING: mm.ModelStatusInfo.LOADING,
    ModelState.LOADED: mm.ModelStatusInfo.LOADED,
    ModelState.LOADING_FAILED: mm.ModelStatusInfo.LOADING_FAILED,
    ModelState.UNKNOWN: mm.ModelStatusInfo.UNKNOWN,
}


def status_info(status: ModelStatus) -> mm.ModelStatusInfo:
    """A status as ModelMesh's clients read it. An unknown model has no errors there."""
    found = status.state is not ModelState.NOT_FOUND
    return mm.ModelStatusInfo(
        status=_STATUS[status.state],
        errors=status.errors if found else (),
        modelCopyInfos=[
            mm.ModelStatusInfo.ModelCopyInfo(
                location=copy.instance_id, copyStatus=_STATUS[copy.state], time=max(0, copy.at_ms)
            )
            for copy in status.copies
        ],
    )
