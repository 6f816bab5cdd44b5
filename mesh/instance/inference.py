"""The gRPC methods of inference: which copy a request is for, and into the executor with it.

Synchronous but for streams: no task, lock or log line per request. A request whose model is not
loaded here is refused with the trailer ``mesh-error``, before its body where a header names it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Final

from mesh.core.errors import InvalidArgument, MeshError, Unavailable, Unimplemented
from mesh.instance.carrier import INFERENCE_SERVICE, Carrier
from mesh.instance.executor import NOT_HERE, Executor
from mesh.instance.forms import GrpcForm, TwoModels
from mesh.instance.rest import RestForm
from mesh.instance.rest_onward import carry_rest
from mesh.instance.servable import Servable
from mesh.internal_calls import REST_PATH
from mesh.oip.protobuf_fields import top_level_fields, varint
from mesh.runtimes.api import ModelLost
from mesh.wire.head import RequestHead
from mesh.wire.messages import Metadata
from mesh.wire.server import ServerCall, StreamCall
from protos import oip_pb2

DRAINING: Final = (("mesh-error", "draining"),)

# The router's last field, when it routed by a name before it had seen the whole message.
PEEKED_NAME: Final = b"mesh-peeked-name"

MODEL_INFER: Final = INFERENCE_SERVICE + "ModelInfer"
MODEL_STREAM_INFER: Final = INFERENCE_SERVICE + "ModelStreamInfer"
# Inputs are bounded lower than that (mesh.oip.call).
_FIELDS_MAX: Final = 4_096

# Forms are shared by equal requests; names come from clients, so there is a bound.
_MAX_FORMS: Final = 4_096


class Inference:
    """``draining`` refuses everything that names a model."""

    def __init__(
        self, servables: Mapping[str, Servable], executor: Executor, carrier: Carrier
    ) -> None:
        self._servables = servables
        self._executor = executor
        self._carrier = carrier
        self._forms: dict[tuple[str, str], GrpcForm] = {}
        self.draining = False

    def accept(self, head: RequestHead) -> tuple[MeshError, Metadata] | None:
        """Before the body: refuse what cannot be answered here."""
        if self.draining:
            return draining()
        if head.model_id is not None and head.model_id not in self._servables:
            return not_here(head.model_id)
        return None

    def model_infer(self, call: ServerCall, message: bytes) -> None:
        head = call.head
        if head.model_id is None:
            self._infer_by_body(call, message)
            return
        servable = self._servables.get(head.model_id)
        if servable is None:
            error, trailers = not_here(head.model_id)
            call.fail(error, trailers=trailers)
            return
        if servable.special:
            self._special(servable, call, message)
            return
        name = head.vmodel_id or head.model_id
        if head.fields[-1][0] == PEEKED_NAME:
            form = self._form(name, peeked_name(head))
        else:
            form = self._forms.get((name, "")) or self._form(name, "")
        self._executor.submit(servable, form, call, message, "ModelInfer")

    def _infer_by_body(self, call: ServerCall, message: bytes) -> None:
        """A client that speaks to this instance itself."""
        name = model_name_of(message)
        servable = self._servables.get(name)
        if servable is None:
            error, trailers = not_here(name)
            call.fail(error, trailers=trailers)
            return
        if servable.special:
            self._special(servable, call, message, routed_name=name)
            return
        self._executor.submit(servable, self._form(name, name), call, message, "ModelInfer")

    def _special(
        self, servable: Servable, call: ServerCall, message: bytes, routed_name: str = ""
    ) -> None:
        """A model in another process, or one of several versions."""
        if servable.remote is not None:
            self._carrier.unary(servable, call, message, MODEL_INFER)
            return
        name = call.head.vmodel_id or servable.model_id
        form = self._form(routed_name or name, routed_name or peeked_name(call.head))
        one = servable.of_version(model_version_of(message))
        self._executor.submit(one, form, call, message, "ModelInfer")

    def rest(self, call: ServerCall, message: bytes) -> None:
        model_id = call.head.model_id
        if model_id is None:
            raise InvalidArgument("a relayed REST request needs the header mm-model-id")
        servable = self._servables.get(model_id)
        if servable is None:
            error, trailers = not_here(model_id)
            call.fail(error, trailers=trailers)
            return
        if servable.remote is not None and servable.remote.internal:
            self._carrier.unary(servable, call, message, REST_PATH)
            return
        if servable.remote is not None:
            carry_rest(self._carrier, servable, call, message)
            return
        form = RestForm(call.head, model_id)
        method = "Rest" if form.kind == "v2-infer" else "predict"
        one = servable.of_version(form.model_version)
        self._executor.submit(one, form, call, message, method)

    def _form(self, fallback_name: str, routed_name: str) -> GrpcForm:
        form = self._forms.get((fallback_name, routed_name))
        if form is None:
            if len(self._forms) >= _MAX_FORMS:
                self._forms.clear()
            form = self._forms[fallback_name, routed_name] = GrpcForm(fallback_name, routed_name)
        return form

    # ---- streams ----

    async def any_method(self, call: StreamCall) -> None:
        """A method that is not of this server, for a model in another process: messages both
        ways, whatever they are."""
        head = call.head
        if head.model_id is None:
            raise InvalidArgument(f"{head.path} is not a method of this server")
        servable = self._servables.get(head.model_id)
        if servable is None:
            error, trailers = not_here(head.model_id)
            call.fail(error, trailers=trailers)
            return
        if servable.remote is None:
            raise Unimplemented(
                f"{head.path} is not known here, and model {servable.model_id!r} runs in this "
                "server; only a runtime of its own has methods of its own"
            )
        await self._carrier.stream(servable, call, head.path)

    async def model_stream_infer(self, call: StreamCall) -> None:
        """One answer for each message, in order. What is wrong with one message is told in its
        answer; the stream goes on. It belongs to its first message's model."""
        head = call.head
        first_name = peeked_name(head) or None
        async for message in call:
            name = model_name_of(message)
            if first_name is None:
                first_name = name
            elif name and first_name and name != first_name:
                raise InvalidArgument(
                    f"this stream is for model {first_name!r}; a message in it names {name!r}"
                )
            model_id = head.model_id or first_name
            servable = self._servables.get(model_id)
            if servable is None or self.draining:
                # Before the first answer the router can send the stream elsewhere.
                error, trailers = not_here(model_id) if servable is None else draining()
                call.fail(error, trailers=trailers)
                return
            if servable.remote is not None:
                await self._carrier.stream(servable, call, MODEL_STREAM_INFER, first=message)
                return
            fallback = head.vmodel_id or model_id
            form = self._form(fallback, name)  # its decoder sees a second name in the message
            sink = _StreamSink(call.deadline_s)
            call.on_cancel = sink.cancel
            one = servable.of_version(model_version_of(message)) if servable.versions else servable
            self._executor.submit(one, form, sink, message, "ModelStreamInfer")
            try:
                answer = await sink.answer
            except ModelLost as error:
                call.fail(error, trailers=NOT_HERE)
                return
            await call.send(answer)


class _StreamSink:
    """Takes the answer of one message of a stream."""

    __slots__ = ("answer", "cancelled", "deadline_s")

    def __init__(self, deadline_s: float) -> None:
        self.cancelled = False
        self.deadline_s = deadline_s
        self.answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    def reply(self, message: bytes, *, initial: Metadata = (), trailers: Metadata = ()) -> None:
        if not self.answer.done():
            self.answer.set_result(b"\x12" + varint(len(message)) + message)

    def fail(self, error: MeshError, *, trailers: Metadata = ()) -> None:
        if self.answer.done():
            return
        if isinstance(error, TwoModels | ModelLost):  # it belongs elsewhere: the stream ends
            self.answer.set_exception(error)
        else:
            response = oip_pb2.ModelStreamInferResponse(error_message=error.message)
            self.answer.set_result(response.SerializeToString())

    def cancel(self) -> None:
        self.cancelled = True
        self.answer.cancel()


def not_here(model_id: str) -> tuple[MeshError, Metadata]:
    return Unavailable(f"model {model_id!r} is not loaded on this instance"), NOT_HERE


def draining() -> tuple[MeshError, Metadata]:
    return Unavailable("this instance is draining; retry elsewhere"), DRAINING


def peeked_name(head: RequestHead) -> str:
    """The name by which a router routed without having seen the whole first message, else ""."""
    name, value = head.fields[-1]
    return value.decode("utf-8", "replace") if name == PEEKED_NAME else ""


def model_version_of(message: bytes) -> str:
    """``model_version`` of a serialised ModelInferRequest: field 2; the last one counts."""
    fields = top_level_fields(message, limit=_FIELDS_MAX)
    if fields is None:  # in a form that no serialiser writes: the decoder says what is wrong
        return ""
    found = [(start, end) for number, start, end in fields if number == 2]
    if not found:
        return ""
    start, end = found[-1]
    return message[start:end].decode("utf-8", "replace")


def model_name_of(message: bytes) -> str:
    """``model_name`` of a serialised ModelInferRequest: field 1, which every serialiser writes
    first. The copy's decoder notices when a later one says something else."""
    if len(message) >= 2 and message[0] == 0x0A and message[1] < 0x80:
        end = 2 + message[1]
        if end <= len(message):
            try:
                return message[2:end].decode()
            except UnicodeDecodeError:
                raise InvalidArgument("model_name is not UTF-8") from None
    try:
        request = oip_pb2.ModelInferRequest.FromString(message)
    except Exception as error:
        raise InvalidArgument(f"the message is no ModelInferRequest: {error}") from None
    name: str = request.model_name
    return name
