"""What the dispatcher sees of a call, whoever carries its bytes.

``mesh.wire.relay.RelayCall`` (gRPC, by frames) and ``router.gateway.GatewayCall`` (REST and the
router's own questions, by messages) both are a ``Call``. The carrier owns bytes and deadline; the
dispatcher owns ``context`` and every decision.
"""

from __future__ import annotations

from typing import Any, Protocol

from mesh.core.errors import MeshError
from mesh.wire.relay import Upstream


class Head(Protocol):
    """The part of a request's head that a decision or a metric needs."""

    @property
    def path(self) -> str: ...


class Call(Protocol):
    """One client call. The carrier calls ``Dispatcher.done`` exactly once when it is over."""

    context: Any

    @property
    def head(self) -> Head: ...

    @property
    def model_name(self) -> str: ...

    @property
    def deadline_s(self) -> float:
        """In ``loop.time()``; inf without one."""
        ...

    @property
    def started_s(self) -> float: ...

    @property
    def attempts(self) -> int:
        """Forwards so far."""
        ...

    @property
    def request_bytes(self) -> int: ...

    @property
    def response_bytes(self) -> int: ...

    def forward(self, upstream: Upstream, model_id_field: bytes) -> None: ...

    def fail(self, error: MeshError) -> None: ...
