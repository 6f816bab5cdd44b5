"""ModelMesh's own kind, with the fields it had and the ones they replaced."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import pytest

from mesh.core.errors import InvalidArgument
from mesh.core.types import ModelRecord
from mesh.manifest import AppliedModel, applied_uid, parse_manifests, parse_resource
from mesh.runtime_selection import RuntimeWish

MODELMESH_EXAMPLE = """
apiVersion: serving.kserve.io/v1alpha1
kind: Predictor
metadata:
  name: example-mnist-predictor
spec:
  modelType:
    name: sklearn
  path: sklearn/mnist-svm.joblib
  storage:
    s3:
      secretKey: modelStorage
      bucket: modelmesh-serving-examples
"""


def predictor(storage: object = None, /, **spec: object) -> dict[str, Any]:
    given = {"key": "k", "path": "p"} if storage is None else storage
    return {
        "apiVersion": "serving.kserve.io/v1alpha1",
        "kind": "Predictor",
        "metadata": {"name": "net"},
        "spec": {"modelType": {"name": "onnx"}, "storage": given, **spec},
    }


def read(resource: dict[str, Any]) -> AppliedModel:
    return parse_resource(resource, chooses_runtimes=True)


def test_the_modelmesh_example_with_its_deprecated_fields_is_taken_without_a_warning() -> None:
    (found,) = parse_manifests(MODELMESH_EXAMPLE, now_ms=5)
    model_id = found.model.model_id
    assert model_id.startswith("example-mnist-predictor__ksp-")
    assert found.model == ModelRecord(
        model_id=model_id,
        model_type="sklearn",
        path="sklearn/mnist-svm.joblib",
        key=found.model.key,
        auto_delete=True,
        created_at_ms=5,
    )
    assert json.loads(found.model.key) == {
        "storage_key": "modelStorage",
        "storage_params": {"bucket": "modelmesh-serving-examples"},
        "model_type": {"name": "sklearn"},
    }
    assert (found.alias.owner, found.secret_key, found.warnings) == ("ksp", "modelStorage", ())


NEW = {"key": "k", "path": "p", "schemaPath": "s", "parameters": {"bucket": "b"}}


@pytest.mark.parametrize(
    "old",
    [
        predictor({"s3": {"secretKey": "k", "bucket": "b"}}, path="p", schemaPath="s"),
        predictor({**NEW, "s3": {"secretKey": "k", "bucket": "b"}}, path="p", schemaPath="s"),
        predictor({"key": "k", "parameters": {"bucket": "b"}}, path="p", schemaPath="s"),
    ],
)
def test_a_deprecated_field_means_what_came_after_it(old: dict[str, Any]) -> None:
    new = read(predictor(NEW)).model
    found = read(old).model
    assert (found.path, found.key, found.model_type) == (new.path, new.key, new.model_type)


def test_a_claim_is_a_path_on_a_volume() -> None:
    claim = {"persistentVolumeClaim": {"claimName": "models", "readOnly": True}}
    found = read(predictor(claim, path="/nets/one"))
    assert (found.model.path, found.secret_key) == ("pvc://models/nets/one", "")
    assert found.warnings == ("spec.storage.persistentVolumeClaim.readOnly: kept, not acted on",)


def test_the_id_is_the_hash_of_the_spec() -> None:
    resource = predictor()
    canonical = json.dumps(resource["spec"], sort_keys=True, separators=(",", ":"))
    expected = "net__ksp-" + hashlib.sha1(canonical.encode()).hexdigest()[:10]
    assert read(resource).model.model_id == expected


def test_what_a_runtime_is_chosen_by() -> None:
    resource = predictor(
        modelType={"name": "ONNX", "version": "1.2"},
        protocolVersion="grpc-v2",
        runtime={"name": "triton-2.x"},
    )
    assert read(resource).wish == RuntimeWish("onnx", "1.2", "grpc-v2", "triton-2.x")
    assert read(resource).warnings == ()
    assert parse_resource(resource).warnings == ("spec.runtime.name: kept, not acted on",)


@pytest.mark.parametrize("gpu", ["required", "preferred"])
def test_a_wish_for_a_gpu_is_told_to_be_kept(gpu: str) -> None:
    (told,) = read(predictor(gpu=gpu)).warnings
    assert told.startswith("spec.gpu: kept, not acted on")


@pytest.mark.parametrize(
    ("resource", "path", "expected"),
    [
        ({**predictor(), "apiVersion": "serving.kserve.io/v1beta1"}, "apiVersion", "v1alpha1"),
        ({**predictor(), "spec": None}, "spec", "a mapping with a modelType"),
        (predictor(modelType=None), "spec.modelType", "a mapping with a name"),
        (predictor(modelType={}), "spec.modelType.name", "the format's name"),
        (predictor(modelType={"name": 1}), "spec.modelType.name", "a string"),
        ({**predictor(), "spec": {"modelType": {"name": "x"}}}, "spec.storage", "a mapping"),
        (predictor({"key": "k"}), "spec.storage.path", "the path of the model"),
        (predictor({"path": "a"}, path="b"), "spec.path", "only one of spec.path and spec.storage"),
        (predictor(gpu="yes"), "spec.gpu", "one of required, preferred"),
        (predictor(protocolVersion="v3"), "spec.protocolVersion", "one of v1, v2"),
        (predictor(runtime={}), "spec.runtime.name", "the runtime's name"),
        (predictor(runtime="x"), "spec.runtime", "a mapping"),
        (predictor({"path": "p", "s3": {}}), "spec.storage.s3.secretKey", "the key of the entry"),
        (
            predictor({"path": "p", "key": "a", "s3": {"secretKey": "b"}}),
            "spec.storage.key",
            "only one of spec.storage.key and spec.storage.s3.secretKey",
        ),
        (
            predictor(
                {
                    "path": "p",
                    "s3": {"secretKey": "b", "bucket": "x"},
                    "parameters": {"bucket": "y"},
                }
            ),
            "spec.storage.parameters.bucket",
            "or the same in both",
        ),
        (
            predictor({"path": "p", "persistentVolumeClaim": {}}),
            "spec.storage.persistentVolumeClaim.claimName",
            "the name of the claim",
        ),
        (
            predictor({"path": "p", "key": "k", "persistentVolumeClaim": {"claimName": "c"}}),
            "spec.storage.persistentVolumeClaim",
            "nothing beside a storage key",
        ),
    ],
)
def test_a_wrong_field_is_named(resource: dict[str, Any], path: str, expected: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        read(resource)
    assert caught.value.message.startswith(f"{path}: expected ")
    assert expected in caught.value.message


def test_an_unknown_field_is_a_warning() -> None:
    assert read(predictor(extra=1)).warnings == ("spec.extra: unknown field, ignored",)


def test_whose_a_resource_is_stands_in_its_manifest() -> None:
    resource = predictor()
    assert applied_uid(read(resource).alias.manifest) == ""
    resource["metadata"]["uid"] = "u-1"
    found = read(resource)
    assert (found.uid, applied_uid(found.alias.manifest)) == ("u-1", "u-1")


@pytest.mark.parametrize("text", ["", "x", "[]", "{}", '{"metadata":{"uid":3}}', '{"metadata":[]}'])
def test_a_manifest_without_a_uid_has_none(text: str) -> None:
    assert applied_uid(text) == ""
