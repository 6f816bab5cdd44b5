"""KServe's ``ServingRuntime`` and ``ClusterServingRuntime``: what a pod's runtime is and serves.

Pure reading of one manifest into a frozen value; starts nothing and connects to nothing. A wrong
field is ``InvalidArgument`` with its full path, what was expected and what was found, as in
``mesh.manifest``; what the pod spec says of containers and scheduling is kept, not acted on.

A format that is listed is a format that the operator allows, also where its files are code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

from mesh.core.errors import InvalidArgument
from mesh.manifest_fields import Fields, wrong
from mesh.quantity import parse_quantity

API_VERSION: Final = "serving.kserve.io/v1alpha1"
KINDS: Final = ("ServingRuntime", "ClusterServingRuntime")
SERVER_TYPES: Final = ("triton", "mlserver", "ovms", "torchserve")
PICKLE_FORMATS: Final = frozenset({"pickle", "joblib"})
PYTHON_FORMAT: Final = "python"

# What says how the server's pods are made.
_POD_FIELDS: Final = frozenset(
    (
        *("workerSpec", "containers", "volumes", "nodeSelector", "affinity", "tolerations"),
        *("imagePullSecrets", "hostIPC", "schedulerName", "resourceClaims", "labels"),
        *("annotations", "serviceAccountName", "replicas", "httpDataEndpoint", "securityContext"),
    )
)
_FORMATS_MAX: Final = 1_000


@dataclass(frozen=True, slots=True)
class ModelFormat:
    """One entry of ``supportedModelFormats``; ``priority`` is None where none is given."""

    name: str
    version: str = ""
    auto_select: bool = False
    priority: int | None = None


@dataclass(frozen=True, slots=True)
class BuiltInAdapter:
    """``builtInAdapter``: the server is not a ModelRuntime, and the pod speaks its own API."""

    server_type: str
    management_port: int | None = None
    memory_buffer_bytes: int | None = None
    loading_timeout_ms: int | None = None
    env: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ServingRuntime:
    """``endpoint`` and ``data_endpoint`` are addresses as ``mesh.wire`` takes them, "" where the
    manifest names none. ``memory_request_bytes``: of the container with the model server."""

    name: str
    formats: tuple[ModelFormat, ...]
    multi_model: bool = False
    disabled: bool = False
    protocol_versions: tuple[str, ...] = ()
    endpoint: str = ""
    data_endpoint: str = ""
    adapter: BuiltInAdapter | None = None
    storage_helper_disabled: bool = False
    memory_request_bytes: int | None = None
    warnings: tuple[str, ...] = ()

    @property
    def model_types(self) -> tuple[str, ...]:
        """Names of formats, each once, in the manifest's order."""
        return tuple(dict.fromkeys(one.name for one in self.formats))

    @property
    def allows_pickle(self) -> bool:
        return not PICKLE_FORMATS.isdisjoint(self.model_types)

    @property
    def allows_python(self) -> bool:
        return PYTHON_FORMAT in self.model_types

    @property
    def is_external(self) -> bool:
        """Whether models run in a server beside the pod and not in it."""
        return bool(self.endpoint) or self.adapter is not None


def runtime_label(name: str) -> str:
    """The label that every instance of a runtime has, in ModelMesh's form."""
    return f"rt:{name}"


def parse_serving_runtime(resource: object) -> ServingRuntime:
    """Read one resource. Raises InvalidArgument."""
    warnings: list[str] = []
    top = Fields(resource, "", warnings)
    top.text("kind", required=" or ".join(KINDS), choices=KINDS)
    top.text("apiVersion", required=API_VERSION, choices=(API_VERSION,))
    name = top.fields("metadata", expected="a mapping with a name").text(
        "name", required="the runtime's name"
    )
    spec = top.fields("spec", expected="a mapping with supportedModelFormats")
    formats = tuple(_format(one) for one in _list_of(spec, "supportedModelFormats", warnings))
    if not formats:
        raise wrong(spec.at("supportedModelFormats"), "at least one format", None)
    adapter = spec.optional_fields("builtInAdapter")
    helper = spec.optional_fields("storageHelper")
    found = ServingRuntime(
        name=name,
        formats=formats,
        multi_model=_flag(spec, "multiModel"),
        disabled=_flag(spec, "disabled"),
        protocol_versions=_texts(spec, "protocolVersions"),
        endpoint=_endpoint(spec, "grpcEndpoint"),
        data_endpoint=_endpoint(spec, "grpcDataEndpoint"),
        adapter=_adapter(adapter) if adapter is not None else None,
        storage_helper_disabled=_flag(helper, "disabled") if helper is not None else False,
        memory_request_bytes=_memory(spec, adapter, warnings),
    )
    if helper is not None:
        helper.close()
    spec.close(_POD_FIELDS)
    top.close({"status"})
    return replace(found, warnings=tuple(warnings))


def _format(fields: Fields) -> ModelFormat:
    one = ModelFormat(
        name=fields.text("name", required="the format's name").lower(),
        version=fields.text("version"),
        auto_select=_flag(fields, "autoSelect"),
        priority=fields.integer("priority", minimum=1),
    )
    fields.close()
    return one


def _adapter(fields: Fields) -> BuiltInAdapter:
    buffer_bytes = fields.integer("memBufferBytes", minimum=0)
    found = BuiltInAdapter(
        server_type=fields.text(
            "serverType", required=f"one of {', '.join(SERVER_TYPES)}", choices=SERVER_TYPES
        ),
        management_port=_port(fields, "runtimeManagementPort"),
        memory_buffer_bytes=buffer_bytes,
        loading_timeout_ms=fields.integer("modelLoadingTimeoutMillis", minimum=100),
        env=_env(fields),
    )
    fields.close()
    return found


def _port(fields: Fields, key: str) -> int | None:
    port = fields.integer(key, minimum=1)
    if port is not None and port > 65_535:
        raise wrong(fields.at(key), "a port (1 to 65535)", port)
    return port


def _env(fields: Fields) -> dict[str, str]:
    """Values from elsewhere (``valueFrom``) are the cluster's to resolve and are left out."""
    warnings: list[str] = []
    return {
        one.text("name", required="the variable's name"): one.text("value")
        for one in _list_of(fields, "env", warnings)
    }


def _endpoint(fields: Fields, key: str) -> str:
    text = fields.text(key)
    kind, colon, rest = text.partition(":")
    if not text:
        return ""
    if kind == "unix" and rest.startswith("/"):
        # Kubernetes' examples write unix:/path and unix:///path.
        return "unix:/" + rest.lstrip("/")
    if kind == "port" and colon and rest.isascii() and rest.isdigit() and 0 < int(rest) <= 65_535:
        return f"127.0.0.1:{int(rest)}"
    raise wrong(fields.at(key), '"port:NUMBER" or "unix:/PATH"', text)


def _memory(spec: Fields, adapter: Fields | None, warnings: list[str]) -> int | None:
    """Of the model server's container: the one named like the server, else the only one."""
    containers = _list_of(spec, "containers", warnings)
    wanted = adapter.raw.get("serverType") if adapter is not None else None
    chosen = [one for one in containers if one.raw.get("name") == wanted] or containers
    if len(chosen) != 1 or not isinstance(chosen[0].raw.get("resources"), dict):
        return None
    resources = chosen[0].fields("resources")
    for key in ("requests", "limits"):
        amounts = resources.optional_fields(key)
        memory = amounts.take("memory") if amounts is not None else None
        if amounts is not None and memory is not None:
            return parse_quantity(str(memory), amounts.at("memory"))
    return None


def _flag(fields: Fields, key: str) -> bool:
    value = fields.take(key)
    if value is None:
        return False
    if not isinstance(value, bool):
        raise wrong(fields.at(key), "true or false", value)
    return value


def _texts(fields: Fields, key: str) -> tuple[str, ...]:
    value = fields.take(key)
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        raise wrong(fields.at(key), "a list of strings", value)
    return tuple(value)


def _list_of(fields: Fields, key: str, warnings: list[str]) -> list[Fields]:
    value: Any = fields.take(key)
    if value is None:
        return []
    if not isinstance(value, list):
        raise wrong(fields.at(key), "a list of mappings", value)
    if len(value) > _FORMATS_MAX:
        raise InvalidArgument(f"{fields.at(key)}: expected at most {_FORMATS_MAX} entries")
    return [Fields(one, f"{fields.at(key)}[{at}]", warnings) for at, one in enumerate(value)]
