"""InferenceServices as KServe's and ModelMesh's users write them, and the records they become."""

from __future__ import annotations

import hashlib
import json

import pytest

from mesh.core.types import ModelRecord, VModelRecord
from mesh.kserve_fields import FRAMEWORKS
from mesh.manifest import parse_manifests, parse_resource
from tests.manifest.resources import applied, isvc, onnx

MODELMESH_EXAMPLE = """
apiVersion: serving.kserve.io/v1beta1
kind: InferenceService
metadata:
  name: example-sklearn-isvc
  namespace: modelmesh-serving
  annotations:
    serving.kserve.io/deploymentMode: ModelMesh
spec:
  predictor:
    model:
      modelFormat:
        name: sklearn
        version: "0"
      storage:
        key: localMinIO
        path: sklearn/mnist-svm.joblib
        schemaPath: sklearn/schema.json
        parameters:
          bucket: modelmesh-example-models
"""

KSERVE_EXAMPLE = """
apiVersion: "serving.kserve.io/v1beta1"
kind: "InferenceService"
metadata:
  name: "sklearn-iris"
spec:
  predictor:
    model:
      modelFormat:
        name: sklearn
      protocolVersion: v2
      storageUri: "gs://kfserving-examples/models/sklearn/1.0/model"
"""


def test_the_modelmesh_example_is_taken_unchanged_and_without_a_warning() -> None:
    (found,) = parse_manifests(MODELMESH_EXAMPLE, now_ms=77)
    assert found.warnings == ()
    assert (found.name, found.namespace) == ("example-sklearn-isvc", "modelmesh-serving")
    model_id = found.model.model_id
    assert found.model == ModelRecord(
        model_id=model_id,
        model_type="sklearn",
        path="sklearn/mnist-svm.joblib",
        key=found.model.key,
        auto_delete=True,
        created_at_ms=77,
    )
    assert json.loads(found.model.key) == {
        "storage_key": "localMinIO",
        "storage_params": {"bucket": "modelmesh-example-models"},
        "schema_path": "sklearn/schema.json",
        "model_type": {"name": "sklearn", "version": "0"},
    }
    assert found.alias == VModelRecord(
        name="example-sklearn-isvc",
        active_model_id=model_id,
        target_model_id=model_id,
        owner="isvc",
        manifest=found.alias.manifest,
        created_at_ms=77,
        updated_at_ms=77,
    )


def test_the_kserve_example_keeps_its_uri_as_the_path() -> None:
    (found,) = parse_manifests(KSERVE_EXAMPLE)
    assert found.warnings == ()
    assert found.namespace == ""
    assert found.model.path == "gs://kfserving-examples/models/sklearn/1.0/model"
    assert json.loads(found.model.key) == {"model_type": {"name": "sklearn"}}


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_the_old_form_is_the_framework_as_format(framework: str) -> None:
    found = applied(isvc({framework: {"storageUri": "s3://b/c", "protocolVersion": "v2"}}))
    assert (found.model.model_type, found.model.path) == (framework, "s3://b/c")
    assert json.loads(found.model.key) == {"model_type": {"name": framework}}
    assert found.warnings == ()


def test_the_old_form_takes_a_storage_too() -> None:
    found = applied(isvc({"onnx": {"storage": {"key": "k", "path": "p"}}}))
    assert found.model.path == "p"
    assert json.loads(found.model.key)["storage_key"] == "k"


@pytest.mark.parametrize("name", ["auto", "triton", "mlserver", "keras", "litert"])
def test_the_serving_pod_makes_out_what_other_names_mean(name: str) -> None:
    found = applied(isvc({"model": onnx(modelFormat={"name": name})}))
    assert (found.model.model_type, found.warnings) == (name, ())


def test_a_formats_name_is_lower_case() -> None:
    assert applied(isvc({"model": onnx(modelFormat={"name": "ONNX"})})).model.model_type == "onnx"


def test_the_id_is_the_hash_of_the_predictors_spec() -> None:
    predictor = {"model": onnx()}
    canonical = json.dumps(predictor, sort_keys=True, separators=(",", ":"))
    expected = "iris__isvc-" + hashlib.sha1(canonical.encode()).hexdigest()[:10]
    assert applied(isvc(predictor)).model.model_id == expected


@pytest.mark.parametrize(
    "changed",
    [
        pytest.param(isvc({"model": onnx(storageUri="s3://bucket/other")}), id="the artifact"),
        pytest.param(isvc({"model": onnx(modelFormat={"name": "sklearn"})}), id="the format"),
        pytest.param(isvc({"model": onnx(env=[{"name": "A", "value": "1"}])}), id="any field"),
        pytest.param(
            isvc(annotations={"serving.kserve.io/secretKey": "k"}), id="the secret it is read with"
        ),
        pytest.param(isvc(annotations={"mesh.serving/revision": "2"}), id="its revision"),
        pytest.param(isvc(name="other"), id="the name"),
    ],
)
def test_another_model_has_another_id(changed: dict[str, object]) -> None:
    assert applied(changed).model.model_id != applied(isvc()).model.model_id


@pytest.mark.parametrize(
    "same",
    [
        pytest.param(isvc({"model": onnx(), "minReplicas": 3}), id="more copies"),
        pytest.param(isvc({"model": onnx(), "canaryTrafficPercent": 10}), id="traffic"),
        pytest.param(isvc({"model": onnx(), "batcher": {"maxBatchSize": 8}}), id="a batcher"),
        pytest.param(isvc(annotations={"mesh.serving/max-batch-size": "0"}), id="none of that"),
        pytest.param(isvc({"model": onnx(), "volumes": None}), id="a null"),
        pytest.param(isvc(labels={"team": "a"}), id="a label"),
        pytest.param(isvc(annotations={"mesh.serving/pin": "true"}), id="a pin"),
        pytest.param(isvc(resourceVersion="12", uid="x"), id="what the API server wrote"),
    ],
)
def test_the_same_model_otherwise_kept_has_the_same_id(same: dict[str, object]) -> None:
    assert applied(same).model.model_id == applied(isvc()).model.model_id


@pytest.mark.parametrize(("replicas", "copies"), [(None, 0), (0, 0), (1, 0), (2, 2), (7, 7)])
def test_minimum_replicas(replicas: int | None, copies: int) -> None:
    found = applied(isvc({"model": onnx(), "minReplicas": replicas}))
    assert found.model.min_copies == copies
    assert not found.model.pinned
    assert found.warnings == ()


@pytest.mark.parametrize(
    ("batcher", "annotations", "expected"),
    [
        pytest.param(None, {}, (None, None), id="nothing: the instance finds out"),
        pytest.param({"maxBatchSize": 16, "maxLatency": 5}, {}, (16, 5), id="KServe's batcher"),
        pytest.param({}, {}, (32, None), id="an empty one has KServe's rows, and nobody waits"),
        pytest.param({"maxBatchSize": 0}, {}, (0, None), id="switched off there"),
        pytest.param(None, {"max-batch-size": "0"}, (0, None), id="switched off by annotation"),
        pytest.param(None, {"max-batch-latency": "2ms"}, (None, 2), id="a time"),
        pytest.param(
            {"maxBatchSize": 16, "maxLatency": 5},
            {"max-batch-size": "4", "max-batch-latency": "0"},
            (4, 0),
            id="annotations come first",
        ),
    ],
)
def test_joining_requests(
    batcher: dict[str, int] | None,
    annotations: dict[str, str],
    expected: tuple[int | None, int | None],
) -> None:
    predictor = {"model": onnx(), **({} if batcher is None else {"batcher": batcher})}
    ours = {f"mesh.serving/{name}": value for name, value in annotations.items()}
    found = applied(isvc(predictor, annotations=ours))
    assert (found.model.max_batch_size, found.model.max_batch_latency_ms) == expected
    assert found.warnings == ()


def test_our_annotations() -> None:
    found = applied(
        isvc(
            annotations={
                "mesh.serving/pin": "true",
                "mesh.serving/model-size": "200Mi",
                "mesh.serving/max-concurrency": "8",
                "mesh.serving/load-timeout": "1m30s",
            },
            labels={"team": "fraud"},
        )
    ).model
    assert (found.pinned, found.size_bytes_stated) == (True, 200 * 2**20)
    assert (found.max_concurrency, found.load_timeout_ms) == (8, 90_000)
    assert found.labels == {"team": "fraud"}


@pytest.mark.parametrize(
    ("annotations", "fields"),
    [
        pytest.param({}, (None, (), ()), id="none: the policy's"),
        pytest.param({"idle-unload-after": "10m"}, (600_000, (), ()), id="idle for ten minutes"),
        pytest.param({"idle-unload-after": "0"}, (0, (), ()), id="never"),
        pytest.param({"idle-unload-after": "0s"}, (0, (), ()), id="never, as a duration"),
        pytest.param({"required-labels": "gpu"}, (None, ("gpu",), ()), id="one required label"),
        pytest.param(
            {"required-labels": "gpu, big,gpu", "preferred-labels": "zone/a"},
            (None, ("gpu", "big"), ("zone/a",)),
            id="several, each once, blanks aside",
        ),
        pytest.param({"preferred-labels": " "}, (None, (), ()), id="an empty list is none"),
    ],
)
def test_where_a_model_may_be_and_how_long_it_stays_unused(
    annotations: dict[str, str], fields: tuple[int | None, tuple[str, ...], tuple[str, ...]]
) -> None:
    plain = applied(isvc()).model
    found = applied(isvc(annotations={f"mesh.serving/{k}": v for k, v in annotations.items()}))
    model = found.model
    assert (model.idle_unload_ms, model.required_labels, model.preferred_labels) == fields
    assert model.model_id == plain.model_id  # nothing is loaded anew for it
    assert found.warnings == ()


def test_kserves_annotations_for_the_uri_form() -> None:
    found = applied(
        isvc(
            annotations={
                "serving.kserve.io/secretKey": "localMinIO",
                "serving.kserve.io/schemaPath": "a/schema.json",
            }
        )
    )
    key = json.loads(found.model.key)
    assert (key["storage_key"], key["schema_path"]) == ("localMinIO", "a/schema.json")
    assert found.warnings == ()


def test_what_the_storage_says_goes_before_what_an_annotation_says() -> None:
    resource = isvc(
        {"model": {"modelFormat": {"name": "onnx"}, "storage": {"key": "mine", "path": "p"}}},
        annotations={"serving.kserve.io/secretKey": "other"},
    )
    assert json.loads(applied(resource).model.key)["storage_key"] == "mine"


def test_the_resource_is_kept_as_applied_without_what_the_api_server_wrote() -> None:
    annotations = {"a": "b"}
    resource = isvc(
        managedFields=[{"manager": "x"}],
        resourceVersion="12",
        generation=3,
        finalizers=["f"],
        creationTimestamp="2026-01-01T00:00:00Z",
        annotations={**annotations, "kubectl.kubernetes.io/last-applied-configuration": "{}"},
        uid="u",
    )
    resource["status"] = {"url": "http://x"}
    expected = isvc(annotations=annotations, uid="u")
    assert json.loads(applied(resource).alias.manifest) == expected
    assert "status" in resource and "managedFields" in resource["metadata"]  # not ours to change


def test_no_maximum_of_replicas_is_written_as_zero() -> None:
    found = applied(isvc({"model": onnx(), "minReplicas": 2, "maxReplicas": 0}))
    assert found.model.min_copies == 2
    assert found.warnings == ("spec.predictor.maxReplicas: kept, not acted on",)


@pytest.mark.parametrize(
    ("predictor", "secret_key"),
    [
        pytest.param({"model": onnx()}, "", id="a URI alone"),
        pytest.param({"onnx": {"storage": {"key": "k", "path": "p"}}}, "k", id="named"),
        pytest.param({"onnx": {"storage": {"path": "p"}}}, "default", id="not named"),
        pytest.param(
            {"onnx": {"storage": {"path": "p", "parameters": {"type": "s3"}}}}, "", id="type"
        ),
        pytest.param({"onnx": {"storage": {"path": "s3://b/p"}}}, "", id="a URI as path"),
    ],
)
def test_what_the_storage_secret_must_have(predictor: dict[str, object], secret_key: str) -> None:
    assert applied(isvc(predictor)).secret_key == secret_key


def test_a_runtime_is_named_by_its_field_or_else_by_the_annotation() -> None:
    annotations = {"serving.kserve.io/servingRuntime": "b"}
    by_field = applied(isvc({"model": onnx(runtime="a")}, annotations=annotations))
    by_annotation = applied(isvc(annotations=annotations))
    assert (by_field.wish.runtime, by_annotation.wish.runtime) == ("a", "b")
    assert by_annotation.model.model_id != applied(isvc()).model.model_id


def test_who_chooses_runtimes_is_not_warned_of_their_names() -> None:
    assert parse_resource(isvc({"model": onnx(runtime="a")}), chooses_runtimes=True).warnings == ()
