"""What a model-settings.json means, and what is refused in one."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mesh.core.errors import Code, LoadFailed
from mesh.runtimes.api import ModelOptions, TensorSpec
from mesh.runtimes.model_settings import Settings, read_model_settings

WHOLE = {
    "name": "digits",
    "implementation": "mlserver_sklearn.SKLearnModel",
    "platform": "sklearn",
    "versions": ["1"],
    "inputs": [
        {"name": "x", "datatype": "FP32", "shape": [-1, 64], "parameters": {"content_type": "np"}}
    ],
    "outputs": [{"name": "predict", "datatype": "bytes", "shape": [-1]}],
    "max_batch_size": 32,
    "max_batch_time": 0.25,
    "parallel_workers": 4,
    "warm_workers": True,
    "parameters": {
        "uri": "./fit.joblib",
        "version": "v0.1.0",
        "format": "joblib",
        "content_type": "np",
        "environment_tarball": "env.tar.gz",
        "extra": {"mode": "fast", "top": 3},
    },
}


def read(document: Any) -> Settings:
    return read_model_settings(json.dumps(document))


def test_a_whole_file_is_understood() -> None:
    options = ModelOptions(
        source="model-settings.json",
        format="sklearn",
        inputs=(TensorSpec("x", "FP32", (-1, 64)),),
        outputs=(TensorSpec("predict", "BYTES", (-1,)),),
        max_batch_size=32,
        max_latency_us=250_000,
        parameters={"format": "joblib", "content_type": "np", "mode": "fast", "top": "3"},
        warnings=(
            "model-settings.json: parallel_workers has no effect: the instance runs all its "
            "models' requests in its own threads (mesh instance --threads)",
        ),
    )
    assert read(WHOLE) == Settings(options, "fit.joblib", "v0.1.0")


def test_an_empty_file_says_nothing() -> None:
    assert read({}) == Settings(ModelOptions(source="model-settings.json"), "", "")


def test_no_workers_are_nothing_to_warn_of() -> None:
    assert read({"parallel_workers": 0}).options.warnings == ()


def test_null_is_the_same_as_absent() -> None:
    assert read(dict.fromkeys(WHOLE)) == read({})


@pytest.mark.parametrize(
    ("document", "form"),
    [
        ({"implementation": "mlserver_sklearn.SKLearnModel"}, "sklearn"),
        ({"implementation": "mlserver_sklearn.sklearn.SKLearnModel"}, "sklearn"),
        ({"implementation": "mlserver_xgboost.XGBoostModel"}, "xgboost"),
        ({"implementation": "mlserver_lightgbm.LightGBMModel"}, "lightgbm"),
        ({"implementation": "mlserver_xgboost.XGBoostModel", "platform": "onnx"}, "xgboost"),
        ({"platform": "SKLearn"}, "sklearn"),
        ({"platform": "keras"}, "tensorflow"),
        ({"platform": "a cluster"}, ""),
        ({}, ""),
    ],
)
def test_the_implementation_is_the_format(document: Any, form: str) -> None:
    assert read(document).options.format == form


@pytest.mark.parametrize(
    ("document", "size", "latency_us"),
    [
        ({}, None, None),
        ({"max_batch_size": 0}, 0, None),
        ({"max_batch_size": 1}, 0, None),
        ({"max_batch_size": 8}, 8, None),
        ({"max_batch_size": 8, "max_batch_time": 0}, 8, None),
        ({"max_batch_size": 8, "max_batch_time": 0.5}, 8, 500_000),
        ({"max_batch_time": 1}, None, 1_000_000),
    ],
)
def test_batching(document: Any, size: int | None, latency_us: int | None) -> None:
    options = read(document).options
    assert (options.max_batch_size, options.max_latency_us) == (size, latency_us)


def test_a_tensor_without_a_shape_has_any() -> None:
    options = read({"inputs": [{"name": "x", "datatype": "FP64"}]}).options
    assert options.inputs == (TensorSpec("x", "FP64", (), any_rank=True),)


@pytest.mark.parametrize(
    ("uri", "found"), [("./a/../b", None), (".", ""), ("./", ""), ("a/./b/", "a/b"), ("m", "m")]
)
def test_where_the_model_is(uri: str, found: str | None) -> None:
    document = {"parameters": {"uri": uri}}
    if found is None:
        with pytest.raises(LoadFailed, match=r"parameters\.uri: expected a path relative to"):
            read(document)
    else:
        assert read(document).uri == found


X = {"name": "x", "datatype": "FP32"}

WRONG = [
    pytest.param([], "expected a mapping; found a list", id="a list"),
    pytest.param({"name": 3}, "name: expected a string", id="a number for a name"),
    pytest.param({"implementation": ["x"]}, "implementation: expected a string", id="a class list"),
    pytest.param(
        {"implementation": "mlserver_mlflow.MLflowRuntime"}, "implementation: no runtime", id="flow"
    ),
    pytest.param(
        {"implementation": "mlserver_huggingface.HuggingFaceRuntime"}, "no runtime", id="faces"
    ),
    pytest.param(
        {"implementation": "models.Mine"}, "or as a python model", id="an own implementation"
    ),
    pytest.param({"versions": "1"}, "versions: expected a list", id="versions"),
    pytest.param({"versions": [1]}, "versions[0]: expected a string", id="a version's type"),
    pytest.param({"inputs": {}}, "inputs: expected a list", id="inputs as a mapping"),
    pytest.param({"inputs": [X, 1]}, "inputs[1]: expected a mapping", id="an input's type"),
    pytest.param({"inputs": [X, X]}, "inputs[1].name: expected each name once", id="twice"),
    pytest.param({"inputs": [{"name": "x"}]}, "inputs[0].datatype: expected", id="no datatype"),
    pytest.param(
        {"outputs": [{"name": "x", "datatype": "float"}]}, "outputs[0].datatype: expected one of",
        id="an unknown datatype",
    ),
    pytest.param({"inputs": [X | {"shape": 3}]}, "inputs[0].shape: expected a list", id="a shape"),
    pytest.param({"inputs": [X | {"shape": [0]}]}, "inputs[0].shape[0]: expected a size", id="0"),
    pytest.param({"inputs": [X | {"shape": [True]}]}, "shape[0]: expected", id="a boolean axis"),
    pytest.param({"inputs": [X | {"shape": [2.5]}]}, "shape[0]: expected", id="half an axis"),
    pytest.param({"inputs": [X | {"shape": [1] * 33}]}, "at most 32 sizes", id="many axes"),
    pytest.param({"inputs": [X] * 1025}, "inputs: expected a list of at most 1024", id="many"),
    pytest.param({"max_batch_size": -1}, "max_batch_size: expected a whole number", id="below 0"),
    pytest.param({"max_batch_size": 10**12}, "max_batch_size: expected at most", id="too large"),
    pytest.param({"max_batch_time": "1s"}, "max_batch_time: expected seconds", id="time as text"),
    pytest.param({"max_batch_time": 61}, "max_batch_time: expected seconds", id="a long wait"),
    pytest.param({"max_batch_time": True}, "max_batch_time: expected seconds", id="a true time"),
    pytest.param({"parallel_workers": "4"}, "parallel_workers: expected", id="workers as text"),
    pytest.param({"parameters": "x"}, "parameters: expected a mapping", id="parameters"),
    pytest.param({"parameters": {"uri": "/m"}}, "parameters.uri: expected", id="absolute"),
    pytest.param({"parameters": {"uri": "../m"}}, "parameters.uri: expected", id="upwards"),
    pytest.param({"parameters": {"uri": "s3://b/m"}}, "parameters.uri: expected", id="a store"),
    pytest.param({"parameters": {"uri": "a\0b"}}, "parameters.uri: expected", id="a zero byte"),
    pytest.param({"parameters": {"version": 1}}, "put it in quotes", id="a version as a number"),
    pytest.param({"parameters": {"version": "a/b"}}, "parameters.version: expected", id="slash"),
    pytest.param({"parameters": {"version": "\n"}}, "parameters.version: expected", id="a line"),
    pytest.param({"parameters": {"extra": []}}, "parameters.extra: expected", id="extra"),
]  # fmt: skip


@pytest.mark.parametrize(("document", "said"), WRONG)
def test_a_wrong_file_is_refused_by_field(document: Any, said: str) -> None:
    with pytest.raises(LoadFailed) as caught:
        read(document)
    assert caught.value.code is Code.FAILED_PRECONDITION
    assert caught.value.message.startswith("model-settings.json: ")
    assert said in caught.value.message
    assert len(caught.value.message) < 600


@pytest.mark.parametrize("text", ["", "{", "name: x", "[" * 100_000, '{"a": NaN}', '"\\ud800"'])
def test_what_is_not_json_is_refused(text: str) -> None:
    with pytest.raises(LoadFailed, match=r"model-settings\.json: (not JSON|expected a mapping)"):
        read_model_settings(text)


VALUES = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(2**70), 2**70),
        st.floats(allow_nan=False, allow_infinity=False),
        st.text(max_size=12),
        st.sampled_from(["FP32", "BYTES", "mlserver_sklearn.SKLearnModel", "./m", "..", "/"]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(
            st.sampled_from([*WHOLE, "uri", "version", "extra", "datatype", "shape", "format"]),
            inner,
            max_size=5,
        ),
    ),
    max_leaves=8,
)
DOCUMENTS = st.dictionaries(st.sampled_from(list(WHOLE)), VALUES, max_size=8)


@given(st.one_of(st.text(), VALUES.map(json.dumps), DOCUMENTS.map(json.dumps)))
@settings(max_examples=100, deadline=None)
@example('{"max_batch_time": 1e400}')
@example('{"max_batch_time": ' + "9" * 5000 + "}")
@example('{"parameters": {"extra": {"a": ' + "[" * 900 + "]" * 900 + "}}}")
@example('{"name": "\\ud800"}')
@example('{"parameters": {"uri": "\\udfff"}}')
def test_any_text_is_settings_or_a_refusal(text: str) -> None:
    try:
        found = read_model_settings(text)
    except LoadFailed as error:
        assert error.message.startswith("model-settings.json: ")
    else:
        assert found.options.source == "model-settings.json"
