"""How one inference request was put, and how its answer is to be: gRPC here, REST in rest.py.

A form belongs to one request, or is shared by equal ones; it holds no tensors. The event loop hands
in the copy's own codec, which remembers; worker threads a fresh one, because it is not safe for
concurrent use.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from mesh.core.errors import InvalidArgument, MeshError
from mesh.oip.call import InferCall
from mesh.oip.tensors import InferCodec
from mesh.runtimes.api import Tensor
from mesh.wire.messages import Metadata

# A reply's message, and its metadata before that. A bare tuple: one is made for every answer.
Encoded = tuple[bytes, Metadata]


class Form(Protocol):
    def decode(self, codec: InferCodec, message: bytes) -> InferCall: ...

    def encode(self, codec: InferCodec, call: InferCall, tensors: Sequence[Tensor]) -> Encoded: ...


class Sink(Protocol):
    """Where an answer goes: a call of ``mesh.wire``, or one message of a stream.

    ``deadline_s`` is on the clock of ``time.monotonic``.
    """

    cancelled: bool
    deadline_s: float

    def reply(self, message: bytes, *, initial: Metadata = (), trailers: Metadata = ()) -> None: ...

    def fail(self, error: MeshError, *, trailers: Metadata = ()) -> None: ...


class TwoModels(InvalidArgument):
    """A later field of the message names another model than the one it was brought here by."""


class GrpcForm:
    """``fallback_name`` is the reply's ``model_name`` when the body has none. ``routed_name`` is
    the name in the body that the copy was found by, "" when a header named it."""

    __slots__ = ("fallback_name", "routed_name")

    def __init__(self, fallback_name: str, routed_name: str = "") -> None:
        self.fallback_name = fallback_name
        self.routed_name = routed_name

    def decode(self, codec: InferCodec, message: bytes) -> InferCall:
        call = codec.decode(message)
        if self.routed_name and call.head.model_name != self.routed_name:
            raise two_models(self.routed_name, call.head.model_name)
        return call

    def encode(self, codec: InferCodec, call: InferCall, tensors: Sequence[Tensor]) -> Encoded:
        return codec.encode(call, tensors, call.head.model_name or self.fallback_name), ()


def two_models(routed_name: str, last_name: str) -> TwoModels:
    return TwoModels(
        f"the request names two models: {routed_name!r} and then {last_name!r}; set model_name once"
    )
