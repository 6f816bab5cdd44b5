"""What kinds of object the controller talks about, and their paths in the Kubernetes API.

Objects themselves stay plain JSON dicts (``Obj``): the generated models cost some ten times the
memory, drop fields that they do not know, and have none of ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import quote

Obj = dict[str, Any]
# Namespace ("" for a cluster-wide object) and name.
Key = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Resource:
    """One kind of object, as the API server files it."""

    group: str  # "" is the core group
    version: str
    plural: str
    kind: str
    namespaced: bool = True

    @property
    def api_version(self) -> str:
        return f"{self.group}/{self.version}" if self.group else self.version

    def __str__(self) -> str:
        return f"{self.plural}.{self.group}" if self.group else self.plural

    def path(self, namespace: str | None = None, name: str = "", subresource: str = "") -> str:
        """The path of one object, or of all of a namespace (None: of all namespaces)."""
        parts = ["apis", self.group] if self.group else ["api"]
        parts.append(self.version)
        if self.namespaced and namespace:
            parts += ["namespaces", namespace]
        parts.append(self.plural)
        parts += [part for part in (name, subresource) if part]
        return "/" + "/".join(quote(part, safe="") for part in parts)


_SERVING: Final = "serving.kserve.io"
INFERENCE_SERVICES: Final = Resource(_SERVING, "v1beta1", "inferenceservices", "InferenceService")
PREDICTORS: Final = Resource(_SERVING, "v1alpha1", "predictors", "Predictor")
SERVING_RUNTIMES: Final = Resource(_SERVING, "v1alpha1", "servingruntimes", "ServingRuntime")
CLUSTER_SERVING_RUNTIMES: Final = Resource(
    _SERVING, "v1alpha1", "clusterservingruntimes", "ClusterServingRuntime", namespaced=False
)
INFERENCE_GRAPHS: Final = Resource(_SERVING, "v1alpha1", "inferencegraphs", "InferenceGraph")
NAMESPACES: Final = Resource("", "v1", "namespaces", "Namespace", namespaced=False)
SECRETS: Final = Resource("", "v1", "secrets", "Secret")
CONFIG_MAPS: Final = Resource("", "v1", "configmaps", "ConfigMap")
PODS: Final = Resource("", "v1", "pods", "Pod")
SERVICES: Final = Resource("", "v1", "services", "Service")
SERVICE_ACCOUNTS: Final = Resource("", "v1", "serviceaccounts", "ServiceAccount")
EVENTS: Final = Resource("", "v1", "events", "Event")
DEPLOYMENTS: Final = Resource("apps", "v1", "deployments", "Deployment")
BUDGETS: Final = Resource("policy", "v1", "poddisruptionbudgets", "PodDisruptionBudget")
AUTOSCALERS: Final = Resource(
    "autoscaling", "v2", "horizontalpodautoscalers", "HorizontalPodAutoscaler"
)
LEASES: Final = Resource("coordination.k8s.io", "v1", "leases", "Lease")


def key_of(obj: Obj) -> Key:
    """Namespace ("" for cluster-wide) and name of an object."""
    metadata = obj["metadata"]
    return metadata.get("namespace", ""), metadata["name"]
