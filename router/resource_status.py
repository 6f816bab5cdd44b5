"""InferenceServices and Predictors as `kubectl get -o yaml` would show them: as they were applied,
with the status that the controller writes in a cluster.

The status is ``mesh.kserve_status``'s, from this router's view. It is made when it is asked for and
stands nowhere, so the time of a condition is when the record was written that says so: a failure,
else the name's last change.

Addresses: for what came from an API server, those of the Service, as its status has them there; for
what was applied by hand, those that this router listens on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Final

import orjson

from mesh.core.types import VModelRecord
from mesh.core.view import ClusterView
from mesh.desired import Desired, desired_model
from mesh.kserve_status import (
    Endpoints,
    NameState,
    Standing,
    endpoints_of,
    name_state,
    rfc3339,
    service_status,
    standing_of,
)
from mesh.manifest import OWNER_OF, applied_uid
from router.serving_runtimes import ServingRuntimes

Obj = dict[str, Any]

# What List calls them, and their kinds.
SERVICE_KINDS: Final = {"inferenceservices": "InferenceService", "predictors": "Predictor"}
# A list of a hundred thousand takes a while to write down (0.1 to 0.3 ms each); requests are served
# in between.
_SLICE: Final = 32


@dataclass(frozen=True, slots=True)
class ResourceStatus:
    """``endpoints``: this router's own; ``namespace``: the mesh's. ``now_ms`` is the wall clock's
    reading."""

    view: ClusterView
    runtimes: ServingRuntimes
    endpoints: Callable[[], Endpoints]
    namespace: str
    now_ms: Callable[[], int]

    async def list(self, kind: str, names: Collection[str]) -> str:
        """A JSON array of the resources of ``SERVICE_KINDS[kind]``; ``names``: only those, () for
        all."""
        owner = OWNER_OF[SERVICE_KINDS[kind]]
        wanted = sorted(set(names) or self.view.vmodels)
        pieces: list[str] = []
        for start in range(0, len(wanted), _SLICE):
            for name in wanted[start : start + _SLICE]:
                alias = self.view.vmodels.get(name)
                resource = self.resource(alias) if alias and alias.owner == owner else None
                if resource is not None:
                    pieces.append(orjson.dumps(resource).decode())
            await asyncio.sleep(0)
        return f"[{','.join(pieces)}]"

    def resource(self, alias: VModelRecord) -> Obj | None:
        """None for a name that no resource was applied for."""
        if not alias.manifest:
            return None
        resource: Obj = orjson.loads(alias.manifest)
        metadata = dict(resource.get("metadata") or {})
        metadata.setdefault("namespace", self.namespace)
        if alias.created_at_ms:
            metadata.setdefault("creationTimestamp", rfc3339(alias.created_at_ms))
        return {**resource, "metadata": metadata, "status": self.status(resource, alias)}

    def status(self, resource: Obj, alias: VModelRecord) -> Obj:
        now_ms = self.now_ms()
        from_cluster = bool(applied_uid(alias.manifest))
        offers = () if from_cluster else self.runtimes.offers()
        # Without runtimes none is chosen: any instance that knows the format will do.
        desired = desired_model(resource, offers, now_ms=now_ms) if offers else Desired()
        chosen = desired.chosen
        state = name_state(self.view, alias.name, now_ms)
        standing = standing_of(
            state, refusal=desired.refusal, runtime=chosen.name if chosen is not None else ""
        )
        endpoints = endpoints_of(self.namespace) if from_cluster else self.endpoints()
        return service_status(
            resource,
            standing,
            chosen=chosen,
            endpoints=endpoints,
            now_ms=_since_ms(alias, state, standing),
        )


def _since_ms(alias: VModelRecord, state: NameState, standing: Standing) -> int:
    if not standing.ready and state.active is not None and state.active.failures:
        return state.active.failures[0].failed_at_ms
    return alias.updated_at_ms


def own_endpoints(host: str, grpc_port: int, rest_port: int | None, *, tls: bool) -> Endpoints:
    """Of a router that listens so; its own machine's where it listens on all addresses."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(host, host)
    host = f"[{host}]" if ":" in host else host
    rest = f"{'https' if tls else 'http'}://{host}:{rest_port}" if rest_port is not None else ""
    return Endpoints(f"grpc://{host}:{grpc_port}", rest)
