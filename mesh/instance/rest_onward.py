"""REST requests for models that only a gRPC server of somebody else's has.

The body is decoded here, goes on as a ModelInfer, and the answer is written as REST asks. Anything
that the other server says of errors is passed on as it came.
"""

from __future__ import annotations

from collections.abc import Callable

from mesh.core.errors import MeshError
from mesh.instance.carrier import INFERENCE_SERVICE, Carrier
from mesh.instance.rest import RestForm
from mesh.instance.servable import Servable
from mesh.oip.call import InferCall
from mesh.oip.onward import request_of, tensors_of
from mesh.wire.head import RequestHead
from mesh.wire.messages import Metadata
from mesh.wire.server import ServerCall


class RestOnward:
    """Stands for the client's call where a carrier answers it (``mesh.instance.carrier``)."""

    __slots__ = ("_asked", "_call", "_form", "_servable")

    def __init__(
        self, call: ServerCall, servable: Servable, form: RestForm, asked: InferCall
    ) -> None:
        self._call = call
        self._servable = servable
        self._form = form
        self._asked = asked

    @property
    def head(self) -> RequestHead:
        return self._call.head

    @property
    def deadline_s(self) -> float:
        return self._call.deadline_s

    @property
    def cancelled(self) -> bool:
        return self._call.cancelled

    @property
    def on_cancel(self) -> Callable[[], None] | None:
        return self._call.on_cancel

    @on_cancel.setter
    def on_cancel(self, callback: Callable[[], None] | None) -> None:
        self._call.on_cancel = callback

    def reply(self, message: bytes, *, initial: Metadata = (), trailers: Metadata = ()) -> None:
        try:
            tensors = tensors_of(message)
            body, own = self._form.encode(self._servable.codec, self._asked, tensors)
        except MeshError as error:
            self._call.fail(error)
            return
        self._call.reply(body, initial=own, trailers=trailers)

    def fail(self, error: MeshError, *, trailers: Metadata = ()) -> None:
        self._call.fail(error, trailers=trailers)


def carry_rest(carrier: Carrier, servable: Servable, call: ServerCall, body: bytes) -> None:
    """Answers through ``call``, later. Raises MeshError for what is wrong with the body."""
    form = RestForm(call.head, servable.model_id)
    version, form.model_version = form.model_version, ""  # which there are, only it knows
    asked = form.decode(servable.codec, body)
    form.model_version = version
    onward = RestOnward(call, servable, form, asked)
    carrier.unary(servable, onward, request_of(asked, version), INFERENCE_SERVICE + "ModelInfer")
