"""A wrong request is refused by kind, in words that name what is wrong and what was expected."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import grpc
import numpy as np
import pytest

from protos import oip_pb2 as oip
from tests.e2e.asking import (
    FLOWERS,
    OIP,
    Asker,
    failure_of,
    flowers,
    http_ask,
    raw_request,
    rest,
    typed_flowers,
)
from tests.e2e.conftest import Shared

pytestmark = [pytest.mark.e2e, pytest.mark.etcd]

Code = grpc.StatusCode
PATH = "/v2/models/iris-0001/infer"


def wrong_name() -> oip.ModelInferRequest:
    return raw_request("iris-0001", inptu=FLOWERS)


def wrong_datatype() -> oip.ModelInferRequest:
    return raw_request("iris-0001", input=FLOWERS.astype(np.float64))


def unknown_datatype() -> oip.ModelInferRequest:
    request = flowers("iris-0001")
    request.inputs[0].datatype = "FLOAT32"
    return request


def wrong_shape() -> oip.ModelInferRequest:
    return raw_request("iris-0001", input=FLOWERS[:, :3].copy())


def negative_shape() -> oip.ModelInferRequest:
    request = flowers("iris-0001")
    request.inputs[0].shape[0] = -2
    return request


def wrong_byte_count() -> oip.ModelInferRequest:
    request = flowers("iris-0001")
    request.raw_input_contents[0] = request.raw_input_contents[0][:-4]
    return request


def wrong_element_count() -> oip.ModelInferRequest:
    request = typed_flowers("iris-0001")
    request.inputs[0].contents.fp32_contents.pop()
    return request


def raw_and_typed() -> oip.ModelInferRequest:
    request = typed_flowers("iris-0001")
    request.raw_input_contents.append(FLOWERS.tobytes())
    return request


def wrong_contents_field() -> oip.ModelInferRequest:
    request = typed_flowers("iris-0001")
    del request.inputs[0].contents.fp32_contents[:]
    request.inputs[0].contents.int64_contents.extend(range(8))
    return request


def missing_input() -> oip.ModelInferRequest:
    return oip.ModelInferRequest(model_name="iris-0001")


def input_twice() -> oip.ModelInferRequest:
    request = flowers("iris-0001")
    request.inputs.add().CopyFrom(request.inputs[0])
    request.raw_input_contents.append(request.raw_input_contents[0])
    return request


def unknown_output() -> oip.ModelInferRequest:
    request = flowers("iris-0001")
    request.outputs[0].name = "lable"
    return request


# What the message must name: the tensor, what was found or what was expected.
INVALID: list[tuple[Callable[[], oip.ModelInferRequest], list[str]]] = [
    (wrong_name, ["inptu", "input"]),
    (wrong_datatype, ["input", "FP32", "FP64"]),
    (unknown_datatype, ["input", "FLOAT32"]),
    (wrong_shape, ["input", "[-1, 4]", "[2, 3]"]),
    (negative_shape, ["input", "-2"]),
    (wrong_byte_count, ["input", "32", "28"]),
    (wrong_element_count, ["input", "8", "7"]),
    (raw_and_typed, ["input", "raw"]),
    (wrong_contents_field, ["input", "fp32_contents"]),
    (missing_input, ["input"]),
    (input_twice, ["input"]),
    (unknown_output, ["lable", "label"]),
]


@pytest.mark.parametrize(("make", "named"), INVALID, ids=[make.__name__ for make, _ in INVALID])
def test_a_wrong_tensor_is_invalid_argument(
    ask: Asker, make: Callable[[], oip.ModelInferRequest], named: list[str]
) -> None:
    code, message = ask.refused(make())
    assert code is Code.INVALID_ARGUMENT, message
    assert all(part in message for part in named), message


def test_an_unknown_model_is_not_found_by_name(ask: Asker) -> None:
    code, message = ask.refused(flowers("no-such-model"))
    assert code is Code.NOT_FOUND and "no-such-model" in message
    code, message = ask.refused(flowers("iris-0001"), [("mm-model-id", "no-such-either")])
    assert code is Code.NOT_FOUND and "no-such-either" in message


def test_an_unknown_version_is_not_found(ask: Asker) -> None:
    request = flowers("iris-0001")
    request.model_version = "7"
    code, message = ask.refused(request)
    assert code is Code.NOT_FOUND and "'7'" in message


def test_no_name_at_all_is_invalid(ask: Asker) -> None:
    code, message = ask.refused(flowers(""))
    assert code is Code.INVALID_ARGUMENT and "model" in message


def test_a_message_over_the_limit_is_resource_exhausted(ask: Asker) -> None:
    request = raw_request("iris-0001", input=np.zeros((1 << 20, 5), np.float32))
    code, message = ask.refused(request)
    assert code is Code.RESOURCE_EXHAUSTED
    assert str(16 << 20) in message, message
    assert ask.labels("iris-0001"), "the connection goes on"


def test_what_is_no_protobuf_is_invalid(ask: Asker) -> None:
    infer = ask.channel.unary_unary(OIP + "ModelInfer")
    error = failure_of(lambda: infer(b"\xff\xff\xff garbage", timeout=60))
    assert error.code() is Code.INVALID_ARGUMENT
    with_name = b"\x0a\x09iris-0001" + b"\x2a\xff\xff"
    error = failure_of(lambda: infer(with_name, timeout=60))
    assert error.code() is Code.INVALID_ARGUMENT


def test_an_unknown_method_is_unimplemented(ask: Asker) -> None:
    method = ask.channel.unary_unary(OIP + "NoSuchMethod")
    to_iris = (("mm-model-id", "iris-0001"),)
    refusal = failure_of(lambda: method(b"", timeout=60, metadata=to_iris))
    assert refusal.code() is Code.UNIMPLEMENTED and "NoSuchMethod" in refusal.details()
    # Any method may be some runtime's own: only the header tells which model it is for.
    refusal = failure_of(lambda: method(b"", timeout=60))
    assert refusal.code() is Code.INVALID_ARGUMENT and "mm-model-id" in refusal.details()


# ---- REST ----


def tensor(**changes: Any) -> dict[str, Any]:
    fitting = {"name": "input", "datatype": "FP32", "shape": [1, 4], "data": [1.0, 2.0, 3.0, 4.0]}
    return {"inputs": [{**fitting, **changes}]}


BY_REST: list[tuple[str, Any, list[str]]] = [
    ("name", tensor(name="inptu"), ["inptu", "input"]),
    ("datatype", tensor(datatype="INT64", data=[1, 2, 3, 4]), ["input", "FP32", "INT64"]),
    ("shape", tensor(shape=[1, 3], data=[1.0, 2.0, 3.0]), ["input", "[-1, 4]"]),
    ("count", tensor(data=[1.0, 2.0]), ["input", "4", "2"]),
    ("element", tensor(data=["a", "b", "c", "d"]), ["input", "string", "number"]),
    ("no data", {"inputs": [{"name": "input", "datatype": "FP32", "shape": [1, 4]}]}, ["data"]),
    ("no inputs", {}, ["inputs"]),
    ("a list", [], ["object"]),
]


@pytest.mark.parametrize(
    ("body", "named"), [case[1:] for case in BY_REST], ids=[case[0] for case in BY_REST]
)
def test_a_wrong_body_is_400(shared: Shared, body: Any, named: list[str]) -> None:
    status, answer = rest(shared.rest, "POST", PATH, body)
    assert status == 400, answer
    assert all(part in answer["error"] for part in named), answer


def test_what_is_no_json_is_400(shared: Shared) -> None:
    status, _, answer = http_ask(shared.rest, "POST", PATH, b'{"inputs": [')
    assert status == 400 and "JSON" in json.loads(answer)["error"]


def test_binary_sizes_that_do_not_add_up_are_400(shared: Shared) -> None:
    wanted = {
        "name": "input", "datatype": "FP32", "shape": [1, 4],
        "parameters": {"binary_data_size": 16},
    }  # fmt: skip
    head = json.dumps({"inputs": [wanted]}).encode()
    lengths = {"Inference-Header-Content-Length": str(len(head))}
    status, _, answer = http_ask(shared.rest, "POST", PATH, head + bytes(12), lengths)
    assert status == 400 and "input" in json.loads(answer)["error"], answer
    beyond = {"Inference-Header-Content-Length": "100000"}
    assert http_ask(shared.rest, "POST", PATH, head + bytes(16), beyond)[0] == 400


def test_an_unknown_model_is_404_by_name(shared: Shared) -> None:
    status, answer = rest(shared.rest, "POST", "/v2/models/no-such/infer", tensor())
    assert status == 404 and "no-such" in answer["error"]
    status, answer = rest(shared.rest, "POST", "/v1/models/no-such:predict", {"instances": [[1]]})
    assert status == 404 and "no-such" in answer["error"]
    assert rest(shared.rest, "GET", "/v2/nonsense")[0] == 404


def test_a_body_over_the_limit_is_refused(shared: Shared) -> None:
    status, _, _ = http_ask(shared.rest, "POST", PATH, bytes((16 << 20) + 1))
    assert status in (413, 429)
