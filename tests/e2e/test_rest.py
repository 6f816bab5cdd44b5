"""Open Inference Protocol by REST: v2 with and without binary tensors, v1, the repository."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tests.e2e.asking import FLOWERS, LABELS, SETOSA, VIRGINICA, http_ask, rest
from tests.e2e.conftest import Shared

pytestmark = [pytest.mark.e2e, pytest.mark.etcd]

TENSOR = {"name": "input", "datatype": "FP32", "shape": [2, 4], "data": [*SETOSA, *VIRGINICA]}
BODY = {"id": "r-1", "inputs": [TENSOR], "outputs": [{"name": "label"}]}


def test_health_and_server_metadata(shared: Shared) -> None:
    assert rest(shared.rest, "GET", "/v2/health/live")[0] == 200
    assert rest(shared.rest, "GET", "/v2/health/ready")[0] == 200
    status, body = rest(shared.rest, "GET", "/v2")
    assert status == 200 and body["name"] == "modelmesh-py"


def test_inference_by_json(shared: Shared) -> None:
    for path in ("/v2/models/iris-0001/infer", "/v2/models/iris-0001/versions/1/infer"):
        status, body = rest(shared.rest, "POST", path, BODY)
        assert status == 200, body
        assert (body["model_name"], body["id"]) == ("iris-0001", "r-1")
        label = {"name": "label", "datatype": "INT64", "shape": [2], "data": LABELS}
        assert body["outputs"] == [label]


def test_nested_data_is_the_same_as_flat(shared: Shared) -> None:
    tensor = {**TENSOR, "data": [SETOSA, VIRGINICA]}
    status, body = rest(
        shared.rest, "POST", "/v2/models/iris-0001/infer", {**BODY, "inputs": [tensor]}
    )
    assert status == 200 and body["outputs"][0]["data"] == LABELS


def test_binary_tensors_there_and_back(shared: Shared) -> None:
    tensor = {key: value for key, value in TENSOR.items() if key != "data"}
    tensor["parameters"] = {"binary_data_size": FLOWERS.nbytes}
    outputs = [{"name": "label", "parameters": {"binary_data": True}}]
    head = json.dumps({"inputs": [tensor], "outputs": outputs}).encode()
    status, headers, body = http_ask(
        shared.rest,
        "POST",
        "/v2/models/iris-0001/infer",
        head + FLOWERS.tobytes(),
        {"Inference-Header-Content-Length": str(len(head))},
    )
    assert status == 200, body
    length = int(headers["inference-header-content-length"])
    assert json.loads(body[:length])["outputs"][0]["parameters"] == {"binary_data_size": 16}
    assert np.frombuffer(body[length:], np.int64).tolist() == LABELS


def test_v1_predict(shared: Shared) -> None:
    status, body = rest(
        shared.rest, "POST", "/v1/models/iris-skops:predict", {"instances": [SETOSA, VIRGINICA]}
    )
    assert (status, body) == (200, {"predictions": LABELS})


def test_a_models_metadata_and_readiness(shared: Shared) -> None:
    status, body = rest(shared.rest, "GET", "/v2/models/iris-0001")
    assert status == 200 and body["inputs"][0]["name"] == "input" and body["versions"] == ["1"]
    assert rest(shared.rest, "GET", "/v2/models/iris-0001/ready")[0] == 200
    assert rest(shared.rest, "GET", "/v2/models/iris-0001/config")[0] == 200
    assert rest(shared.rest, "GET", "/v2/models/iris-0001/stats")[0] == 200


def test_the_repository(shared: Shared) -> None:
    status, index = rest(shared.rest, "POST", "/v2/repository/index", {})
    assert status == 200 and "iris-0001" in {entry["name"] for entry in index}
    assert rest(shared.rest, "POST", "/v2/repository/models/wine-0001/load", {})[0] == 200
    assert rest(shared.rest, "POST", "/v2/repository/models/wine-0001/unload", {})[0] == 200


def test_the_requests_that_come_with_the_samples_get_the_answers_that_they_promise(
    shared: Shared,
) -> None:
    examples = json.loads((shared.models / ".examples.json").read_text())
    assert len(examples) == 3
    for example in examples:
        status, body = rest(shared.rest, "POST", example["path"], example["request"])
        assert (status, body) == (200, example["response"])
