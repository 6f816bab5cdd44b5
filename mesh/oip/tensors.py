"""ModelInferRequest to arrays, arrays to ModelInferResponse: the hot path of a serving pod.

``InferCodec`` belongs to one loaded model. Most clients send the same message again and again
with other numbers in it, so the codec remembers where a message of some length has its request id
and its raw tensors, and what the bytes around them mean. A message that agrees byte for byte
around those places costs two slices and a dictionary look-up instead of a parse; this is exact,
not a guess, because protobuf's fields are parsed one after the other and the places are contents
of whole fields. The reply's constant part is kept likewise, and raw contents are appended to it:
protobuf parses a concatenation as the merge.

It must not know sessions, names of routes or sockets. Not safe for concurrent use: the event loop
owns it. Everything wrong with a message is a ``MeshError`` that says what and where; nothing else
is raised. What it remembers is bounded by ``REMEMBERED_BYTES_MAX``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, Final, NamedTuple

import numpy as np
from google.protobuf.message import DecodeError

from mesh.core.errors import Internal, InvalidArgument
from mesh.oip.call import (
    INPUTS_MAX,
    InferCall,
    InferHead,
    ParameterValue,
    RequestedOutput,
    check_names,
    check_tensor,
    check_version,
    classification_count,
    finish_outputs,
    refuse_shared_memory,
    requested_outputs,
    rows_in,
)
from mesh.oip.datatypes import DATATYPES, Array, DataType, datatype
from mesh.oip.protobuf_fields import top_level_fields, varint
from mesh.oip.raw_bytes import as_bytes, decode_raw, element_count, encode_raw
from mesh.runtimes.api import ModelMetadata, Tensor
from protos import oip_pb2

# Per loaded model: a thousand loaded models must not hold more than a few MB of this.
REMEMBERED_BYTES_MAX: Final = 16 * 1024
# A head of a longer message is not worth remembering.
HEAD_BYTES_MAX: Final = 2 * 1024
# What a remembered entry costs beside its bytes.
_ENTRY_BYTES: Final = 512

_FIELD_ID: Final = 3
_FIELD_RAW_INPUT: Final = 7
_TAG_ID: Final = b"\x1a"
_TAG_RAW_OUTPUT: Final = b"\x32"
_SHORT_ID: Final = tuple(bytes((_TAG_ID[0], size)) for size in range(0x80))
# A NamedTuple's own ``__new__`` is a Python function: twice the cost.
_new_tuple: Final = tuple.__new__

# The packed typed contents whose bytes are the little-endian array itself.
_PACKED_TAGS: Final[dict[str, bytes]] = {"BOOL": b"\x0a", "FP32": b"\x32", "FP64": b"\x3a"}


class _Input(NamedTuple):
    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    start: int
    end: int


class _Template:
    """What the constant bytes of a message mean, and where its tensors lie."""

    __slots__ = ("gaps", "head", "inputs", "name", "dtype", "shape", "single")  # noqa: RUF023

    def __init__(
        self,
        head: InferHead,
        inputs: tuple[_Input, ...],
        gaps: tuple[tuple[int, int, bytes], ...],
    ) -> None:
        self.head = head
        self.inputs = inputs
        self.gaps = gaps
        self.single = len(inputs) == 1
        self.name, self.dtype, self.shape = inputs[0][:3]


class _Layout:
    """Messages of one length: where the id lies (-1: there is none) and the first tensor."""

    __slots__ = ("first", "id_end", "id_start", "templates")

    def __init__(self, id_start: int, id_end: int, first: int) -> None:
        self.id_start = id_start
        self.id_end = id_end
        self.first = first
        self.templates: dict[bytes, _Template] = {}

    def key(self, message: bytes) -> bytes:
        if self.id_start < 0:
            return message[: self.first]
        return message[: self.id_start] + message[self.id_end : self.first]


class _Reply:
    """All of a raw answer of one tensor but its id and its contents: ``start``."""

    __slots__ = ("dtype", "kind", "model_name", "name", "shape", "start")

    def __init__(
        self, model_name: str, name: str, kind: str, shape: tuple[int, ...], start: bytes
    ) -> None:
        self.model_name = model_name
        self.name = name
        self.kind = kind
        self.dtype = DATATYPES[kind].dtype
        self.shape = shape
        self.start = start


_NO_REPLY: Final = _Reply("", "", "BYTES", (), b"")


class InferCodec:
    """Decodes requests for one model and encodes its answers."""

    __slots__ = (
        "_last_head",
        "_last_reply",
        "_layouts",
        "_remembered_bytes",
        "_replies",
        "metadata",
    )

    def __init__(self, metadata: ModelMetadata) -> None:
        self.metadata = metadata
        self._layouts: dict[int, _Layout] = {}
        self._replies: dict[tuple[object, ...], _Reply] = {}
        self._last_head: InferHead | None = None  # the head that ``_last_reply`` answered
        self._last_reply = _NO_REPLY
        self._remembered_bytes = 0

    def decode(self, message: bytes) -> InferCall:
        """``message`` is a serialised ModelInferRequest. Arrays may be views of its bytes."""
        layout = self._layouts.get(len(message))
        if layout is not None:
            id_start, first = layout.id_start, layout.first
            if id_start < 0:
                template = layout.templates.get(message[:first])
            else:
                template = layout.templates.get(message[:id_start] + message[layout.id_end : first])
            if template is not None:
                call = _fill(template, layout, message)
                if call is not None:
                    return call
        try:
            request = oip_pb2.ModelInferRequest.FromString(message)
        except DecodeError as error:
            raise InvalidArgument(f"the message is no ModelInferRequest: {error}") from None
        call = decode_request(request, self.metadata)
        if request.raw_input_contents:
            self._remember(message, call)
        return call

    def encode(
        self,
        call: InferCall,
        tensors: Sequence[Tensor],
        model_name: str,
        model_version: str | None = None,
    ) -> bytes:
        """A serialised ModelInferResponse in the form that the request asks for.

        ``model_version`` None: the version that was asked for, or the model's first.
        """
        head = call.head
        if head is self._last_head and len(tensors) == 1 and model_version is None:
            # As the answer before: what follows from the head need not be found out again.
            name, kind, data = tensors[0]
            last = self._last_reply
            if (
                data.shape == last.shape
                and data.dtype is last.dtype
                and name == last.name
                and kind == last.kind
                and model_name == last.model_name
            ):
                if call.id:
                    return _id_field(call.id) + last.start + data.tobytes()
                return last.start + data.tobytes()
        follows_head = model_version is None and not head.classified
        if model_version is None:
            versions = self.metadata.versions
            model_version = head.model_version or (versions[0] if versions else "")
        if head.outputs and (head.classified or len(tensors) != 1 or len(head.outputs) != 1):
            tensors = finish_outputs(tensors, head)
        if not head.raw and all(DATATYPES[t.datatype].contents_field for t in tensors):
            return _encode_typed(call, tensors, model_name, model_version)
        if len(tensors) == 1:
            name, kind, data = tensors[0]
            known = self._replies.get((model_name, model_version, name, kind, data.shape))
            if known is not None and data.dtype is known.dtype:
                if follows_head:
                    self._last_head, self._last_reply = head, known
                return (_id_field(call.id) if call.id else b"") + known.start + data.tobytes()
        return self._encode_raw(call, tensors, model_name, model_version)

    def _encode_raw(
        self, call: InferCall, tensors: Sequence[Tensor], model_name: str, model_version: str
    ) -> bytes:
        # The id goes first: protobuf takes fields in any order, and what follows is constant.
        parts = [_id_field(call.id) if call.id else b""]
        parts.append(_reply_head(tensors, model_name, model_version))
        for tensor in tensors:
            raw = encode_raw(tensor.data, DATATYPES[tensor.datatype])
            parts += (_TAG_RAW_OUTPUT, varint(len(raw)), raw)
        if len(tensors) == 1 and tensors[0].datatype != "BYTES":
            name, kind, data = tensors[0]
            start = b"".join(parts[1:-1])
            self._make_room(len(start))
            self._replies[(model_name, model_version, name, kind, data.shape)] = _Reply(
                model_name, name, kind, data.shape, start
            )
        return b"".join(parts)

    def _remember(self, message: bytes, call: InferCall) -> None:
        """Keeps what the constant bytes of this message mean, where they can be told apart."""
        fields = top_level_fields(message, limit=INPUTS_MAX)
        count = len(call.inputs)
        if fields is None or len(fields) < count:
            return
        raws = fields[-count:]
        first = raws[0][1]
        numbers = [number for number, _, _ in fields]
        ids = [(start, end) for number, start, end in fields if number == _FIELD_ID]
        if (
            numbers[-count:] != [_FIELD_RAW_INPUT] * count
            or numbers.count(_FIELD_RAW_INPUT) != count
            or len(ids) > 1
            or first > HEAD_BYTES_MAX
        ):
            return
        inputs: list[_Input] = []
        for (name, array), (_, start, end) in zip(call.inputs.items(), raws, strict=True):
            # BYTES are cut anew each time, booleans must be looked at; empty ones are rare.
            if array.dtype.kind in "Ob" or array.nbytes != end - start or start == end:
                return
            inputs.append(_Input(name, array.dtype, array.shape, start, end))
        gaps = tuple(
            (before.end, after.start, message[before.end : after.start])
            for before, after in pairwise(inputs)
        )
        id_start, id_end = ids[0] if ids else (-1, -1)
        self._make_room(first)
        layout = self._layouts.get(len(message))
        if layout is None or (layout.id_start, layout.id_end, layout.first) != (
            id_start,
            id_end,
            first,
        ):
            layout = self._layouts[len(message)] = _Layout(id_start, id_end, first)
        layout.templates[layout.key(message)] = _Template(call.head, tuple(inputs), gaps)

    def _make_room(self, more_bytes: int) -> None:
        """Counts what is about to be remembered; forgets everything when it would be too much."""
        self._remembered_bytes += more_bytes + _ENTRY_BYTES
        if self._remembered_bytes > REMEMBERED_BYTES_MAX:
            self._layouts.clear()
            self._replies.clear()
            self._last_head, self._last_reply = None, _NO_REPLY
            self._remembered_bytes = more_bytes + _ENTRY_BYTES


def _fill(template: _Template, layout: _Layout, message: bytes) -> InferCall | None:
    """The call, or None when the bytes between the tensors or the id are not as remembered."""
    request_id = ""
    if layout.id_start >= 0:
        try:
            request_id = message[layout.id_start : layout.id_end].decode()
        except UnicodeDecodeError:
            return None
    inputs: dict[str, Array]
    # Slices, not views: a tensor in the middle of a message is not aligned for its datatype.
    if template.single:
        tensor = np.ndarray(template.shape, template.dtype, message[layout.first :])
        inputs = {template.name: tensor}
    else:
        for start, end, expected in template.gaps:
            if message[start:end] != expected:
                return None
        inputs = {
            name: np.ndarray(shape, dtype, message[start:end])
            for name, dtype, shape, start, end in template.inputs
        }
    return _new_tuple(InferCall, (inputs, request_id, template.head))


def _id_field(request_id: str) -> bytes:
    encoded = request_id.encode()
    size = len(encoded)
    return (_SHORT_ID[size] if size < 0x80 else _TAG_ID + varint(size)) + encoded


def _reply_head(tensors: Sequence[Tensor], model_name: str, model_version: str) -> bytes:
    """All of a raw reply but its id and its contents."""
    reply = oip_pb2.ModelInferResponse(model_name=model_name, model_version=model_version)
    for tensor in tensors:
        reply.outputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.data.shape)
    head: bytes = reply.SerializeToString()
    return head


def _encode_typed(
    call: InferCall, tensors: Sequence[Tensor], model_name: str, model_version: str
) -> bytes:
    reply = oip_pb2.ModelInferResponse(
        model_name=model_name, model_version=model_version, id=call.id
    )
    for tensor in tensors:
        output = reply.outputs.add(
            name=tensor.name, datatype=tensor.datatype, shape=tensor.data.shape
        )
        kind = DATATYPES[tensor.datatype]
        packed_tag = _PACKED_TAGS.get(kind.name)
        # Present even when empty: that tells a typed tensor from a raw one.
        output.contents.SetInParent()
        if packed_tag is not None:
            raw = encode_raw(tensor.data, kind)
            if raw:
                output.contents.MergeFromString(packed_tag + varint(len(raw)) + raw)
            continue
        values = tensor.data.ravel().tolist()
        if kind.name == "BYTES":
            values = [as_bytes(value) for value in values]
        getattr(output.contents, kind.contents_field or "").extend(values)
    encoded: bytes = reply.SerializeToString()
    return encoded


def decode_request(request: oip_pb2.ModelInferRequest, metadata: ModelMetadata) -> InferCall:
    """A parsed request, checked against the metadata; every error names the input."""
    check_version(request.model_version, metadata)
    tensors = list(request.inputs)
    check_names([tensor.name for tensor in tensors], metadata)
    raw_contents = list(request.raw_input_contents)
    if raw_contents and len(raw_contents) != len(tensors):
        raise InvalidArgument(
            f"the request has {len(tensors)} inputs but {len(raw_contents)} raw_input_contents; "
            f"there must be one for each input, or none"
        )
    inputs: dict[str, Array] = {}
    for index, tensor in enumerate(tensors):
        name = tensor.name
        of = f"input {name!r}"
        if tensor.parameters:
            refuse_shared_memory(tensor.parameters, of)
        kind = datatype(tensor.datatype, of=of)
        shape = tuple(tensor.shape)
        check_tensor(name, kind, shape, metadata)
        if not raw_contents:
            inputs[name] = decode_typed(tensor.contents, kind, shape, of)
            continue
        if tensor.HasField("contents") and tensor.contents.ListFields():
            raise InvalidArgument(
                f"{of} has typed contents and the request has raw_input_contents; "
                f"a request must use one form for all of its inputs"
            )
        inputs[name] = decode_raw(raw_contents[index], kind, shape, of=of)
    rows = rows_in(inputs, metadata)
    return InferCall(inputs, request.id, _decode_head(request, bool(raw_contents), rows, metadata))


def _decode_head(
    request: oip_pb2.ModelInferRequest, raw: bool, rows: int, metadata: ModelMetadata
) -> InferHead:
    outputs: list[RequestedOutput] = []
    for output in request.outputs:
        classification = 0
        if output.parameters:
            of = f"output {output.name!r}"
            parameters = decode_parameters(output.parameters, of)
            refuse_shared_memory(parameters, of)
            if "classification" in parameters:
                classification = classification_count(parameters["classification"], output.name)
        outputs.append(RequestedOutput(output.name, classification))
    checked = requested_outputs(outputs, metadata)
    return InferHead(
        model_name=request.model_name,
        model_version=request.model_version,
        parameters=decode_parameters(request.parameters, "the request"),
        outputs=checked,
        output_names=tuple(output.name for output in checked),
        raw=raw or not request.inputs,
        classified=any(output.classification for output in checked),
        rows=rows,
    )


def decode_parameters(
    parameters: Mapping[str, oip_pb2.InferParameter], of: str
) -> dict[str, ParameterValue]:
    """protobuf's parameters as plain values."""
    decoded: dict[str, ParameterValue] = {}
    for name, parameter in parameters.items():
        choice = parameter.WhichOneof("parameter_choice")
        if choice is None:
            raise InvalidArgument(f"{of} has the parameter {name!r} without a value")
        decoded[name] = getattr(parameter, choice)
    return decoded


def decode_typed(
    contents: oip_pb2.InferTensorContents, kind: DataType, shape: tuple[int, ...], of: str
) -> Array:
    """The array of a tensor's typed contents; ``of`` begins every error's message."""
    count = element_count(shape, of=of)
    wanted = kind.contents_field
    if wanted is None:
        raise InvalidArgument(f"{of}: {kind.name} has no typed form; send it in raw_input_contents")
    for present, _ in contents.ListFields():
        if present.name != wanted:
            raise InvalidArgument(
                f"{of} is {kind.name}, whose contents are {wanted}; found {present.name}"
            )
    values = getattr(contents, wanted)
    if len(values) != count:
        raise InvalidArgument(
            f"{of} has {len(values)} elements in {wanted}; "
            f"{kind.name} of shape {list(shape)} needs {count}"
        )
    if kind.name in _PACKED_TAGS:
        return _unpack(contents, kind, count).reshape(shape)
    if kind.name == "BYTES":
        elements: Array = np.fromiter(values, dtype=object, count=count)
        return elements.reshape(shape)
    carried = {"int_contents": "<i4", "uint_contents": "<u4"}.get(wanted)
    array: Array = np.fromiter(values, dtype=carried or kind.dtype, count=count)
    if array.dtype != kind.dtype:
        array = _narrow(array, kind, of)
    return array.reshape(shape)


def _unpack(contents: oip_pb2.InferTensorContents, kind: DataType, count: int) -> Array:
    """The packed field's own bytes: a serialised message of one such field is tag, length, data.

    Some fifty times faster than going through a Python object for each element.
    """
    if count == 0:
        return np.empty(0, kind.dtype)
    size = count * kind.size_bytes
    start = 1 + len(varint(size))
    packed = contents.SerializeToString()[start : start + size]
    if len(packed) != size:
        raise Internal(f"packed {kind.name} contents have {len(packed)} bytes, not {size}")
    return np.frombuffer(packed, kind.dtype)


def _narrow(array: Array, kind: DataType, of: str) -> Array:
    """To the small datatype; a value that does not fit is the client's mistake, not ours."""
    limits = np.iinfo(kind.dtype)
    wrong = (array < limits.min) | (array > limits.max)
    if wrong.any():
        at = int(np.argmax(wrong))
        raise InvalidArgument(
            f"{of}: element {at} is {array[at]}, outside {kind.name} ({limits.min} to {limits.max})"
        )
    narrowed: Array = array.astype(kind.dtype)
    return narrowed
