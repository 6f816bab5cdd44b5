"""Methods that are for inside the mesh: a client that calls one at a router is refused."""

from __future__ import annotations

from typing import Final

from mesh.core.errors import MeshError, Unimplemented
from mesh.internal_calls import PATHS as INSTANCE_PATHS
from mesh.wire.calls import Method, ServerCall, Unary
from mesh.wire.head import RequestHead
from mesh.wire.messages import Metadata

# They have methods of their own in instances and runtimes.
_INTERNAL: Final = (
    *INSTANCE_PATHS,
    *(
        f"/mmesh.ModelRuntime/{rpc}"
        for rpc in ("loadModel", "unloadModel", "predictModelSize", "modelSize", "runtimeStatus")
    ),
)


def not_for_clients() -> dict[str, Method]:
    """Full path to method. They are refused like methods that are not there."""
    return dict.fromkeys(_INTERNAL, Unary(_never, accept=_refuse))


def _refuse(head: RequestHead) -> tuple[MeshError, Metadata]:
    return Unimplemented(f"Method not found or not permitted: {head.path}"), ()


def _never(call: ServerCall, message: bytes) -> None:
    raise AssertionError("refused before its message came")
