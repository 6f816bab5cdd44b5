"""Which runtime a pod has, by its ServingRuntime and what the operator says beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mesh.core.errors import InvalidArgument
from mesh.instance.runtime_choice import choose_runtimes
from mesh.instance.settings import InstanceSettings
from mesh.runtimes import external
from mesh.runtimes.external import ExternalRuntimes
from mesh.runtimes.external_calls import ModelRuntimeClient
from mesh.runtimes.external_choice import adapted, external_runtimes
from mesh.runtimes.external_layouts import MLServerLayout, TritonLayout
from mesh.runtimes.v2_repository import AdapterSettings, V2Repository
from mesh.serving_runtime import ServingRuntime, parse_serving_runtime
from puller.settings import PullerSettings


def manifest(**spec: Any) -> ServingRuntime:
    return parse_serving_runtime(
        {
            "apiVersion": "serving.kserve.io/v1alpha1",
            "kind": "ServingRuntime",
            "metadata": {"name": "rt"},
            "spec": {"supportedModelFormats": [{"name": "onnx"}, {"name": "own"}], **spec},
        }
    )


def chosen(spec: dict[str, Any], **said: Any) -> ExternalRuntimes:
    found = external_runtimes(manifest(**spec), **said)
    assert found is not None
    return found


def adapter(kind: str, **fields: Any) -> dict[str, Any]:
    return {"builtInAdapter": {"serverType": kind, **fields}}


def settings_of(found: ExternalRuntimes) -> AdapterSettings:
    assert isinstance(found._management, V2Repository)
    return found._management._settings


def test_a_manifest_of_formats_alone_is_the_pod_itself() -> None:
    assert external_runtimes(manifest()) is None


@pytest.mark.parametrize(
    ("spec", "said", "management", "data"),
    [
        ({"grpcEndpoint": "port:8085"}, {}, "127.0.0.1:8085", "127.0.0.1:8085"),
        (
            {"grpcEndpoint": "unix:/tmp/rt.sock", "grpcDataEndpoint": "port:9"},
            {},
            "unix:/tmp/rt.sock",
            "127.0.0.1:9",
        ),
        ({"grpcEndpoint": "port:8085"}, {"endpoint": "h:1"}, "h:1", "h:1"),
        (
            {"grpcDataEndpoint": "port:9"},
            {"endpoint": "h:1", "data_endpoint": "h:2"},
            "h:1",
            "h:2",
        ),
    ],
    ids=["the manifest's", "with data elsewhere", "the operator's", "both the operator's"],
)
def test_a_runtime_of_its_own_is_spoken_to_where_it_is_said_to_be(
    spec: dict[str, Any], said: dict[str, Any], management: str, data: str
) -> None:
    found = chosen(spec, **said)
    assert isinstance(found._management, ModelRuntimeClient)
    assert (found._management.address, found._data.address) == (management, data)
    assert found.model_types == ("onnx", "own")
    assert found.runtime_for("own") is found


def test_modelmeshs_default_place_is_its_socket_and_then_its_port(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(external, "DEFAULT_SOCKET", tmp_path / "grpc.sock")
    assert external.default_endpoint() == "127.0.0.1:8085"
    (tmp_path / "grpc.sock").touch()
    assert external.default_endpoint() == f"unix:{tmp_path}/grpc.sock"


@pytest.mark.parametrize(
    ("kind", "layout"), [("mlserver", MLServerLayout), ("triton", TritonLayout)]
)
def test_a_server_with_an_adapter_is_spoken_to_by_its_repository(kind: str, layout: type) -> None:
    found = chosen(adapter(kind))
    assert isinstance(found._management, V2Repository)
    assert isinstance(found._management._layout, layout)
    assert found._management.address == found._data.address == "127.0.0.1:8001"


@pytest.mark.parametrize("kind", ["ovms", "torchserve"])
def test_a_server_without_an_adapter_is_refused_with_what_to_do(kind: str) -> None:
    with pytest.raises(InvalidArgument) as wrong:
        chosen(adapter(kind))
    assert wrong.value.message.startswith("spec.builtInAdapter.serverType: no adapter for ")
    assert "grpcEndpoint" in wrong.value.message
    # What speaks for it may be there in its place.
    assert chosen(adapter(kind), adapter="triton")


@pytest.mark.parametrize(
    ("spec", "said", "management", "data"),
    [
        (adapter("triton", runtimeManagementPort=9), {}, "127.0.0.1:9", "127.0.0.1:8001"),
        (
            {**adapter("triton", runtimeManagementPort=9), "grpcDataEndpoint": "port:7"},
            {},
            "127.0.0.1:9",
            "127.0.0.1:7",
        ),
        ({**adapter("triton"), "grpcEndpoint": "port:8085"}, {}, "127.0.0.1:8001", None),
        (adapter("triton"), {"endpoint": "h:1"}, "h:1", "h:1"),
        (adapter("triton"), {"env": {"RUNTIME_PORT": "6"}}, "127.0.0.1:6", "127.0.0.1:6"),
    ],
    ids=["management port", "data endpoint", "grpcEndpoint is the adapter's", "endpoint", "env"],
)
def test_where_a_server_with_an_adapter_is(
    spec: dict[str, Any], said: dict[str, Any], management: str, data: str | None
) -> None:
    found = chosen(spec, **said)
    assert found._management.address == management
    assert found._data.address == (data or management)


def test_a_manifests_fields_count_over_its_variables_and_these_over_the_pods() -> None:
    env = {"MEM_BUFFER_BYTES": "1", "LOADTIME_TIMEOUT": "1000", "LOADING_CONCURRENCY": "5"}
    own = [
        {"name": "LOADING_CONCURRENCY", "value": "3"},
        {"name": "DEFAULT_MODELSIZE", "value": "9"},
    ]
    spec = adapter("mlserver", memBufferBytes=100, modelLoadingTimeoutMillis=90_000, env=own)
    container = {"name": "mlserver", "resources": {"requests": {"memory": "1000"}}}
    found = settings_of(chosen({**spec, "containers": [container]}, env=env))
    assert found.capacity_bytes == 900
    assert (found.loading_timeout_ms, found.loading_concurrency) == (90_000, 3)
    assert found.default_model_size_bytes == 9


@pytest.mark.parametrize(
    ("kind", "formats"), [("mlserver", {"sklearn", "xgboost"}), ("triton", {"onnx", "python"})]
)
def test_an_adapter_is_enough_to_say(kind: str, formats: set[str]) -> None:
    found = external_runtimes(adapted(kind), endpoint="h:1")
    assert found is not None and isinstance(found._management, V2Repository)
    assert formats | {"auto", "triton", "mlserver"} <= set(found.model_types)
    assert found._management.address == found._data.address == "h:1"


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"adapter": "ovms"}, "--adapter: expected mlserver or triton; found 'ovms'"),
        ({"runtime_endpoint": "h:1"}, "--runtime-endpoint needs --serving-runtime FILE"),
    ],
)
async def test_what_does_not_say_which_runtime_is_refused(
    tmp_path: Path, said: dict[str, Any], words: str
) -> None:
    with pytest.raises(InvalidArgument) as wrong:
        await choose_runtimes(InstanceSettings(PullerSettings(cache_dir=tmp_path), **said))
    assert wrong.value.message.startswith(words)


# ---- the variables ------------------------------------------------------------------------------

CAPACITY = 7_000


def read(**env: str) -> AdapterSettings:
    return AdapterSettings.from_environment(env, capacity_bytes=CAPACITY)


def test_without_variables_modelmeshs_defaults_count() -> None:
    assert read() == AdapterSettings(
        root=Path("/models/_repository"),
        capacity_bytes=CAPACITY,
        loading_concurrency=1,
        loading_timeout_ms=30_000,
        default_model_size_bytes=1_000_000,
        size_multiplier=1.25,
        per_model_concurrency=0,
    )


@pytest.mark.parametrize(
    ("name", "value", "field", "expected"),
    [
        ("ROOT_MODEL_DIR", "/served", "root", Path("/served/_repository")),
        ("CONTAINER_MEM_REQ_BYTES", str(1 << 30), "capacity_bytes", (1 << 30) - (256 << 20)),
        ("MEM_BUFFER_BYTES", "5", "capacity_bytes", CAPACITY),
        ("LOADING_CONCURRENCY", "4", "loading_concurrency", 4),
        ("LOADTIME_TIMEOUT", "100", "loading_timeout_ms", 100),
        ("DEFAULT_MODELSIZE", "77", "default_model_size_bytes", 77),
        ("MODELSIZE_MULTIPLIER", "2.5", "size_multiplier", 2.5),
        ("LIMIT_PER_MODEL_CONCURRENCY", "8", "per_model_concurrency", 8),
    ],
)
def test_a_variable_changes_its_own_setting_alone(
    name: str, value: str, field: str, expected: object
) -> None:
    found = read(**{name: value})
    assert getattr(found, field) == expected
    others = [one for one in AdapterSettings.__dataclass_fields__ if one != field]
    assert [getattr(found, one) for one in others] == [getattr(read(), one) for one in others]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("LOADING_CONCURRENCY", "0"),
        ("LOADTIME_TIMEOUT", "99"),
        ("DEFAULT_MODELSIZE", "0"),
        ("CONTAINER_MEM_REQ_BYTES", "1Gi"),
        ("MEM_BUFFER_BYTES", "-1"),
        ("MODELSIZE_MULTIPLIER", "0"),
        ("MODELSIZE_MULTIPLIER", "nan"),
        ("LIMIT_PER_MODEL_CONCURRENCY", "³"),
    ],
)
def test_a_variable_that_is_no_number_in_range_is_refused_with_its_name(
    name: str, value: str
) -> None:
    with pytest.raises(InvalidArgument) as wrong:
        read(**{name: value})
    assert wrong.value.message.startswith(f"{name}: expected ")
    assert value in wrong.value.message


def test_a_buffer_that_leaves_nothing_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="leaves nothing for models"):
        read(CONTAINER_MEM_REQ_BYTES="100", MEM_BUFFER_BYTES="100")
