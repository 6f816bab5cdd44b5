"""The HTTP form of inference: v2 JSON with the binary tensor extension, and v1 ``:predict``.

Pure functions from a body to an ``InferCall`` and back; whoever owns the socket maps headers and
status codes. Everything wrong with a body is an ``InvalidArgument`` that says where and what.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Final

import numpy as np
import orjson

from mesh.core.errors import InvalidArgument
from mesh.oip.call import (
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
)
from mesh.oip.datatypes import DATATYPES, Array, datatype
from mesh.oip.json_tensors import array_of, jsonable, nested, shaped
from mesh.oip.raw_bytes import decode_raw, encode_raw
from mesh.runtimes.api import ModelMetadata, Tensor

JSON_TYPE: Final = "application/json"
BINARY_TYPE: Final = "application/octet-stream"

# MLServer's name for a model's answers as a column; v1 clients expect them as a flat list.
_COLUMN_OUTPUT: Final = "predict"


@dataclass(frozen=True, slots=True)
class RestReply:
    """A response body. ``json_bytes`` is set when binary tensors follow that much JSON: it is
    the value of the header ``Inference-Header-Content-Length``."""

    body: bytes
    content_type: str = JSON_TYPE
    json_bytes: int | None = None


def header_content_length(value: str | None) -> int | None:
    """The value of the request header ``Inference-Header-Content-Length``, if there is one."""
    if value is None:
        return None
    text = value.strip()
    if not (text.isascii() and text.isdigit() and len(text) <= 12):
        raise InvalidArgument(
            f"the header Inference-Header-Content-Length must be a number of bytes, not {value!r}"
        )
    return int(text)


def decode_v2(
    body: bytes,
    json_bytes: int | None,
    metadata: ModelMetadata,
    *,
    model_name: str = "",
    model_version: str = "",
) -> InferCall:
    """A v2 infer request. ``json_bytes`` is what ``header_content_length`` returned.

    ``model_name`` and ``model_version`` are those of the URL.
    """
    check_version(model_version, metadata)
    if json_bytes == 0:
        return _raw_request(body, metadata, model_name, model_version)
    if json_bytes is not None and json_bytes > len(body):
        raise InvalidArgument(
            f"Inference-Header-Content-Length is {json_bytes}, but the body has {len(body)} bytes"
        )
    document = _document(body if json_bytes is None else body[:json_bytes])
    inputs = _objects(document, "inputs", "the request")
    if inputs is None:
        raise InvalidArgument("the request has no 'inputs': a list of tensors")
    check_names([_text(entry, "name", f"inputs[{i}]") for i, entry in enumerate(inputs)], metadata)
    binary = memoryview(body)[json_bytes:] if json_bytes is not None else memoryview(b"")
    arrays: dict[str, Array] = {}
    for entry in inputs:
        arrays[entry["name"]], used = _decode_input(entry, binary, metadata)
        binary = binary[used:]
    if len(binary):
        raise InvalidArgument(
            f"{len(binary)} bytes are left behind the binary tensors: the sum of "
            f"'binary_data_size' does not fit the body"
        )
    request_id = document.get("id", "")
    if not isinstance(request_id, str):
        raise InvalidArgument(f"'id' must be a string, not {request_id!r}")
    head = _decode_head(document, metadata, model_name, model_version)
    return InferCall(arrays, request_id, head)


def encode_v2(
    call: InferCall, tensors: Sequence[Tensor], model_name: str, model_version: str = ""
) -> RestReply:
    """The response, each output as JSON or binary as the request asks."""
    head = call.head
    tensors = finish_outputs(tensors, head)
    wanted = {output.name: output.binary for output in head.outputs}
    outputs: list[dict[str, Any]] = []
    binaries: list[bytes] = []
    for tensor in tensors:
        entry: dict[str, Any] = {
            "name": tensor.name,
            "datatype": tensor.datatype,
            "shape": tensor.data.shape,
        }
        binary = wanted.get(tensor.name)
        if head.raw if binary is None else binary:
            raw = encode_raw(tensor.data, DATATYPES[tensor.datatype])
            entry["parameters"] = {"binary_data_size": len(raw)}
            binaries.append(raw)
        else:
            entry["data"] = jsonable(tensor)
        outputs.append(entry)
    document: dict[str, Any] = {"model_name": model_name}
    if model_version or head.model_version:
        document["model_version"] = model_version or head.model_version
    if call.id:
        document["id"] = call.id
    document["outputs"] = outputs
    text = orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY)
    if not binaries:
        return RestReply(text)
    return RestReply(b"".join((text, *binaries)), BINARY_TYPE, len(text))


def decode_v1(body: bytes, metadata: ModelMetadata, *, model_name: str = "") -> InferCall:
    """``{"instances": rows}`` or ``{"inputs": columns}``.

    An instance is the value of the model's only input, or an object of input names and values;
    so is ``inputs`` as a whole, with the batch as the first axis of every value.
    """
    document = _document(body)
    if ("instances" in document) == ("inputs" in document):
        raise InvalidArgument("the request needs 'instances' or 'inputs', one of the two")
    if "instances" in document:
        rows = document["instances"]
        if not isinstance(rows, list) or not rows:
            raise InvalidArgument("'instances' must be a list with at least one instance")
        columns = _columns(rows)
    else:
        columns = document["inputs"]
    if not isinstance(columns, dict):
        columns = {_only_input(metadata, "instances" in document): columns}
    check_names(list(columns), metadata)
    arrays = {name: _v1_array(name, data, metadata) for name, data in columns.items()}
    return InferCall(arrays, "", InferHead(model_name=model_name, raw=False))


def encode_v1(tensors: Sequence[Tensor]) -> RestReply:
    """``{"predictions": rows}``: values for one output, objects by output name for several."""
    columns = {tensor.name: _v1_values(tensor) for tensor in tensors}
    predictions: Any
    if len(columns) == 1:
        predictions = next(iter(columns.values()))
    else:
        lengths = {len(values) if isinstance(values, list) else -1 for values in columns.values()}
        if len(lengths) == 1 and lengths != {-1}:
            predictions = [
                dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)
            ]
        else:
            predictions = columns
    return RestReply(orjson.dumps({"predictions": predictions}))


def error_body(message: str) -> bytes:
    """The body of every error response."""
    return orjson.dumps({"error": message})


# ---- parts ----


def _document(text: bytes) -> dict[str, Any]:
    try:
        document = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        if b"NaN" not in text and b"Infinity" not in text:
            raise InvalidArgument(f"the body is no JSON: {error}") from None
        # Python's json writes these bare words, which are no JSON; be kind to its users.
        try:
            document = json.loads(text)
        except (ValueError, RecursionError):
            raise InvalidArgument(f"the body is no JSON: {error}") from None
    if not isinstance(document, dict):
        raise InvalidArgument("the body must be a JSON object")
    return document


def _objects(document: Mapping[str, Any], key: str, of: str) -> list[dict[str, Any]] | None:
    value = document.get(key)
    if value is None:
        return None
    if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
        raise InvalidArgument(f"{of}: {key!r} must be a list of objects")
    return value


def _text(entry: Mapping[str, Any], key: str, of: str) -> str:
    value = entry.get(key)
    if not isinstance(value, str) or not value:
        raise InvalidArgument(f"{of} needs {key!r}, a string; found {value!r}"[:300])
    return value


def _parameters(entry: Mapping[str, Any], of: str) -> dict[str, ParameterValue]:
    value = entry.get("parameters")
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise InvalidArgument(f"{of}: 'parameters' must be an object")
    for name, parameter in value.items():
        if not isinstance(parameter, bool | int | float | str):
            raise InvalidArgument(
                f"{of}: the parameter {name!r} must be a boolean, a number or a string"
            )
    return value


def _flag(parameters: Mapping[str, ParameterValue], name: str, of: str) -> bool | None:
    value = parameters.get(name)
    if value is None or isinstance(value, bool):
        return value
    raise InvalidArgument(f"{of}: the parameter {name!r} must be true or false, not {value!r}")


def _decode_input(
    entry: Mapping[str, Any], binary: memoryview, metadata: ModelMetadata
) -> tuple[Array, int]:
    """The array, and how many binary bytes it took."""
    name = entry["name"]
    of = f"input {name!r}"
    kind = datatype(_text(entry, "datatype", of), of=of)
    axes = entry.get("shape")
    if not isinstance(axes, list) or not all(type(axis) is int for axis in axes):
        raise InvalidArgument(f"{of} needs 'shape', a list of whole numbers")
    shape = tuple(axes)
    check_tensor(name, kind, shape, metadata)
    parameters = _parameters(entry, of)
    refuse_shared_memory(parameters, of)
    size = parameters.get("binary_data_size")
    if size is None:
        if "data" not in entry:
            raise InvalidArgument(f"{of} has neither 'data' nor the parameter 'binary_data_size'")
        return shaped(entry["data"], kind, shape, of), 0
    if isinstance(size, bool) or not isinstance(size, int) or size < 0:
        raise InvalidArgument(f"{of}: 'binary_data_size' must be a number of bytes, not {size!r}")
    if "data" in entry:
        raise InvalidArgument(f"{of} has both 'data' and 'binary_data_size'; give one")
    if size > len(binary):
        raise InvalidArgument(
            f"{of}: 'binary_data_size' is {size}, but only {len(binary)} bytes follow the JSON "
            f"(is the header Inference-Header-Content-Length set?)"
        )
    # A copy of its own: in the middle of a body it would not be aligned for its datatype.
    return decode_raw(bytes(binary[:size]), kind, shape, of=of), size


def _decode_head(
    document: Mapping[str, Any], metadata: ModelMetadata, model_name: str, model_version: str
) -> InferHead:
    parameters = _parameters(document, "the request")
    outputs: list[RequestedOutput] = []
    for index, entry in enumerate(_objects(document, "outputs", "the request") or ()):
        name = _text(entry, "name", f"outputs[{index}]")
        of = f"output {name!r}"
        options = _parameters(entry, of)
        refuse_shared_memory(options, of)
        classes = classification_count(options.get("classification", 0), name)
        outputs.append(RequestedOutput(name, classes, _flag(options, "binary_data", of)))
    checked = requested_outputs(outputs, metadata)
    return InferHead(
        model_name=model_name,
        model_version=model_version,
        parameters={k: v for k, v in parameters.items() if k != "binary_data_output"},
        outputs=checked,
        output_names=tuple(output.name for output in checked),
        raw=bool(_flag(parameters, "binary_data_output", "the request")),
        classified=any(output.classification for output in checked),
    )


def _raw_request(
    body: bytes, metadata: ModelMetadata, model_name: str, model_version: str
) -> InferCall:
    """The whole body is the tensor of the model's only input; the reply is binary, too."""
    if len(metadata.inputs) != 1:
        raise InvalidArgument(
            f"a raw binary request (Inference-Header-Content-Length: 0) needs a model with one "
            f"input; this one has {len(metadata.inputs)}"
        )
    spec = metadata.inputs[0]
    kind = DATATYPES[spec.datatype]
    of = f"input {spec.name!r}"
    head = InferHead(model_name=model_name, model_version=model_version)
    if not kind.size_bytes:
        # One element, without a length before it.
        element: Array = np.empty(1, dtype=object)
        element[0] = body
        return InferCall({spec.name: element.reshape([1] * len(spec.shape))}, "", head)
    shape = (-1,) if spec.any_rank else spec.shape
    if shape.count(-1) > 1:
        raise InvalidArgument(
            f"a raw binary request cannot tell the shape of {of}, {list(shape)}: more than one "
            f"axis is free"
        )
    row_bytes = kind.size_bytes * prod(axis for axis in shape if axis >= 0)
    free = len(body) // row_bytes if row_bytes else 0
    exact = tuple(free if axis < 0 else axis for axis in shape)
    return InferCall({spec.name: decode_raw(body, kind, exact, of=of)}, "", head)


def _columns(rows: list[Any]) -> Any:
    """Rows of objects turned into one list for each input; anything else stays as it is."""
    if not isinstance(rows[0], dict):
        return rows
    names = rows[0].keys()
    for index, row in enumerate(rows):
        if not isinstance(row, dict) or row.keys() != names:
            raise InvalidArgument(
                f"instances[{index}] must be an object with the inputs {sorted(names)}, "
                f"as instances[0] is"
            )
    return {name: [row[name] for row in rows] for name in names}


def _only_input(metadata: ModelMetadata, rows: bool) -> str:
    if len(metadata.inputs) == 1:
        return metadata.inputs[0].name
    names = [spec.name for spec in metadata.inputs]
    what = "each instance" if rows else "'inputs'"
    raise InvalidArgument(f"the model has the inputs {names}: {what} must be an object of them")


def _v1_array(name: str, data: Any, metadata: ModelMetadata) -> Array:
    of = f"input {name!r}"
    if metadata.accepts_any_input:
        sample = data
        while isinstance(sample, list) and sample:
            sample = sample[0]
        return array_of(data, DATATYPES["BYTES" if isinstance(sample, str) else "FP64"], of)
    spec = next(spec for spec in metadata.inputs if spec.name == name)
    kind = DATATYPES[spec.datatype]
    array = array_of(data, kind, of)
    check_tensor(name, kind, array.shape, metadata)
    return array


def _v1_values(tensor: Tensor) -> Any:
    if tensor.name == _COLUMN_OUTPUT and tensor.data.ndim == 2 and tensor.data.shape[1] == 1:
        tensor = tensor._replace(data=tensor.data.reshape(-1))
    return nested(tensor)
