"""The routers of one namespace: Deployment, Service and PodDisruptionBudget. Pure.

The Service is ModelMesh's (``modelmesh-serving``, 8033 and 8008), so that clients' addresses stay.
"""

from __future__ import annotations

from typing import Any, Final

from mesh.reconciler.config import ControllerConfig
from mesh.reconciler.kube_resources import DEPLOYMENTS, SERVICES, Obj
from mesh.reconciler.workload_names import budget, finished, new_object, selector_of
from mesh.reconciler.workload_pod import (
    grace_s,
    mesh_container,
    mesh_env,
    pod_spec,
    pod_template,
    rolling,
    value,
)

# As router.settings.RouterSettings has them.
DRAIN_NOTICE_MS: Final = 500
DRAIN_TIMEOUT_MS: Final = 20_000
# Until every node and every client's resolver has taken the pod out of the Service.
_LEAVE_S: Final = 5
_TLS_DIR: Final = "/etc/mesh/tls"


def router_objects(
    config: ControllerConfig, *, namespace: str, owner: dict[str, Any] | None = None
) -> tuple[Obj, ...]:
    """All objects of a namespace's routers, in the order in which they are made."""
    name = config.service_name
    labels = {
        **selector_of(config, name),
        "app.kubernetes.io/name": "modelmesh-serving",
        "app.kubernetes.io/component": "router",
    }
    objects = (
        _service(config, namespace),
        budget(name, namespace, selector_of(config, name)),
        _deployment(config, namespace, labels),
    )
    return tuple(finished(one, labels, owner) for one in objects)


def _service(config: ControllerConfig, namespace: str) -> Obj:
    made = new_object(SERVICES, namespace, config.service_name)
    ports = [("grpc", config.grpc_port)]
    if config.rest_enabled:
        ports.append(("http", config.rest_port))
    if config.metrics_enabled:
        ports.append(("metrics", config.metrics_port))
    spec: dict[str, Any] = {
        "selector": selector_of(config, config.service_name),
        "ports": [
            {"name": name, "port": port, "targetPort": name, "protocol": "TCP"}
            for name, port in ports
        ],
    }
    if config.headless:
        spec["clusterIP"] = "None"
    made["spec"] = spec
    return made


def _deployment(config: ControllerConfig, namespace: str, labels: dict[str, str]) -> Obj:
    name = config.service_name
    env = [
        *mesh_env(config, namespace),
        value("MESH_ROUTER_NAME", field="metadata.name"),
        value("MESH_HOST", "0.0.0.0"),
        value("MESH_GRPC_PORT", str(config.grpc_port)),
        value("MESH_REST_PORT", str(config.rest_port)),
    ]
    mounts: dict[str, dict[str, Any]] = {}
    volumes: list[dict[str, Any]] = []
    if config.tls_secret:
        volumes.append({"name": "tls", "secret": {"secretName": config.tls_secret}})
        mounts[_TLS_DIR] = {"name": "tls", "readOnly": True}
        env += [
            value("MESH_SERVER_TLS_CERT", f"{_TLS_DIR}/tls.crt"),
            value("MESH_SERVER_TLS_KEY", f"{_TLS_DIR}/tls.key"),
        ]
        if config.tls_clients_shown:
            env.append(value("MESH_SERVER_TLS_CLIENT_CA", f"{_TLS_DIR}/ca.crt"))
    container = mesh_container(
        config,
        "router",
        env=env,
        ports={
            "grpc": config.grpc_port,
            "http": config.rest_port,
            "metrics": config.metrics_port,
        },
        resources=config.router.as_resources(),
        mounts=mounts,
    )
    container["lifecycle"] = {"preStop": {"exec": {"command": ["sleep", str(_LEAVE_S)]}}}
    made = new_object(DEPLOYMENTS, namespace, name)
    made["spec"] = {
        "replicas": config.router_replicas,
        **rolling(selector_of(config, name)),
        "template": pod_template(
            config,
            labels,
            pod_spec(
                config,
                [container],
                volumes,
                selector=selector_of(config, name),
                grace_s=_LEAVE_S + grace_s(DRAIN_NOTICE_MS, DRAIN_TIMEOUT_MS),
            ),
        ),
    }
    return made
