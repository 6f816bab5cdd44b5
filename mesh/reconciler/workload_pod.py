"""The pods of serving runtimes, and what pods of routers have in common with them. Pure.

A serving pod is our container (``mesh instance``), and beside it the containers that the runtime
names, with the models' folder and the socket's folder shared at the same paths. A container that a
runtime calls ``mesh`` is ours: its resources, variables, mounts and image count over the defaults.
All that the runtime says of scheduling goes into the pod as it stands.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any, Final

import yaml

from mesh.core.errors import InvalidArgument
from mesh.manifest_fields import wrong
from mesh.quantity import parse_quantity
from mesh.reconciler.config import ETCD_KEY, ControllerConfig
from mesh.reconciler.kube_resources import CONFIG_MAPS, DEPLOYMENTS, Obj
from mesh.reconciler.workload_names import (
    MANAGED_BY,
    MANAGER,
    new_object,
    runtime_labels,
    selector_of,
    workload_name,
)
from mesh.reconciler.workload_source import RuntimeSource

OUR_CONTAINER: Final = "mesh"
# As mesh.instance.settings.InstanceSettings has them.
DRAIN_NOTICE_MS: Final = 500
DRAIN_TIMEOUT_MS: Final = 15_000
USER: Final = 10_001  # of the image; deploy/Dockerfile has the same
MODELS_DIR: Final = "/models"  # ModelMesh's; external servers see it at the same path
RUNTIME_FILE: Final = "runtime.yaml"
_ARTIFACTS_DIR: Final = f"{MODELS_DIR}/_artifacts"
_RUNTIME_DIR: Final = "/etc/mesh/runtime"
_STORAGE_DIR: Final = "/storage-config"
_ETCD_DIR: Final = "/etc/mesh/etcd"
_CLAIMS_DIR: Final = "/pvc_mounts"  # puller.settings.PullerSettings.pvc_root
RUNTIME_HASH: Final = "mesh.serving/runtime-hash"
_MIB: Final = 1 << 20
# Of our container's memory, what is not for models: the interpreter, frameworks, requests.
_OVERHEAD_BYTES: Final = 384 * _MIB
_OVERHEAD_SHARE: Final = 5  # a fifth, where that is more
_GRACE_MARGIN_MS: Final = 10_000  # for kubelet and for closing what is left
# An external server may take three minutes until it is ready, and nothing listens before.
_START_TRIES: Final = 120
_START_PERIOD_S: Final = 2
# Fields of a runtime's spec that are a pod's, under the same names.
_POD_FIELDS: Final = (
    *("nodeSelector", "affinity", "tolerations", "hostIPC", "schedulerName", "resourceClaims"),
)
_SERVER_SECURITY: Final[Mapping[str, Any]] = {
    "allowPrivilegeEscalation": False,
    "capabilities": {"drop": ["ALL"]},
}


def grace_s(notice_ms: int, drain_ms: int) -> int:
    """Seconds from SIGTERM to SIGKILL for a process that drains so."""
    return -(-(notice_ms + drain_ms + _GRACE_MARGIN_MS) // 1_000)


def value(name: str, text: str = "", *, field: str = "") -> dict[str, Any]:
    """One variable of a container: a text, or a field of the pod."""
    if field:
        return {"name": name, "valueFrom": {"fieldRef": {"fieldPath": field}}}
    return {"name": name, "value": text}


def mesh_env(config: ControllerConfig, namespace: str) -> list[dict[str, Any]]:
    """Variables of routers and serving pods alike."""
    etcd = value("MESH_ETCD", ",".join(config.etcd.endpoints))
    if config.etcd.from_secret:
        etcd = value("MESH_ETCD_CONNECTION", f"{_ETCD_DIR}/{ETCD_KEY}")
    env = [
        etcd,
        value("MESH_PREFIX", config.etcd.prefix),
        value("MESH_NAMESPACE", namespace),
        value("MESH_METRICS_HOST", "0.0.0.0"),
        value("MESH_METRICS_PORT", str(config.metrics_port)),
        value("MESH_MAX_MESSAGE_SIZE", str(config.message_bytes_max)),
        value("MESH_LOG_LEVEL", config.log_level),
        value("HOME", "/tmp"),
    ]
    if config.per_model_metrics:
        env.append(value("MESH_PER_MODEL_METRICS", "true"))
    return env


def mesh_container(
    config: ControllerConfig,
    command: str,
    *,
    env: list[dict[str, Any]],
    ports: Mapping[str, int],
    resources: Mapping[str, Any],
    mounts: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """``mesh router`` or ``mesh instance``. ``mounts``: by path."""
    probe = {"httpGet": {"path": "/livez", "port": "metrics"}}
    if config.etcd.from_secret:
        mounts = {_ETCD_DIR: {"name": "etcd-connection", "readOnly": True}, **mounts}
    return {
        "name": OUR_CONTAINER,
        "image": config.image,
        "imagePullPolicy": config.image_pull_policy,
        "command": ["mesh", command],
        "env": env,
        "ports": [
            {"name": name, "containerPort": port, "protocol": "TCP"} for name, port in ports.items()
        ],
        "resources": dict(resources),
        "volumeMounts": [
            {"mountPath": path, **mount}
            for path, mount in {"/tmp": {"name": "tmp"}, **mounts}.items()
        ],
        "startupProbe": {
            **probe,
            "periodSeconds": _START_PERIOD_S,
            "timeoutSeconds": 2,
            "failureThreshold": _START_TRIES,
        },
        "readinessProbe": {
            "httpGet": {"path": "/readyz", "port": "metrics"},
            "periodSeconds": 2,
            "timeoutSeconds": 2,
            "failureThreshold": 2,
        },
        # Slow: a loop that is held up for a while is no reason to lose all loaded models.
        "livenessProbe": {
            **probe,
            "periodSeconds": 15,
            "timeoutSeconds": 10,
            "failureThreshold": 4,
        },
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER,
            "runAsGroup": USER,
            "readOnlyRootFilesystem": True,
            **_SERVER_SECURITY,
        },
    }


def pod_spec(
    config: ControllerConfig,
    containers: list[dict[str, Any]],
    volumes: Sequence[Mapping[str, Any]],
    *,
    selector: Mapping[str, str],
    grace_s: int,
) -> dict[str, Any]:
    spec: dict[str, Any] = {
        "containers": containers,
        "volumes": [{"name": "tmp", "emptyDir": {}}, *volumes],
        "terminationGracePeriodSeconds": grace_s,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": {
            "fsGroup": USER,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "topologySpreadConstraints": [
            {
                "maxSkew": 1,
                "topologyKey": key,
                "whenUnsatisfiable": "ScheduleAnyway",
                "labelSelector": {"matchLabels": dict(selector)},
            }
            for key in ("kubernetes.io/hostname", "topology.kubernetes.io/zone")
        ],
    }
    if config.etcd.from_secret:
        # No container of the runtime mounts it, and only the pod's group could read it.
        secret = {"secretName": config.etcd_secret, "defaultMode": 0o440}
        spec["volumes"].append({"name": "etcd-connection", "secret": secret})
    if config.service_account:
        spec["serviceAccountName"] = config.service_account
    if config.pull_secrets:
        spec["imagePullSecrets"] = [{"name": name} for name in config.pull_secrets]
    return spec


def pod_template(
    config: ControllerConfig, labels: Mapping[str, str], spec: Mapping[str, Any]
) -> dict[str, Any]:
    annotations = dict(config.pod_annotations)
    if config.metrics_enabled:
        annotations |= {
            "prometheus.io/path": "/metrics",
            "prometheus.io/port": str(config.metrics_port),
            "prometheus.io/scheme": "http",
            "prometheus.io/scrape": "true",
        }
    labels = {**config.pod_labels, **labels, MANAGED_BY: MANAGER}
    metadata = {"labels": labels, "annotations": annotations}
    return {"metadata": metadata, "spec": dict(spec)}


def rolling(selector: Mapping[str, str]) -> dict[str, Any]:
    """A Deployment that has no pod less while it changes."""
    return {
        "selector": {"matchLabels": dict(selector)},
        "revisionHistoryLimit": 3,
        # A quarter more, rounded up: at least one.
        "strategy": {
            "type": "RollingUpdate",
            "rollingUpdate": {"maxSurge": "25%", "maxUnavailable": 0},
        },
    }


def runtime_config_map(source: RuntimeSource, name: str, namespace: str) -> Obj:
    """The ServingRuntime as the pods read it, without what only this controller acts on."""
    spec = {key: one for key, one in source.spec.items() if key != "replicas"}
    document = {
        "apiVersion": source.resource["apiVersion"],
        "kind": source.resource["kind"],
        "metadata": {"name": source.name},
        "spec": spec,
    }
    made = new_object(CONFIG_MAPS, namespace, name)
    made["data"] = {RUNTIME_FILE: yaml.safe_dump(document, sort_keys=True)}
    return made


def runtime_deployment(
    source: RuntimeSource,
    config: ControllerConfig,
    *,
    namespace: str,
    replicas: int,
    claims: tuple[str, ...],
) -> Obj:
    """Raises InvalidArgument with the path of what is wrong in the runtime's spec."""
    name = workload_name(config, source.name)
    selector = selector_of(config, name)
    ours, others = _containers(source)
    sockets = {
        path: {"name": f"socket-{at}"} for at, path in enumerate(_socket_folders(source.spec))
    }
    shared = {MODELS_DIR: {"name": "models"}, **sockets}
    container = _instance_container(source, config, namespace, name, ours, bool(others))
    _add_mounts(
        container,
        {
            **shared,
            _RUNTIME_DIR: {"name": "runtime", "readOnly": True},
            _STORAGE_DIR: {"name": "storage-config", "readOnly": True},
            **_claim_mounts(claims),
        },
    )
    servers = [
        _server_container(
            one, {**shared, **_claim_mounts(claims)}, config.metrics_port, as_us=bool(sockets)
        )
        for one in others
    ]
    volumes = [
        {"name": "models", "emptyDir": {}},
        *({"name": mount["name"], "emptyDir": {}} for mount in sockets.values()),
        {"name": "runtime", "configMap": {"name": name}},
        {
            "name": "storage-config",
            "secret": {"secretName": config.storage_secret, "optional": True},
        },
        *(
            {
                "name": f"claim-{at}",
                "persistentVolumeClaim": {"claimName": claim, "readOnly": True},
            }
            for at, claim in enumerate(claims)
        ),
        *(_list(source.spec, "volumes")),
    ]
    pod = pod_spec(
        config,
        [container, *servers],
        volumes,
        selector=selector,
        grace_s=grace_s(DRAIN_NOTICE_MS, DRAIN_TIMEOUT_MS),
    )
    _take_over(pod, source.spec)
    labels = {**_texts(source.spec, "labels"), **runtime_labels(config, source.name)}
    template = pod_template(config, labels, pod)
    template["metadata"]["annotations"] |= {
        **_texts(source.spec, "annotations"),
        RUNTIME_HASH: _hash_of_text(runtime_config_map(source, name, namespace)),
    }
    made = new_object(DEPLOYMENTS, namespace, name)
    made["spec"] = {"replicas": replicas, **rolling(selector), "template": template}
    return made


def _instance_container(
    source: RuntimeSource,
    config: ControllerConfig,
    namespace: str,
    name: str,
    said: Mapping[str, Any],
    has_server: bool,
) -> dict[str, Any]:
    """Our container; ``said`` is what the runtime has under its name."""
    amounts = config.sidecar if has_server else config.instance
    resources = said.get("resources") or amounts.as_resources()
    env = {
        one["name"]: one
        for one in (
            *mesh_env(config, namespace),
            value("MESH_INSTANCE_NAME", field="metadata.name"),
            value("MESH_INSTANCE_HOST", "0.0.0.0"),
            value("MESH_INSTANCE_PORT", str(config.grpc_port)),
            value("MESH_ADVERTISE", field="status.podIP"),
            value("MESH_LABELS", f"rt:{source.name}"),
            value("MESH_GROUP", name),
            value("MESH_REPLICA_SET", field="metadata.labels['pod-template-hash']"),
            value("MESH_SERVING_RUNTIME", f"{_RUNTIME_DIR}/{RUNTIME_FILE}"),
            value("MESH_STORAGE_CONFIG", _STORAGE_DIR),
            value("MESH_CACHE_DIR", _ARTIFACTS_DIR),
            value(
                "MESH_CACHE_SIZE", str(parse_quantity(config.artifact_cache, "artifactCacheSize"))
            ),
            *_load_slots(source),
        )
    }
    if not source.runtime.is_external:
        env["MESH_CAPACITY"] = value("MESH_CAPACITY", str(_capacity_bytes(resources)))
    for one in (*_adapter_env(source), *_list(said, "env", at="spec.containers")):
        env[one["name"]] = dict(one)
    container = mesh_container(
        config,
        "instance",
        env=list(env.values()),
        ports={"grpc": config.grpc_port, "metrics": config.metrics_port},
        resources=resources,
        mounts={},
    )
    for key in ("image", "imagePullPolicy", "envFrom"):
        if said.get(key):
            container[key] = said[key]
    container["volumeMounts"] += _list(said, "volumeMounts", at="spec.containers")
    return container


def _load_slots(source: RuntimeSource) -> tuple[dict[str, Any], ...]:
    """ModelMesh's annotation for runtimes that do not say themselves."""
    text = source.annotations.get("maxLoadingConcurrency", "")
    if not (text.isascii() and text.isdigit() and 1 <= int(text) <= 64):
        return ()
    return value("MESH_LOAD_SLOTS", text), value("LOADING_CONCURRENCY", text)


def _adapter_env(source: RuntimeSource) -> list[Mapping[str, Any]]:
    adapter = source.runtime.adapter
    if adapter is None:
        return []
    # Where ModelMesh's own runtimes have these servers look for models.
    folder = f"{MODELS_DIR}/_{adapter.server_type}_models"
    said = source.spec.get("builtInAdapter") or {}
    return [value("MODEL_REPOSITORY", folder), *_list(said, "env", at="spec.builtInAdapter")]


def _capacity_bytes(resources: Mapping[str, Any]) -> int:
    """What is left for models of the memory that the container may use."""
    for key in ("requests", "limits"):
        text = (resources.get(key) or {}).get("memory")
        if text is not None:
            memory_bytes = parse_quantity(str(text), f"spec.containers.resources.{key}.memory")
            room = memory_bytes - max(_OVERHEAD_BYTES, memory_bytes // _OVERHEAD_SHARE)
            if room < _MIB:
                raise wrong(
                    f"spec.containers.resources.{key}.memory",
                    f"more than {_OVERHEAD_BYTES // _MIB}Mi, which the pod itself needs",
                    text,
                )
            return room
    raise wrong("spec.containers.resources", "a request or limit of memory", None)


def _containers(source: RuntimeSource) -> tuple[Mapping[str, Any], list[Mapping[str, Any]]]:
    """What is said of our container ({} for nothing), and the others."""
    ours: Mapping[str, Any] = {}
    others = []
    for at, one in enumerate(_list(source.spec, "containers")):
        if not one.get("name"):
            raise wrong(f"spec.containers[{at}].name", "the container's name", None)
        if one["name"] == OUR_CONTAINER:
            ours = one
        elif not one.get("image"):
            raise wrong(f"spec.containers[{at}].image", "an image", None)
        else:
            others.append(one)
    return ours, others


def _server_container(
    said: Mapping[str, Any],
    shared: Mapping[str, Mapping[str, Any]],
    metrics_port: int,
    *,
    as_us: bool,
) -> dict[str, Any]:
    """A container of the runtime. ``as_us``: it makes a socket that our user must write to."""
    container = {**said}
    _add_mounts(container, shared)
    security = {**_SERVER_SECURITY, **({"runAsUser": USER, "runAsGroup": USER} if as_us else {})}
    container["securityContext"] = {**security, **(said.get("securityContext") or {})}
    # Answered when our drain has ended: requests in flight need the server until then.
    stop = {"preStop": {"httpGet": {"path": "/drained", "port": metrics_port}}}
    container["lifecycle"] = {**stop, **(said.get("lifecycle") or {})}
    return container


def _add_mounts(container: dict[str, Any], mounts: Mapping[str, Mapping[str, Any]]) -> None:
    """Adds what is not mounted there already, but for our own /tmp, which a socket may take."""
    there = [
        one
        for one in container.get("volumeMounts") or ()
        if one["mountPath"] not in mounts or one["name"] != "tmp"
    ]
    paths = {one["mountPath"] for one in there}
    container["volumeMounts"] = there + [
        {"mountPath": path, **mount} for path, mount in mounts.items() if path not in paths
    ]


def _claim_mounts(claims: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    return {
        f"{_CLAIMS_DIR}/{claim}": {"name": f"claim-{at}", "readOnly": True}
        for at, claim in enumerate(claims)
    }


def _socket_folders(spec: Mapping[str, Any]) -> list[str]:
    """Folders of the unix sockets that the endpoints name, each once."""
    folders = {}
    for key in ("grpcEndpoint", "grpcDataEndpoint", "httpDataEndpoint"):
        text = spec.get(key) or ""
        if text.startswith("unix:"):
            path = PurePosixPath("/" + text.removeprefix("unix:").lstrip("/"))
            if len(path.parts) < 3 or ".." in path.parts:
                raise wrong(
                    f"spec.{key}", "a socket in a folder of its own (unix:/tmp/x.sock)", text
                )
            folders[str(path.parent)] = True
    return list(folders)


def _take_over(pod: dict[str, Any], spec: Mapping[str, Any]) -> None:
    """What the runtime says of its pods counts over what we say."""
    for key in _POD_FIELDS:
        if spec.get(key) is not None:
            pod[key] = spec[key]
    if spec.get("serviceAccountName"):
        pod["serviceAccountName"] = spec["serviceAccountName"]
    if spec.get("securityContext"):
        pod["securityContext"] = {**pod["securityContext"], **spec["securityContext"]}
    secrets = {one["name"]: one for one in pod.get("imagePullSecrets", ())}
    secrets |= {one["name"]: one for one in _list(spec, "imagePullSecrets")}
    if secrets:
        pod["imagePullSecrets"] = list(secrets.values())


def _list(spec: Mapping[str, Any], key: str, *, at: str = "spec") -> list[Mapping[str, Any]]:
    """A list of mappings; [] where there is none."""
    found = spec.get(key)
    if found is None:
        return []
    if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
        raise wrong(f"{at}.{key}", "a list of mappings", found)
    return found


def _texts(spec: Mapping[str, Any], key: str) -> dict[str, str]:
    found = spec.get(key) or {}
    if not isinstance(found, dict) or not all(isinstance(one, str) for one in found.values()):
        raise InvalidArgument(f"spec.{key}: expected a mapping of strings")
    return found


def _hash_of_text(config_map: Obj) -> str:
    return hashlib.sha256(config_map["data"][RUNTIME_FILE].encode()).hexdigest()[:16]
