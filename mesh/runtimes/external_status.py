"""What an external runtime says of itself, and whether a pod can work with it. Pure.

A runtime with less room than a few models of its own default size, or with limits that no load
can keep, is refused at the start: every load would fail later, one after the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from mesh.core.errors import FailedPrecondition, MeshError
from mesh.protobuf_path import FieldPath, field_path
from protos import mmesh_pb2 as mmesh

_MIB: Final = 1 << 20
# Smaller models than that are not worth a check of their own; ModelMesh's default for adapters.
DEFAULT_MODEL_SIZE_BYTES: Final = 1_000_000
LOADING_TIMEOUT_MIN_MS: Final = 100
_METHODS_MAX: Final = 1_000


@dataclass(frozen=True, slots=True)
class RuntimeStatus:
    """``mmesh.RuntimeStatusResponse`` of a READY runtime. ``methods``: path (``/pkg.Service/M``)
    to where the model's id goes, or None where it goes by the header alone."""

    capacity_bytes: int
    max_loading_concurrency: int
    loading_timeout_ms: int
    default_model_size_bytes: int
    version: str = ""
    methods: Mapping[str, FieldPath | None] = field(default_factory=dict)
    limits_concurrency: bool = False
    allows_any_method: bool = False

    def permits(self, path: str) -> bool:
        return not self.methods or self.allows_any_method or path in self.methods


def read_status(message: mmesh.RuntimeStatusResponse) -> RuntimeStatus:
    """Raises InvalidArgument when a path of a method is none."""
    methods: dict[str, FieldPath | None] = {}
    for name in sorted(message.methodInfos)[:_METHODS_MAX]:
        numbers = list(message.methodInfos[name].idInjectionPath)
        where = f"runtimeStatus: methodInfos[{name!r:.100}].idInjectionPath"
        methods["/" + name.lstrip("/")] = field_path(numbers, where) if numbers else None
    return RuntimeStatus(
        capacity_bytes=message.capacityInBytes,
        max_loading_concurrency=message.maxLoadingConcurrency,
        loading_timeout_ms=message.modelLoadingTimeoutMs,
        default_model_size_bytes=message.defaultModelSizeInBytes or DEFAULT_MODEL_SIZE_BYTES,
        version=message.runtimeVersion,
        methods=methods,
        limits_concurrency=message.limitModelConcurrency,
        allows_any_method=message.allowAnyMethod,
    )


def minimum_capacity_bytes(default_model_size_bytes: int) -> int:
    """At least two models of the default size, and ten of them unless that is over 512 MiB."""
    return max(2 * default_model_size_bytes, min(512 * _MIB, 10 * default_model_size_bytes))


def shortcoming(status: RuntimeStatus) -> MeshError | None:
    """Why no pod can work with this runtime; all that is wrong at once."""
    wrong: list[str] = []
    least = minimum_capacity_bytes(status.default_model_size_bytes)
    if status.capacity_bytes < least:
        wrong.append(
            f"capacityInBytes is {status.capacity_bytes}; with defaultModelSizeInBytes "
            f"{status.default_model_size_bytes} it must be at least {least}"
        )
    if status.loading_timeout_ms < LOADING_TIMEOUT_MIN_MS:
        wrong.append(
            f"modelLoadingTimeoutMs is {status.loading_timeout_ms}; "
            f"at least {LOADING_TIMEOUT_MIN_MS}"
        )
    if status.max_loading_concurrency < 1:
        wrong.append("maxLoadingConcurrency is 0; at least 1")
    if not wrong:
        return None
    return FailedPrecondition("the runtime's runtimeStatus cannot be worked with: "
                              + "; ".join(wrong))  # fmt: skip
