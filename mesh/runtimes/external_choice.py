"""Which external runtime a pod has: from its ServingRuntime and what the operator says beside it.

Makes the parts and connects to nothing yet (``ExternalRuntimes.start`` does). What no adapter
exists for is InvalidArgument with the field's name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Final

from mesh.core.errors import InvalidArgument
from mesh.formats import DETECTED
from mesh.runtimes.external import (
    ExternalRuntimes,
    ExternalTimes,
    default_endpoint,
    disk_size_bytes,
)
from mesh.runtimes.external_layouts import MLServerLayout, TritonLayout
from mesh.runtimes.v2_repository import AdapterSettings, Layout, V2Repository, server_name
from mesh.serving_runtime import BuiltInAdapter, ModelFormat, ServingRuntime
from mesh.wire.client import Channel

_LAYOUTS: Final[Mapping[str, type[Layout]]] = {"mlserver": MLServerLayout, "triton": TritonLayout}
# Where the servers listen with gRPC in KServe's own resources (ModelMesh's RUNTIME_PORT).
_SERVER_PORT: Final = "8001"


def adapted(adapter: str) -> ServingRuntime:
    """What stands for a ServingRuntime where the operator names only the adapter. Raises
    InvalidArgument."""
    layout = _LAYOUTS.get(adapter)
    if layout is None:
        raise InvalidArgument(f"--adapter: expected {' or '.join(_LAYOUTS)}; found {adapter!r:.60}")
    formats = tuple(ModelFormat(name) for name in (*layout().formats, *DETECTED))
    return ServingRuntime(adapter, formats, adapter=BuiltInAdapter(adapter))


def external_runtimes(
    manifest: ServingRuntime,
    *,
    endpoint: str = "",
    data_endpoint: str = "",
    adapter: str = "",
    capacity_bytes: int = 1 << 30,
    env: Mapping[str, str] | None = None,
    times: ExternalTimes | None = None,
) -> ExternalRuntimes | None:
    """What serves the manifest's models, None where that is the pod itself.

    ``endpoint``, ``data_endpoint`` and ``adapter`` (``mlserver``, ``triton``) count over the
    manifest. ``env`` are an adapter's variables (``AdapterSettings.from_environment``), those of
    the manifest go first; ``capacity_bytes`` is its room where nobody says.
    """
    if not (endpoint or adapter or manifest.is_external):
        return None
    said = manifest.adapter or BuiltInAdapter(adapter)
    kind = adapter or (manifest.adapter.server_type if manifest.adapter is not None else "")
    if not kind:
        endpoint = endpoint or manifest.endpoint or default_endpoint()
        data = data_endpoint or manifest.data_endpoint or endpoint
        return ExternalRuntimes.at(manifest.model_types, endpoint, data, times=times)
    layout = _LAYOUTS.get(kind)
    if layout is None:
        raise InvalidArgument(
            f"spec.builtInAdapter.serverType: no adapter for {kind!r} here; there are "
            f"{', '.join(_LAYOUTS)}, or run {kind} behind its own mmesh.ModelRuntime adapter and "
            "name that by grpcEndpoint"
        )
    variables = {**(env or {}), **said.env}
    # grpcEndpoint would be the adapter's own; there is none between us and the server.
    data = data_endpoint or manifest.data_endpoint or endpoint
    data = data or f"127.0.0.1:{variables.get('RUNTIME_PORT') or _SERVER_PORT}"
    if not endpoint:
        port = said.management_port
        endpoint = f"127.0.0.1:{port}" if port else data
    if manifest.memory_request_bytes and "CONTAINER_MEM_REQ_BYTES" not in variables:
        variables["CONTAINER_MEM_REQ_BYTES"] = str(manifest.memory_request_bytes)
    if said.memory_buffer_bytes is not None:
        variables["MEM_BUFFER_BYTES"] = str(said.memory_buffer_bytes)
    settings = AdapterSettings.from_environment(variables, capacity_bytes=capacity_bytes)
    if said.loading_timeout_ms is not None:
        settings = replace(settings, loading_timeout_ms=said.loading_timeout_ms)
    repository = V2Repository(Channel(endpoint), settings, layout(), disk_size_bytes)
    return ExternalRuntimes(
        manifest.model_types, repository, Channel(data), times=times, server_name=server_name
    )
