"""What Kubernetes objects a serving runtime needs. Pure.

Decides what they are; not how many pods there are (``plan_runtime.decide_replicas``), and it
compares nothing with what is there (``plan_runtime.plan_workloads``). Raises only InvalidArgument
with the field's path. The routers' objects are in ``workload_router``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from mesh.reconciler.config import ControllerConfig
from mesh.reconciler.kube_resources import AUTOSCALERS, DEPLOYMENTS, SERVICES, Obj
from mesh.reconciler.workload_names import (
    OWNED,
    OWNED_SELECTOR,
    budget,
    finished,
    new_object,
    owner_reference,
    runtime_labels,
    selector_of,
    service_name,
    workload_name,
)
from mesh.reconciler.workload_pod import runtime_config_map, runtime_deployment
from mesh.reconciler.workload_source import Autoscale, Refused, RuntimeSource, refusal

__all__ = [
    "OWNED",
    "OWNED_SELECTOR",
    "Refused",
    "RuntimeSource",
    "claims_of",
    "refusal",
    "runtime_objects",
    "service_name",
    "workload_name",
]


def runtime_objects(
    source: RuntimeSource,
    config: ControllerConfig,
    *,
    namespace: str,
    replicas: int,
    claims: Iterable[str] = (),
) -> tuple[Obj, ...]:
    """All objects of one runtime in one namespace, in the order in which they are made.

    ``replicas``: the Deployment's; with an autoscaler what is there now, or its minimum.
    ``claims``: volume claims that models lie in (``claims_of``). A runtime with a ``refusal`` has
    none. Raises InvalidArgument.
    """
    if refusal(source) is not None:
        return ()
    name = workload_name(config, source.name)
    labels = runtime_labels(config, source.name)
    config_map = runtime_config_map(source, name, namespace)
    deployment = runtime_deployment(
        source, config, namespace=namespace, replicas=replicas, claims=tuple(claims)
    )
    objects = [
        config_map,
        _runtime_service(source, config, namespace),
        budget(name, namespace, selector_of(config, name)),
        deployment,
    ]
    scale = source.autoscale
    if scale is not None:
        objects.append(_autoscaler(name, namespace, scale))
    owner = owner_reference(source.resource)
    return tuple(finished(one, labels, owner) for one in objects)


def _runtime_service(source: RuntimeSource, config: ControllerConfig, namespace: str) -> Obj:
    """Headless, for scraping and for looking: routers find instances in etcd."""
    made = new_object(SERVICES, namespace, service_name(config, source.name))
    ports = [{"name": "grpc", "port": config.grpc_port, "targetPort": "grpc", "protocol": "TCP"}]
    if config.metrics_enabled:
        ports.append(
            {
                "name": "metrics",
                "port": config.metrics_port,
                "targetPort": "metrics",
                "protocol": "TCP",
            }
        )
    made["spec"] = {
        "clusterIP": "None",
        "selector": selector_of(config, workload_name(config, source.name)),
        "ports": ports,
    }
    return made


def _autoscaler(name: str, namespace: str, scale: Autoscale) -> Obj:
    made = new_object(AUTOSCALERS, namespace, name)
    target = {"type": "Utilization", "averageUtilization": scale.utilization}
    made["spec"] = {
        "scaleTargetRef": {
            "apiVersion": DEPLOYMENTS.api_version,
            "kind": DEPLOYMENTS.kind,
            "name": name,
        },
        "minReplicas": scale.minimum,
        "maxReplicas": scale.maximum,
        "metrics": [{"type": "Resource", "resource": {"name": scale.metric, "target": target}}],
        # A pod that goes has its models loaded elsewhere first: not all of them at once.
        "behavior": {
            "scaleDown": {
                "stabilizationWindowSeconds": 300,
                "policies": [{"type": "Pods", "value": 1, "periodSeconds": 60}],
            }
        },
    }
    return made


def claims_of(
    storage: Mapping[str, Mapping[str, Any]], wanted: Iterable[str], config: ControllerConfig
) -> tuple[str, ...]:
    """Volume claims that serving pods mount: those that entries of the storage secret name
    (``type: pvc``), and with ``allowAnyPVC`` those that models ask for (``wanted``)."""
    named = {
        str(one["name"]) for one in storage.values() if one.get("type") == "pvc" and one.get("name")
    }
    return tuple(sorted(named.union(wanted if config.allow_any_claim else ())))
