"""``grpc.health.v1.Health``: whether this router serves, for load balancers and probes.

The empty name and each service of this server share one answer: SERVING while the router is ready.
A name that is no service is NOT_FOUND (Check) or SERVICE_UNKNOWN (Watch), as the protocol has it.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Final

from google.protobuf.message import DecodeError

from mesh.core.errors import InvalidArgument, NotFound, Unavailable
from mesh.metrics import RouterMetrics
from mesh.wire.server import Method, StreamCall, Streaming
from protos import health_pb2 as pb
from router.readiness import Readiness
from router.rpc import Rpcs, methods_of

SERVICE: Final = "grpc.health.v1.Health"
_WATCH: Final = f"/{SERVICE}/Watch"


@dataclass(frozen=True, slots=True)
class Health:
    readiness: Readiness
    services: Collection[str]

    def methods(self, metrics: RouterMetrics) -> dict[str, Method]:
        """Full path to method."""
        table: Rpcs = {
            "Check": (pb.HealthCheckRequest, self.check),
            "List": (pb.HealthListRequest, self.list_all),
        }
        return {**methods_of(SERVICE, table, metrics), _WATCH: Streaming(self.watch)}

    async def check(self, request: pb.HealthCheckRequest) -> pb.HealthCheckResponse:
        if not self._known(request.service):
            raise NotFound(f"unknown service {request.service!r}")
        return pb.HealthCheckResponse(status=self._status())

    async def list_all(self, _: pb.HealthListRequest) -> pb.HealthListResponse:
        answer = pb.HealthCheckResponse(status=self._status())
        return pb.HealthListResponse(statuses=dict.fromkeys(("", *self.services), answer))

    async def watch(self, call: StreamCall) -> None:
        """The present status, and again at each change, until one of the two sides goes."""
        request = await _first(call)
        known = self._known(request.service)
        told: pb.HealthCheckResponse.ServingStatus | None = None
        while True:
            status = self._status() if known else pb.HealthCheckResponse.SERVICE_UNKNOWN
            if status == told:
                if self.readiness.draining:  # or the drain would wait for those who watch it
                    raise Unavailable("the router is shutting down")
                await self.readiness.wait_changed()
                continue
            told = status
            await call.send(pb.HealthCheckResponse(status=status).SerializeToString())

    def _known(self, service: str) -> bool:
        return not service or service in self.services

    def _status(self) -> pb.HealthCheckResponse.ServingStatus:
        ready = self.readiness.ready
        return pb.HealthCheckResponse.SERVING if ready else pb.HealthCheckResponse.NOT_SERVING


async def _first(call: StreamCall) -> pb.HealthCheckRequest:
    async for message in call:
        try:
            return pb.HealthCheckRequest.FromString(message)
        except DecodeError as error:
            raise InvalidArgument(f"{_WATCH}: not a HealthCheckRequest: {error}") from error
    raise InvalidArgument(f"{_WATCH}: the request has no message")
