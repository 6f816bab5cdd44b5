"""A ServingRuntime as the controller reads it: what it says of pods, and why it may get none. Pure.

A wrong number is InvalidArgument with the field's path where it is asked for; ``refusal`` turns
it, and what the mesh makes no pods for, into a reason that an event can carry.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from mesh.core.errors import InvalidArgument
from mesh.manifest_fields import wrong
from mesh.reconciler.kube_resources import CLUSTER_SERVING_RUNTIMES, Obj
from mesh.serving_runtime import ServingRuntime, parse_serving_runtime

IDLE_AFTER: Final = "mesh.serving/scale-to-zero-after"
KSERVE: Final = "serving.kserve.io/"
# Servers that a serving pod speaks to itself (mesh.runtimes.external_choice).
ADAPTED: Final = frozenset({"mlserver", "triton"})
_DEFAULT_UTILIZATION: Final = 80  # per cent; KServe's default for autoscaling by CPU
_SCALE_MAX: Final = 10_000


@dataclass(frozen=True, slots=True)
class Autoscale:
    """What the annotations of ``autoscalerClass: hpa`` ask for; ``metric`` is cpu or memory."""

    minimum: int
    maximum: int
    metric: str = "cpu"
    utilization: int = _DEFAULT_UTILIZATION  # per cent of the request


@dataclass(frozen=True, slots=True)
class RuntimeSource:
    """A runtime's resource as the API server has it, and what it says. ``of`` reads it."""

    resource: Obj
    runtime: ServingRuntime

    @classmethod
    def of(cls, resource: Obj) -> RuntimeSource:
        """Raises InvalidArgument."""
        return cls(resource, parse_serving_runtime(resource))

    @property
    def name(self) -> str:
        return self.runtime.name

    @property
    def is_cluster_wide(self) -> bool:
        return bool(self.resource["kind"] == CLUSTER_SERVING_RUNTIMES.kind)

    @property
    def spec(self) -> Mapping[str, Any]:
        spec: Mapping[str, Any] = self.resource["spec"]
        return spec

    @property
    def annotations(self) -> Mapping[str, str]:
        return self.resource["metadata"].get("annotations") or {}

    @property
    def replicas(self) -> int | None:
        """What the resource says; None: as the controller's configuration has it."""
        value = self.spec.get("replicas")
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= _SCALE_MAX:
            raise wrong("spec.replicas", f"a whole number from 0 to {_SCALE_MAX}", value)
        return value

    @property
    def autoscale(self) -> Autoscale | None:
        """None without ``autoscalerClass: hpa``, as in ModelMesh. Raises InvalidArgument."""
        if self.annotations.get(f"{KSERVE}autoscalerClass") != "hpa":
            return None
        minimum = self._scale("min-scale", 1, 1, _SCALE_MAX)
        metric = self.annotations.get(f"{KSERVE}metrics", "cpu")
        if metric not in ("cpu", "memory"):
            raise wrong(_annotation("metrics"), "cpu or memory", metric)
        return Autoscale(
            minimum,
            max(minimum, self._scale("max-scale", minimum, 1, _SCALE_MAX)),
            metric,
            self._scale("targetUtilizationPercentage", _DEFAULT_UTILIZATION, 1, 100),
        )

    def _scale(self, key: str, default: int, low: int, high: int) -> int:
        text = self.annotations.get(KSERVE + key)
        if text is None:
            return default
        if not (text.isascii() and text.isdigit() and low <= int(text) <= high):
            raise wrong(_annotation(key), f'a whole number from {low} to {high} ("{low}")', text)
        return int(text)


def _annotation(key: str) -> str:
    return f"metadata.annotations[{KSERVE}{key}]"


@dataclass(frozen=True, slots=True)
class Refused:
    """Why there are no pods for a runtime: ``reason`` is a word for an event."""

    reason: str
    message: str


def refusal(source: RuntimeSource) -> Refused | None:
    """Why no pods are made for a runtime; None: they are."""
    runtime = source.runtime
    if runtime.disabled:
        return Refused("RuntimeDisabled", f"{runtime.name} is disabled")
    if not runtime.multi_model:
        return Refused(
            "SingleModelRuntime",
            f"{runtime.name} serves one model per server (multiModel is not true): "
            "the mesh makes no pods for it",
        )
    adapter = runtime.adapter
    if adapter is not None and adapter.server_type not in ADAPTED:
        return Refused(
            "ServerTypeUnsupported",
            f"spec.builtInAdapter.serverType: no adapter for {adapter.server_type!r}; there are "
            f"{', '.join(sorted(ADAPTED))}, or name an mmesh.ModelRuntime by spec.grpcEndpoint",
        )
    try:
        _ = (source.replicas, source.autoscale)
    except InvalidArgument as error:
        return Refused("InvalidRuntime", error.message)
    return None
