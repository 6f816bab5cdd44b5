"""``mesh.admin.v1.Admin``: what the ``mesh`` command asks of a router.

Apply takes the kinds that a cluster takes. ServingRuntimes and the status of resources are those of
``router.serving_runtimes`` and ``router.resource_status``.

Apply and Delete write through ``mesh.catalog`` and need the store (UNAVAILABLE without it); List,
Describe and Explain answer from the view. Describe also asks the instances that hold a copy, each
for ``DESCRIBE_TIMEOUT_S`` at most; one that does not answer is named as such.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic
from typing import Any, Final

import orjson

from mesh import admin_views as views
from mesh import manifest
from mesh.catalog import Catalog
from mesh.core.errors import FailedPrecondition, InvalidArgument, MeshError, NotFound
from mesh.core.explain import explain
from mesh.core.placement import Placement, place
from mesh.core.policy import Policy
from mesh.core.types import LoadPriority
from mesh.core.view import ClusterView, Resolved
from mesh.desired import desired_model
from mesh.internal_calls import DESCRIBE_PATH
from mesh.kserve_status import INVALID_SPEC
from mesh.manifest import AppliedModel
from mesh.metrics import RouterMetrics
from mesh.serving_runtime import KINDS as RUNTIME_KINDS
from mesh.wire.server import AsyncUnary
from protos import mesh_admin_pb2 as pb
from protos import mesh_internal_pb2 as internal
from router.described import (
    Shortfalls,
    candidate_view,
    concrete_model,
    instance_row,
    last_used_told,
    model_row,
)
from router.dispatch import Dispatcher
from router.loads import Loads
from router.oip import Oip
from router.peers import Peers
from router.resource_status import SERVICE_KINDS, ResourceStatus
from router.rpc import Rpcs, methods_of
from router.serving_runtimes import ServingRuntimes

log = logging.getLogger(__name__)

SERVICE: Final = "mesh.admin.v1.Admin"
DESCRIBE_TIMEOUT_S: Final = 2.0
RPCS: Final = (
    *("Apply", "List", "Describe", "Delete", "DeleteRuntime", "ForgetFailures"),
    *("Explain", "Decisions"),
    *("GetPolicy", "SetPolicy", "GetTypeConstraints", "SetTypeConstraints"),
)
# A list of a hundred thousand models takes a while to write down; requests are served in between.
_LIST_SLICE: Final = 500
_GRAPH: Final = "InferenceGraph"
_KINDS: Final = (*manifest.SUPPORTED_KINDS, *RUNTIME_KINDS, _GRAPH)


@dataclass(slots=True)
class Admin:
    """``now_ms`` is the wall clock's reading."""

    view: ClusterView
    catalog: Catalog
    dispatcher: Dispatcher
    loads: Loads
    peers: Peers
    oip: Oip
    policy: Policy
    now_ms: Callable[[], int]
    runtimes: ServingRuntimes
    statuses: ResourceStatus
    namespace: str = "default"

    def use_policy(self, policy: Policy) -> None:
        self.policy = policy

    def methods(self, metrics: RouterMetrics) -> dict[str, AsyncUnary]:
        """Full path to method."""
        table: Rpcs = {
            "Apply": (pb.ApplyRequest, self.apply),
            "List": (pb.ListRequest, self.list_kind),
            "Describe": (pb.DescribeRequest, self.describe),
            "Delete": (pb.DeleteRequest, self.delete),
            "DeleteRuntime": (pb.DeleteRuntimeRequest, self.delete_runtime),
            "ForgetFailures": (pb.ForgetFailuresRequest, self.forget_failures),
            "Explain": (pb.ExplainRequest, self.explain),
        }
        return methods_of(SERVICE, table, metrics)

    # ---- writes -------------------------------------------------------------------------------

    async def apply(self, request: pb.ApplyRequest) -> pb.ApplyResponse:
        try:
            resource = orjson.loads(request.manifest_json)
        except orjson.JSONDecodeError as error:
            raise InvalidArgument(f"manifest_json: not JSON: {error}") from error
        if not isinstance(resource, dict):
            raise InvalidArgument("manifest_json: expected one resource as a JSON object")
        kind = resource.get("kind")
        if kind in RUNTIME_KINDS:
            name, action, warnings = await self.runtimes.apply(resource)
            warnings += self._of_other_namespace(_namespace_of(resource))
            return pb.ApplyResponse(name=name, action=action, warnings=warnings)
        if kind == _GRAPH:
            return _skipped(resource)
        if kind not in manifest.SUPPORTED_KINDS:
            raise InvalidArgument(f"kind: expected one of {', '.join(_KINDS)}; found {kind!r:.80}")
        return await self._apply_model(resource, load_now=request.load_now)

    async def _apply_model(self, resource: dict[str, Any], *, load_now: bool) -> pb.ApplyResponse:
        applied, warnings = self._desired(resource)
        action = await self.catalog.apply(applied)
        log.info("apply %s as %s: %s", applied.name, applied.model.model_id, action)
        if load_now:
            self._load_where_room(applied.model.model_id)
        return pb.ApplyResponse(
            name=applied.name,
            model_id=applied.model.model_id,
            action=action,
            warnings=[*warnings, *self._of_other_namespace(applied.namespace)],
        )

    def _desired(self, resource: dict[str, Any]) -> tuple[AppliedModel, list[str]]:
        """With a runtime, where runtimes were applied; else any instance that knows the format will
        do. Raises InvalidArgument; FailedPrecondition with KServe's reason."""
        offers = self.runtimes.offers()
        if not offers:
            applied = manifest.parse_resource(resource, now_ms=self.now_ms())
            return applied, list(applied.warnings)
        found = desired_model(resource, offers, now_ms=self.now_ms())
        if found.refusal is not None:
            if found.refusal.reason == INVALID_SPEC:
                raise InvalidArgument(found.refusal.message)
            raise FailedPrecondition(f"{found.refusal.reason}: {found.refusal.message}")
        assert found.applied is not None and found.chosen is not None
        more = self.runtimes.chosen_warnings(found.chosen, found.applied.model.model_type)
        return found.applied, [*found.applied.warnings, *more]

    def _of_other_namespace(self, namespace: str) -> list[str]:
        if namespace in ("", self.namespace):
            return []
        return [
            f"metadata.namespace: {namespace!r} is not acted on: one mesh is one "
            f"namespace, and this is {self.namespace!r}"
        ]

    def _load_where_room(self, model_id: str) -> None:
        """Begin a load that evicts nothing. Where there is no room it waits for its first use."""
        model = self.view.models.get(model_id)
        if model is None or self.view.copies_of(model_id) or self.view.pending_of(model_id):
            return
        placed = place(
            self.view,
            model,
            now_ms=self.now_ms(),
            policy=self.policy,
            avoid=self.peers.avoided(),
        )
        if isinstance(placed, Placement) and not placed.full:
            self.loads.ask_soon(model_id, placed, priority=LoadPriority.PROACTIVE, reason="applied")

    async def delete(self, request: pb.DeleteRequest) -> pb.DeleteResponse:
        if not request.name:
            raise InvalidArgument("name: expected the name of a model; found nothing")
        copies = self._copies_behind(request.name)
        existed, gone = await self.catalog.delete(request.name)
        for model_id in gone:
            self.loads.unload_soon(model_id, copies.get(model_id, ()))
        return pb.DeleteResponse(existed=existed)

    async def delete_runtime(self, request: pb.DeleteRuntimeRequest) -> pb.DeleteResponse:
        if not request.name:
            raise InvalidArgument("name: expected the name of a runtime; found nothing")
        return pb.DeleteResponse(existed=await self.runtimes.delete(request.name, request.kind))

    async def forget_failures(self, request: pb.ForgetFailuresRequest) -> pb.ForgetFailuresResponse:
        models = await self.catalog.forget_failures()
        log.info("failures of %d models are forgotten", len(models))
        return pb.ForgetFailuresResponse(models=len(models))

    def _copies_behind(self, name: str) -> dict[str, list[str]]:
        alias = self.view.vmodels.get(name)
        ids = {alias.active_model_id, alias.target_model_id} if alias is not None else {name}
        return {i: [copy.instance_id for copy in self.view.copies_of(i)] for i in ids}

    # ---- reads --------------------------------------------------------------------------------

    async def list_kind(self, request: pb.ListRequest) -> pb.ListResponse:
        match request.kind:
            case "models":
                return pb.ListResponse(items_json=await self._list_models())
            case "instances":
                avoided = self.peers.avoided()
                rows = [
                    instance_row(slot, passed_over=instance_id in avoided)
                    for instance_id, slot in sorted(self.view.instances.items())
                ]
                return pb.ListResponse(items_json=views.encode(rows))
            case "servingruntimes":
                resources = [
                    one
                    for one in self.runtimes.resources()
                    if not request.names or one["metadata"]["name"] in request.names
                ]
                return pb.ListResponse(items_json=orjson.dumps(resources).decode())
            case kind if kind in SERVICE_KINDS:
                return pb.ListResponse(items_json=await self.statuses.list(kind, request.names))
            case kind:
                known = ("models", "instances", *SERVICE_KINDS, "servingruntimes")
                raise InvalidArgument(f"kind: expected one of {', '.join(known)}; found {kind!r}")

    async def _list_models(self) -> str:
        now_ms = self.now_ms()
        shortfalls = Shortfalls(self.view, now_ms, self.policy)
        pieces: list[str] = []
        names = self.oip.client_names()
        for start in range(0, len(names), _LIST_SLICE):
            rows = [
                model_row(self.view, n, now_ms, self._last_used, shortfalls)
                for n in names[start : start + _LIST_SLICE]
            ]
            pieces.append(views.encode(rows)[1:-1])
            await asyncio.sleep(0)
        return f"[{','.join(pieces)}]"

    async def describe(self, request: pb.DescribeRequest) -> pb.DescribeResponse:
        name = request.name
        alias = self.view.vmodels.get(name)
        if alias is None and not isinstance(self.view.resolve(name), Resolved):
            await self.oip.model_status(name)  # the store has the last word; raises NotFound
            alias = self.view.vmodels.get(name)
        active_id = alias.active_model_id if alias is not None else name
        target_id = alias.target_model_id if alias is not None else name
        details, unreachable = await self._ask_instances({active_id, target_id})
        now_ms = self.now_ms()

        def last_used(model_id: str) -> int:
            return max(self._last_used(model_id), last_used_told(details, model_id))

        def concrete(model_id: str) -> views.ConcreteModel | None:
            model = self.view.models.get(model_id)
            if model is None:
                return None
            return concrete_model(
                self.view,
                model,
                now_ms,
                details=details,
                last_used=last_used,
                inflight_on=self.dispatcher.inflight_on,
            )

        described = views.ModelDescription(
            row=model_row(
                self.view, name, now_ms, last_used, Shortfalls(self.view, now_ms, self.policy)
            ),
            active=concrete(active_id),
            target=concrete(target_id) if target_id != active_id else None,
            manifest=orjson.loads(alias.manifest) if alias is not None and alias.manifest else None,
            status=(self.statuses.resource(alias) or {}).get("status") if alias else None,
            updated_at_ms=alias.updated_at_ms if alias is not None else 0,
            unreachable=unreachable,
            view_revision=self.view.revision,
        )
        return pb.DescribeResponse(json=views.encode(described))

    async def _ask_instances(
        self, model_ids: set[str]
    ) -> tuple[dict[tuple[str, str], dict[str, Any]], dict[str, str]]:
        """What the instances with a copy know of it, by (model, instance); and who was silent."""
        asked = [
            (copy.model_id, copy.instance_id)
            for model_id in model_ids
            for copy in self.view.copies_of(model_id)
        ]
        answers = await asyncio.gather(*(self._ask_instance(*pair) for pair in asked))
        details: dict[tuple[str, str], dict[str, Any]] = {}
        unreachable: dict[str, str] = {}
        for pair, answer in zip(asked, answers, strict=True):
            if isinstance(answer, str):
                unreachable[pair[1]] = answer
            else:
                details[pair] = answer
        return details, unreachable

    async def _ask_instance(self, model_id: str, instance_id: str) -> dict[str, Any] | str:
        message = internal.DescribeRequest(model_id=model_id).SerializeToString()
        try:
            reply = await self.peers.channel(instance_id).unary(
                DESCRIBE_PATH, message, timeout_s=DESCRIBE_TIMEOUT_S
            )
            document = orjson.loads(internal.DescribeResponse.FromString(reply.message).json)
        except MeshError as error:
            return error.message
        except ValueError as error:  # protobuf's and orjson's decode errors are both one
            return f"its answer cannot be read: {error}"
        return document if isinstance(document, dict) else {"answer": document}

    def _last_used(self, model_id: str) -> int:
        """By this router's own knowledge: the store is told every few minutes only."""
        used_s = self.dispatcher.last_used_s(model_id)
        return self.now_ms() - round((monotonic() - used_s) * 1_000) if used_s else 0

    async def explain(self, request: pb.ExplainRequest) -> pb.ExplainResponse:
        name = request.name
        if not isinstance(self.view.resolve(name), Resolved):
            with contextlib.suppress(NotFound):  # that is an answer too
                await self.oip.model_status(name)
        found = self.view.resolve(name)
        model_id = found.model_id if isinstance(found, Resolved) else ""
        inflight = {
            instance_id: self.dispatcher.inflight_on(model_id, instance_id)
            for instance_id in self.view.loaded_on(model_id)
        }
        now_ms = self.now_ms()
        told = explain(
            self.view,
            name,
            now_ms=now_ms,
            policy=self.policy,
            inflight=inflight,
            avoid=self.peers.avoided(),
        )
        model = self.view.models.get(model_id)
        shortfalls = Shortfalls(self.view, now_ms, self.policy)
        instance_id = told.instance_id or ""
        slot = self.view.instances.get(instance_id)
        ranked = [c.instance_id for c in told.candidates if c.refusal is None]
        view = views.Explanation(
            name=name,
            model_id=told.model_id,
            action=told.outcome,
            instance_id=instance_id,
            address=slot.record.address if slot is not None else "",
            reason=told.reason,
            runner_up=told.runner_up or "",
            candidates=tuple(candidate_view(c, ranked, instance_id) for c in told.candidates),
            view_revision=self.view.revision,
            text=told.detail,
            via=told.via,
            state=told.state.value,
            code=told.code,
            target_model_id=told.target_model_id or "",
            copies=tuple(
                views.CopyView(
                    instance_id=copy.instance_id,
                    state=copy.state.value,
                    size_bytes=copy.size_bytes,
                    inflight=inflight.get(copy.instance_id, 0),
                )
                for copy in told.copies
            ),
            errors=told.errors,
            shortfall=shortfalls(model) if model is not None else "",
        )
        return pb.ExplainResponse(json=views.encode(view))


def _namespace_of(resource: dict[str, Any]) -> str:
    namespace = resource["metadata"].get("namespace")
    return namespace if isinstance(namespace, str) else ""


def _skipped(resource: dict[str, Any]) -> pb.ApplyResponse:
    """Accepted, so that a file that holds one may be applied as a whole."""
    metadata = resource.get("metadata")
    name = metadata.get("name") if isinstance(metadata, dict) else None
    if not isinstance(name, str) or not name:
        raise InvalidArgument(f"metadata.name: expected the graph's name; found {name!r:.80}")
    warning = "an InferenceGraph is kept by a cluster's API server, and not acted on by this mesh"
    return pb.ApplyResponse(name=name, action="skipped", warnings=[warning])
