"""The routers of a namespace: addresses that stay, TLS, time to drain."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from mesh.reconciler.config import Amounts, ControllerConfig, PodEtcd
from mesh.reconciler.workload_router import DRAIN_NOTICE_MS, DRAIN_TIMEOUT_MS, router_objects
from router.settings import RouterSettings
from tests.deploy.accepting import check_accepted, check_schema, has_schema
from tests.kube_server import KubeServer

CONFIG = ControllerConfig()
TLS = replace(CONFIG, tls_secret="certificates", tls_clients_shown=True)
SECRET = replace(CONFIG, etcd=PodEtcd(from_secret=True))


def objects(config: ControllerConfig = CONFIG) -> dict[str, dict[str, Any]]:
    return {one["kind"]: one for one in router_objects(config, namespace="n")}


def container(config: ControllerConfig = CONFIG) -> dict[str, Any]:
    (one,) = objects(config)["Deployment"]["spec"]["template"]["spec"]["containers"]
    return dict(one)


def env(config: ControllerConfig = CONFIG) -> dict[str, str]:
    return {one["name"]: one.get("value", "") for one in container(config)["env"]}


def ports(config: ControllerConfig = CONFIG) -> dict[str, int]:
    return {one["name"]: one["port"] for one in objects(config)["Service"]["spec"]["ports"]}


@pytest.mark.kube
@pytest.mark.parametrize("config", [CONFIG, TLS, SECRET], ids=["plain", "TLS", "etcd's secret"])
def test_the_api_server_takes_them_whole(
    config: ControllerConfig, kube: KubeServer, namespace: str
) -> None:
    for one in router_objects(config, namespace=namespace):
        if has_schema(one):
            check_schema(one)
        else:
            check_accepted(kube, one, namespace)


def test_clients_addresses_are_modelmeshs() -> None:
    made = objects()
    assert [one["metadata"]["name"] for one in made.values()] == ["modelmesh-serving"] * 3
    assert ports() == {"grpc": 8033, "http": 8008, "metrics": 2112}
    assert made["Service"]["spec"]["clusterIP"] == "None"
    assert "clusterIP" not in objects(replace(CONFIG, headless=False))["Service"]["spec"]


def test_the_service_selects_the_routers_and_no_serving_pod() -> None:
    selector = objects()["Service"]["spec"]["selector"]
    labels = objects()["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert selector.items() <= labels.items()
    assert selector["name"] == "modelmesh-serving"


def test_a_headless_service_translates_no_port() -> None:
    listens = {one["name"]: one["containerPort"] for one in container()["ports"]}
    assert {name: listens[name] for name in ports()} == ports()


@pytest.mark.parametrize(
    ("changed", "gone"),
    [({"rest_enabled": False}, "http"), ({"metrics_enabled": False}, "metrics")],
)
def test_what_is_off_has_no_port(changed: dict[str, Any], gone: str) -> None:
    assert gone not in ports(replace(CONFIG, **changed))


def test_variables() -> None:
    config = replace(
        CONFIG,
        etcd=PodEtcd(("a:1", "b:2"), "p"),
        message_bytes_max=5_000,
        per_model_metrics=True,
    )
    said = env(config)
    assert said["MESH_ETCD"] == "a:1,b:2"
    assert said["MESH_PREFIX"] == "p"
    assert said["MESH_MAX_MESSAGE_SIZE"] == "5000"
    assert said["MESH_PER_MODEL_METRICS"] == "true"
    assert said["MESH_GRPC_PORT"] == "8033"
    assert "MESH_PER_MODEL_METRICS" not in env()


def test_the_secret_of_etcd_is_mounted_in_place_of_its_address() -> None:
    config = replace(CONFIG, etcd=PodEtcd(("a:1",), "p", from_secret=True), etcd_secret="mine")
    said = env(config)
    assert "MESH_ETCD" not in said
    assert said["MESH_PREFIX"] == "p"  # counts where the secret has no root_prefix
    folder, _, key = said["MESH_ETCD_CONNECTION"].rpartition("/")
    assert key == "etcd_connection"
    (mount,) = [one for one in container(config)["volumeMounts"] if one["mountPath"] == folder]
    assert mount["readOnly"]
    volumes = objects(config)["Deployment"]["spec"]["template"]["spec"]["volumes"]
    (volume,) = [one for one in volumes if one["name"] == mount["name"]]
    assert volume["secret"]["secretName"] == "mine"
    assert "etcd-connection" not in str(objects())


def test_tls() -> None:
    assert not [name for name in env() if "TLS" in name]
    said = env(TLS)
    assert said["MESH_SERVER_TLS_CERT"] == "/etc/mesh/tls/tls.crt"
    assert said["MESH_SERVER_TLS_CLIENT_CA"] == "/etc/mesh/tls/ca.crt"
    assert "MESH_SERVER_TLS_CLIENT_CA" not in env(replace(TLS, tls_clients_shown=False))
    volumes = objects(TLS)["Deployment"]["spec"]["template"]["spec"]["volumes"]
    assert {"name": "tls", "secret": {"secretName": "certificates"}} in volumes


def test_time_to_leave() -> None:
    settings = RouterSettings()
    assert (settings.drain_notice_ms, settings.drain_timeout_ms) == (
        DRAIN_NOTICE_MS,
        DRAIN_TIMEOUT_MS,
    )
    command = container()["lifecycle"]["preStop"]["exec"]["command"]
    assert command[0] == "sleep"
    grace_s = objects()["Deployment"]["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    assert grace_s * 1_000 > int(command[1]) * 1_000 + DRAIN_NOTICE_MS + DRAIN_TIMEOUT_MS


def test_replicas_and_amounts() -> None:
    config = replace(CONFIG, router_replicas=5, router=Amounts("1", "1Gi", memory_limit="2Gi"))
    assert objects(config)["Deployment"]["spec"]["replicas"] == 5
    assert container(config)["resources"] == {
        "requests": {"cpu": "1", "memory": "1Gi"},
        "limits": {"memory": "2Gi"},
    }


def test_a_read_only_root_and_no_user_of_power() -> None:
    security = container()["securityContext"]
    assert security["readOnlyRootFilesystem"] and security["runAsNonRoot"]
    assert security["capabilities"] == {"drop": ["ALL"]}
