"""ServingRuntimes are read, and a wrong field is an error with its path."""

from __future__ import annotations

from typing import Any

import pytest

from mesh.core.errors import InvalidArgument
from mesh.serving_runtime import BuiltInAdapter, ModelFormat, parse_serving_runtime

FORMATS = [{"name": "sklearn", "version": "1", "autoSelect": True, "priority": 2}]


def runtime(kind: str = "ServingRuntime", **spec: Any) -> dict[str, Any]:
    return {
        "apiVersion": "serving.kserve.io/v1alpha1",
        "kind": kind,
        "metadata": {"name": "rt"},
        "spec": {"supportedModelFormats": FORMATS, **spec},
    }


def test_a_runtime_with_an_adapter_is_read_whole() -> None:
    found = parse_serving_runtime(
        runtime(
            "ClusterServingRuntime",
            multiModel=True,
            protocolVersions=["grpc-v2"],
            grpcEndpoint="port:8085",
            grpcDataEndpoint="unix:///tmp/data.sock",
            storageHelper={"disabled": True},
            containers=[
                {"name": "proxy"},
                {"name": "triton", "resources": {"requests": {"memory": "1Gi"}}},
            ],
            builtInAdapter={
                "serverType": "triton",
                "runtimeManagementPort": 8001,
                "memBufferBytes": 134217728,
                "modelLoadingTimeoutMillis": 90000,
                "env": [{"name": "LOADING_CONCURRENCY", "value": "2"}],
            },
        )
    )
    assert found.formats == (ModelFormat("sklearn", "1", True, 2),)
    assert (found.endpoint, found.data_endpoint) == ("127.0.0.1:8085", "unix:/tmp/data.sock")
    assert found.adapter == BuiltInAdapter(
        "triton", 8001, 134217728, 90000, {"LOADING_CONCURRENCY": "2"}
    )
    assert (found.multi_model, found.disabled, found.storage_helper_disabled) == (True, False, True)
    assert (found.memory_request_bytes, found.protocol_versions) == (1 << 30, ("grpc-v2",))
    assert found.is_external


@pytest.mark.parametrize(
    ("names", "pickle", "python"),
    [(["onnx"], False, False), (["joblib"], True, False), (["Pickle", "python"], True, True)],
)
def test_a_listed_format_is_allowed(names: list[str], pickle: bool, python: bool) -> None:
    found = parse_serving_runtime(runtime(supportedModelFormats=[{"name": name} for name in names]))
    assert (found.allows_pickle, found.allows_python, found.is_external) == (pickle, python, False)


def test_an_unknown_field_is_named_in_a_warning() -> None:
    found = parse_serving_runtime(runtime(colour="red", nodeSelector={}))
    assert found.warnings == (
        "spec.colour: unknown field, ignored",
        "spec.nodeSelector: kept, not acted on",
    )


@pytest.mark.parametrize(
    ("resource", "path"),
    [
        ([], ""),
        ({**runtime(), "kind": "Deployment"}, "kind"),
        ({**runtime(), "apiVersion": "v1"}, "apiVersion"),
        ({**runtime(), "metadata": {}}, "metadata.name"),
        ({**runtime(), "spec": None}, "spec"),
        (runtime(supportedModelFormats=[]), "spec.supportedModelFormats"),
        (runtime(supportedModelFormats={}), "spec.supportedModelFormats"),
        (runtime(supportedModelFormats=[1]), "spec.supportedModelFormats[0]"),
        (
            runtime(supportedModelFormats=[*FORMATS, {"name": "a", "priority": 0}]),
            "spec.supportedModelFormats[1].priority",
        ),
        (
            runtime(supportedModelFormats=[{"name": "a", "autoSelect": "yes"}]),
            "spec.supportedModelFormats[0].autoSelect",
        ),
        (runtime(multiModel=1), "spec.multiModel"),
        (runtime(protocolVersions=[2]), "spec.protocolVersions"),
        (runtime(grpcEndpoint="8085"), "spec.grpcEndpoint"),
        (runtime(grpcEndpoint="port:0"), "spec.grpcEndpoint"),
        (runtime(grpcDataEndpoint="unix:relative"), "spec.grpcDataEndpoint"),
        (runtime(builtInAdapter={}), "spec.builtInAdapter.serverType"),
        (runtime(builtInAdapter={"serverType": "x"}), "spec.builtInAdapter.serverType"),
        (
            runtime(builtInAdapter={"serverType": "triton", "runtimeManagementPort": 70000}),
            "spec.builtInAdapter.runtimeManagementPort",
        ),
        (
            runtime(builtInAdapter={"serverType": "triton", "env": [{"value": "1"}]}),
            "spec.builtInAdapter.env[0].name",
        ),
        (runtime(storageHelper={"disabled": "no"}), "spec.storageHelper.disabled"),
    ],
)
def test_a_wrong_field_is_named_with_its_path(resource: object, path: str) -> None:
    with pytest.raises(InvalidArgument) as wrong:
        parse_serving_runtime(resource)
    assert wrong.value.message.startswith(f"{path}: expected ")
