"""Pass-through of calls by frames: what the router does with every inference request.

INTERFACE (being implemented). The relay owns bytes, streams, windows, retained request bytes and
deadlines; a ``Dispatcher`` (the router) owns every decision.
"""

from __future__ import annotations

from enum import Enum
from typing import Any, Protocol

from mesh.core.errors import MeshError
from mesh.wire.head import RequestHead
from mesh.wire.limits import INSIDE, Limits


class Failure(Enum):
    """Why an attempt ended before any byte of a reply was passed on."""

    CONNECT = "connect"  # never reached the instance
    REFUSED = "refused"  # REFUSED_STREAM or GOAWAY below this stream: never delivered
    LOST = "lost"  # the connection broke after the request was (partly) sent
    NOT_HERE = "not-here"  # mesh-error trailer of the instance
    DRAINING = "draining"
    OVERLOADED = "overloaded"


class Upstream:
    """The connection(s) of this router to one instance. ``inflight`` counts calls on it."""

    __slots__ = ("address", "inflight")
    address: str
    inflight: int

    def __init__(self, address: str, *, limits: Limits = INSIDE) -> None:
        raise NotImplementedError

    def close(self) -> None:
        """No new calls; those in flight finish, then the connection goes."""
        raise NotImplementedError


class RelayCall:
    """One client call that is being relayed. Attributes are the relay's; ``context`` is free for
    the dispatcher (the relay never touches it)."""

    __slots__ = ("attempts", "context", "deadline_s", "head", "model_name", "started_s")
    head: RequestHead
    model_name: str  # from mm-vmodel-id / mm-model-id, else model_name of the first message
    deadline_s: float  # loop.time(); inf without one
    started_s: float
    attempts: int  # forwards so far
    context: Any

    def forward(self, upstream: Upstream, model_id_field: bytes) -> None:
        """Send (again) to ``upstream``. ``model_id_field`` is ``hpack.encode_literal(b"mm-model-id",
        id)``: computed once a model."""
        raise NotImplementedError

    def fail(self, error: MeshError) -> None:
        """End the call with a trailers-only status."""
        raise NotImplementedError

    @property
    def retryable_after_delivery(self) -> bool:
        """The method is idempotent (ModelInfer, ModelMetadata ...) and all request bytes sent so
        far are still held."""
        raise NotImplementedError


class Dispatcher(Protocol):
    """Called in the event loop, synchronously; must not block."""

    def route(self, call: RelayCall) -> None:
        """The model's name is known. Now or later call ``forward`` or ``fail`` once."""
        ...

    def failed(self, call: RelayCall, upstream: Upstream, failure: Failure) -> None:
        """An attempt ended before any reply byte was passed on. ``forward`` elsewhere or ``fail``.

        Not called when the method may not be retried after this kind of failure: then the relay
        has failed the call with UNAVAILABLE by itself.
        """
        ...

    def done(self, call: RelayCall, code: int, now_s: float) -> None:
        """The call is over: gRPC status (1 when the client cancelled). Called exactly once for
        each call that ``route`` saw. ``call.request_bytes`` and ``call.response_bytes`` are final."""
        ...


class Relay:
    """``idempotent`` paths may be retried after delivery, until a reply byte was passed on.

    ``peek`` paths take the model from field 1 of the first message when no header names it;
    other paths must name it by header (INVALID_ARGUMENT otherwise).
    """

    def __init__(
        self,
        dispatcher: Dispatcher,
        *,
        peek: frozenset[str],
        idempotent: frozenset[str],
        limits: Limits,
    ) -> None:
        raise NotImplementedError
