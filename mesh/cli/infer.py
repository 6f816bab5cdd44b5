"""`mesh infer`: a v2 JSON body, or arrays from .npy files, to a model; the answer as v2 JSON.

The request goes over gRPC with raw tensors, whatever it was written as. A body that is wrong is
named here, before anything is sent; what only the model can judge (names, shapes) the mesh says.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mesh.cli.exits import CommandError, Exit
from mesh.cli.session import Session, out
from mesh.core.errors import MeshError
from mesh.oip.datatypes import Array, DataType, bf16_to_fp32, datatype, datatype_name, fp32_to_bf16
from mesh.oip.raw_bytes import decode_raw, encode_raw
from protos import oip_pb2


def infer(
    session: Session, name: str, *, json_file: str | None, npy: Sequence[str], timeout_s: float
) -> None:
    from mesh.cli.connection import MODEL_INFER

    if (json_file is None) == (not npy):
        raise CommandError(
            "give the request as --json FILE (or - for stdin), or as one --npy INPUT=FILE for "
            "each input",
            Exit.USAGE,
        )
    try:
        if json_file is not None:
            request = request_from_json(_read_json(json_file))
        else:
            request = request_from_arrays(dict(map(_read_npy, npy)))
    except MeshError as error:
        raise CommandError(error.message, Exit.USAGE) from error
    request.model_name = name
    reply = session.connect().call(MODEL_INFER, request.SerializeToString(), timeout_s=timeout_s)
    response = oip_pb2.ModelInferResponse.FromString(reply)
    out(json.dumps(response_to_json(response), ensure_ascii=False) + "\n")


def request_from_arrays(arrays: Mapping[str, Array]) -> oip_pb2.ModelInferRequest:
    """Raises CommandError for an array of a type that the protocol does not have."""
    request = oip_pb2.ModelInferRequest()
    for name, array in arrays.items():
        kind_name = datatype_name(array.dtype)
        if kind_name is None:
            raise CommandError(
                f"--npy {name}: arrays of {array.dtype} cannot be sent; convert it, for example "
                "with .astype('float32')",
                Exit.USAGE,
            )
        _add_input(request, name, datatype(kind_name, of=name), array)
    return request


def request_from_json(body: Any) -> oip_pb2.ModelInferRequest:
    """A v2 REST inference body. Raises CommandError that names the field at fault."""
    if not isinstance(body, dict) or not isinstance(body.get("inputs"), list):
        raise _wrong('an object with a list "inputs" was expected')
    request = oip_pb2.ModelInferRequest(id=str(body.get("id", "")))
    _set_parameters(request.parameters, body.get("parameters"), "parameters")
    for at, item in enumerate(body["inputs"]):
        where = f"inputs[{at}]"
        if not isinstance(item, dict):
            raise _wrong(f"{where}: an object was expected")
        for field in ("name", "shape", "datatype", "data"):
            if field not in item:
                raise _wrong(f'{where} has no "{field}"')
        name = str(item["name"])
        kind = datatype(str(item["datatype"]), of=f"{where} ({name})")
        array = _array(item["data"], kind, item["shape"], f"{where} ({name})")
        tensor = _add_input(request, name, kind, array)
        _set_parameters(tensor.parameters, item.get("parameters"), f"{where}.parameters")
    for at, item in enumerate(body.get("outputs") or ()):
        if not isinstance(item, dict) or "name" not in item:
            raise _wrong(f'outputs[{at}]: an object with a "name" was expected')
        output = request.outputs.add(name=str(item["name"]))
        _set_parameters(output.parameters, item.get("parameters"), f"outputs[{at}].parameters")
    return request


def response_to_json(response: oip_pb2.ModelInferResponse) -> dict[str, Any]:
    """The v2 REST form of an answer with raw or typed tensors."""
    body: dict[str, Any] = {"model_name": response.model_name}
    if response.model_version:
        body["model_version"] = response.model_version
    if response.id:
        body["id"] = response.id
    if response.parameters:
        body["parameters"] = _parameters_to_json(response.parameters)
    body["outputs"] = []
    for at, output in enumerate(response.outputs):
        kind = datatype(output.datatype, of=output.name)
        if response.raw_output_contents:
            array = decode_raw(
                response.raw_output_contents[at], kind, tuple(output.shape), of=output.name
            )
            data = _values(array, kind)
        else:
            data = [_text(value) for value in _typed(output.contents, kind)]
        tensor: dict[str, Any] = {
            "name": output.name,
            "datatype": output.datatype,
            "shape": list(output.shape),
            "data": data,
        }
        if output.parameters:
            tensor["parameters"] = _parameters_to_json(output.parameters)
        body["outputs"].append(tensor)
    return body


def _add_input(request: oip_pb2.ModelInferRequest, name: str, kind: DataType, array: Array) -> Any:
    tensor = request.inputs.add(name=name, datatype=kind.name, shape=list(array.shape))
    request.raw_input_contents.append(encode_raw(array, kind))
    return tensor


def _array(data: Any, kind: DataType, shape: Any, where: str) -> Array:
    try:
        wanted = tuple(int(size) for size in shape)
        if kind.name == "BYTES":
            flat = [_element(value) for value in _flat(data)]
            array = np.empty(len(flat), dtype=object)
            array[:] = flat
        elif kind.name == "BF16":
            array = fp32_to_bf16(np.array(data, dtype="<f4"))
        else:
            array = np.array(data, dtype=kind.dtype)
        shaped: Array = array.reshape(wanted)
    except (ValueError, TypeError, OverflowError) as error:
        raise _wrong(f"{where}: data does not fit {kind.name} {shape}: {error}") from error
    return shaped


def _flat(data: Any) -> list[Any]:
    if not isinstance(data, list):
        return [data]
    return [value for item in data for value in _flat(item)]


def _element(value: Any) -> bytes:
    if not isinstance(value, str):
        raise TypeError(f"BYTES elements are strings, got {type(value).__name__}")
    return value.encode()


def _values(array: Array, kind: DataType) -> list[Any]:
    if kind.name == "BF16":
        array = bf16_to_fp32(array)
    return [_text(value) for value in array.ravel().tolist()]


def _text(value: Any) -> Any:
    # JSON has no bytes; what is not text is shown so that it can be told from text.
    return value.decode("utf-8", "backslashreplace") if isinstance(value, bytes) else value


def _typed(contents: oip_pb2.InferTensorContents, kind: DataType) -> Sequence[Any]:
    if kind.contents_field is None:
        return ()
    values: Sequence[Any] = getattr(contents, kind.contents_field)
    return values


def _set_parameters(target: Any, values: Any, where: str) -> None:
    if values is None:
        return
    if not isinstance(values, dict):
        raise _wrong(f"{where}: an object was expected")
    for key, value in values.items():
        match value:
            case bool():
                target[key].bool_param = value
            case int():
                target[key].int64_param = value
            case str():
                target[key].string_param = value
            case float():
                target[key].double_param = value
            case _:
                raise _wrong(f"{where}.{key}: true, false, a number or a string was expected")


def _parameters_to_json(values: Any) -> dict[str, Any]:
    return {
        key: getattr(value, which)
        for key, value in sorted(values.items())
        if (which := value.WhichOneof("parameter_choice"))
    }


def _read_json(file: str) -> Any:
    try:
        text = sys.stdin.read() if file == "-" else Path(file).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CommandError(f"--json {file}: cannot be read: {error}", Exit.USAGE) from error
    try:
        return json.loads(text)
    except ValueError as error:
        raise CommandError(f"--json {file}: not JSON: {error}", Exit.USAGE) from error


def _read_npy(pair: str) -> tuple[str, Array]:
    name, equals, file = pair.partition("=")
    if not (name and equals and file):
        raise CommandError(f"--npy {pair}: write INPUT=FILE", Exit.USAGE)
    try:
        # Pickled arrays could run code; the protocol has no use for them.
        array: Array = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise CommandError(f"--npy {pair}: cannot be read: {error}", Exit.USAGE) from error
    if not isinstance(array, np.ndarray):
        raise CommandError(f"--npy {pair}: a .npy file with one array was expected", Exit.USAGE)
    return name, array


def _wrong(what: str) -> CommandError:
    return CommandError(f"--json: {what}", Exit.USAGE)
