"""A wrong field is an error with its path, what was expected and what was found."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mesh.core.errors import Code, InvalidArgument
from mesh.kserve_fields import FRAMEWORKS
from mesh.manifest import parse_resource
from tests.manifest.resources import applied, isvc, onnx

MODEL = "spec.predictor.model"


def with_top(**fields: object) -> dict[str, Any]:
    return {**isvc(), **fields}


def with_model(**fields: object) -> dict[str, Any]:
    return isvc({"model": onnx(**fields)})


def with_storage(**fields: object) -> dict[str, Any]:
    storage = {"path": "p", **fields}
    return isvc({"model": {"modelFormat": {"name": "onnx"}, "storage": storage}})


def annotated(name: str, value: object) -> dict[str, Any]:
    return isvc(annotations={name: value})


@pytest.mark.parametrize(
    ("resource", "path", "expected", "found"),
    [
        (with_top(kind=None), "kind", "InferenceService", "nothing"),
        (with_top(kind="Deployment"), "kind", "InferenceService", "'Deployment'"),
        (with_top(kind=3), "kind", "a string", "the number 3"),
        (with_top(apiVersion=None), "apiVersion", "serving.kserve.io/v1beta1", "nothing"),
        (with_top(apiVersion="serving.kserve.io/v1alpha1"), "apiVersion", "v1beta1", "v1alpha1"),
        (with_top(metadata=None), "metadata", "a mapping with a name", "nothing"),
        (with_top(metadata=[]), "metadata", "a mapping", "a list of 0"),
        (with_top(spec=None), "spec", "a mapping with a predictor", "nothing"),
        (with_top(spec={}), "spec.predictor", "a mapping with a model", "nothing"),
        (isvc(name=None), "metadata.name", "a string", "None"),
        (isvc(name="Iris"), "metadata.name", "lower-case", "'Iris'"),
        (isvc(name=7), "metadata.name", "a string", "7"),
        (isvc(namespace="a.b"), "metadata.namespace", "lower-case", "'a.b'"),
        (isvc(annotations=["x"]), "metadata.annotations", "a mapping", "a list of 1"),
        (isvc(labels={"a": 1}), "metadata.labels.a", "a string (put it in quotes)", "number 1"),
        (isvc("x"), "spec.predictor", "a mapping", "the string 'x'"),
        (isvc({}), "spec.predictor", "exactly one of model, sklearn", "none of them"),
        (
            isvc({"model": onnx(), "sklearn": {"storageUri": "s3://b/c"}}),
            "spec.predictor",
            "exactly one of model",
            "model and sklearn",
        ),
        (
            isvc({"containers": [{"image": "x"}]}),
            "spec.predictor",
            "exactly one of model",
            "only containers",
        ),
        (isvc({"model": 1}), MODEL, "a mapping", "the number 1"),
        (with_model(modelFormat=None), f"{MODEL}.modelFormat", "a mapping with a name", "nothing"),
        (with_model(modelFormat="onnx"), f"{MODEL}.modelFormat", "a mapping", "'onnx'"),
        (with_model(modelFormat={}), f"{MODEL}.modelFormat.name", "the format's name", "nothing"),
        (
            with_model(modelFormat={"name": "onnx", "version": 1}),
            f"{MODEL}.modelFormat.version",
            "a string (put it in quotes)",
            "the number 1",
        ),
        (with_model(storageUri=None), MODEL, "either storageUri or storage", "neither"),
        (with_model(storage={"path": "p"}), MODEL, "either storageUri or storage", "both"),
        (with_model(storageUri="/mnt/m"), f"{MODEL}.storageUri", "a URI", "'/mnt/m'"),
        (with_model(storageUri="s3://"), f"{MODEL}.storageUri", "a URI", "'s3://'"),
        (with_model(storageUri=["a"]), f"{MODEL}.storageUri", "a string", "a list of 1"),
        (with_model(protocolVersion="v3"), f"{MODEL}.protocolVersion", "one of v1, v2", "'v3'"),
        (with_storage(path=None), f"{MODEL}.storage.path", "the path of the model", "nothing"),
        (with_storage(key=True), f"{MODEL}.storage.key", "a string", "the boolean true"),
        (with_storage(parameters="x"), f"{MODEL}.storage.parameters", "a mapping", "'x'"),
        (
            with_storage(parameters={"bucket": {}}),
            f"{MODEL}.storage.parameters.bucket",
            "a string",
            "a mapping",
        ),
        (
            isvc({"sklearn": {}}),
            "spec.predictor.sklearn",
            "either storageUri or storage",
            "neither",
        ),
        (
            isvc({"model": onnx(), "minReplicas": -1}),
            "spec.predictor.minReplicas",
            "a whole number of at least 0",
            "the number -1",
        ),
        (
            isvc({"model": onnx(), "minReplicas": "2"}),
            "spec.predictor.minReplicas",
            "a whole number",
            "the string '2'",
        ),
        (
            isvc({"model": onnx(), "minReplicas": True}),
            "spec.predictor.minReplicas",
            "a whole number",
            "the boolean true",
        ),
        (
            isvc({"model": onnx(), "minReplicas": 3, "maxReplicas": 2}),
            "spec.predictor.maxReplicas",
            "at least minReplicas (3)",
            "the number 2",
        ),
        (
            annotated("mesh.serving/pin", "yes"),
            "metadata.annotations[mesh.serving/pin]",
            '"true" or "false"',
            "'yes'",
        ),
        (
            annotated("mesh.serving/pin", True),
            "metadata.annotations[mesh.serving/pin]",
            "a string (put it in quotes)",
            "the boolean true",
        ),
        (
            annotated("mesh.serving/model-size", "200 MB"),
            "metadata.annotations[mesh.serving/model-size]",
            "a Kubernetes quantity such as 200Mi",
            "'200 MB'",
        ),
        (
            annotated("mesh.serving/model-size", "-1Gi"),
            "metadata.annotations[mesh.serving/model-size]",
            "more than nothing",
            "-1073741824",
        ),
        (
            annotated("mesh.serving/max-concurrency", "0"),
            "metadata.annotations[mesh.serving/max-concurrency]",
            "a whole number of 1",
            "'0'",
        ),
        (
            annotated("mesh.serving/max-batch-size", "many"),
            "metadata.annotations[mesh.serving/max-batch-size]",
            "a whole number of 0 to 4096",
            "'many'",
        ),
        (
            annotated("mesh.serving/max-batch-latency", "2m"),
            "metadata.annotations[mesh.serving/max-batch-latency]",
            "at most a minute",
            "'2m'",
        ),
        (
            isvc({"model": onnx(), "batcher": {"maxBatchSize": -1}}),
            "spec.predictor.batcher.maxBatchSize",
            "a whole number of at least 0",
            "-1",
        ),
        (
            isvc({"model": onnx(), "batcher": {"maxLatency": 600_000}}),
            "spec.predictor.batcher.maxLatency",
            "at most 60000 ms",
            "600000",
        ),
        (
            annotated("mesh.serving/load-timeout", "90"),
            "metadata.annotations[mesh.serving/load-timeout]",
            "a duration such as 90s",
            "'90'",
        ),
        (
            annotated("mesh.serving/idle-unload-after", "10"),
            "metadata.annotations[mesh.serving/idle-unload-after]",
            "a duration such as 90s",
            "'10'",
        ),
        (
            annotated("mesh.serving/required-labels", "gpu,,big"),
            "metadata.annotations[mesh.serving/required-labels]",
            "labels of instances, separated by commas, such as gpu,large-memory",
            "'gpu,,big'",
        ),
        (
            annotated("mesh.serving/preferred-labels", "very fast"),
            "metadata.annotations[mesh.serving/preferred-labels]",
            "separated by commas",
            "'very fast'",
        ),
        (
            annotated("mesh.serving/required-labels", ",".join(f"l{n}" for n in range(17))),
            "metadata.annotations[mesh.serving/required-labels]",
            "at most 16 labels",
            "l16",
        ),
        (
            annotated("mesh.serving/required-labels", ["gpu"]),
            "metadata.annotations[mesh.serving/required-labels]",
            "a string",
            "a list of 1",
        ),
        (
            annotated("mesh.serving/load-timeout", "0s"),
            "metadata.annotations[mesh.serving/load-timeout]",
            "more than nothing",
            "0",
        ),
    ],
)
def test_wrong(resource: dict[str, Any], path: str, expected: str, found: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        applied(resource)
    message = caught.value.message
    assert message.startswith(f"{path}: expected "), message
    what, _, said = message.partition("; found ")
    assert expected in what, message
    assert found in said, message
    assert caught.value.code is Code.INVALID_ARGUMENT


def test_the_message_of_a_huge_wrong_value_is_short() -> None:
    with pytest.raises(InvalidArgument) as caught:
        applied(with_model(modelFormat="x" * 1_000_000))
    assert len(caught.value.message) < 500


junk = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 3) | st.text(max_size=5) | st.floats(-1, 1),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                (
                    "name",
                    "model",
                    "storage",
                    "storageUri",
                    "path",
                    "modelFormat",
                    "minReplicas",
                    *FRAMEWORKS[:2],
                )
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(("kind", "metadata", "spec", "predictor", "model", "annotations")), junk)
def test_whatever_stands_in_a_field_is_taken_or_refused_and_never_breaks(
    where: str, value: object
) -> None:
    resource = isvc()
    match where:
        case "predictor":
            resource["spec"]["predictor"] = value
        case "model":
            resource["spec"]["predictor"]["model"] = value
        case "annotations":
            resource["metadata"]["annotations"] = {"mesh.serving/pin": value}
        case _:
            resource[where] = value
    try:
        found = parse_resource(resource)
    except InvalidArgument as error:
        assert ": expected " in error.message
    else:
        assert found.model.model_id.startswith(f"{found.name}__isvc-")
        assert found.model.path
