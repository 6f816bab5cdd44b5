"""The overlays: whole, pinned, bounded, without power, and fitting to what the controller makes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from mesh.cli.main import app
from mesh.reconciler.config import CONFIG_MAP, ETCD_KEY, ETCD_SECRET, ControllerConfig, read_config
from mesh.reconciler.workload import RuntimeSource, refusal, runtime_objects
from mesh.reconciler.workload_pod import USER
from mesh.reconciler.workload_router import router_objects
from mesh.store.etcd_connection import parse_etcd_connection
from tests.deploy.accepting import check_schema, has_schema
from tests.deploy.manifests import (
    CLUSTER_KINDS,
    DEPLOY,
    NAMESPACE,
    OVERLAYS,
    documents,
    labels_of,
    overlay,
    pods,
    rendered,
)

PINNED = re.compile(r"[a-z0-9./-]+(:(?!latest$)[\w][\w.-]*|@sha256:[0-9a-f]{64})")
RUNTIMES = sorted((DEPLOY / "runtimes").glob("*.x.yaml"))
# All that kustomize 2.0.3 has, which is in Debian's kubectl, of what overlays use here.
OLD_FIELDS = {
    "apiVersion",
    "kind",
    "namespace",
    "bases",
    "resources",
    "patchesStrategicMerge",
}
KUSTOMIZATIONS = sorted(DEPLOY.rglob("kustomization.yaml"))


def named(objects: list[dict[str, Any]], kind: str, name: str) -> dict[str, Any]:
    (found,) = [one for one in objects if (one["kind"], one["metadata"]["name"]) == (kind, name)]
    return found


def controller(name: str) -> dict[str, Any]:
    deployment = named(overlay(name), "Deployment", "modelmesh-controller")
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    return dict(container)


@pytest.mark.parametrize("path", KUSTOMIZATIONS, ids=lambda p: p.parent.name)
def test_an_old_kustomize_can_read_it(path: Path) -> None:
    said = yaml.safe_load(path.read_text())
    assert said.keys() <= OLD_FIELDS
    for one in said.get("bases", ()):
        assert (path.parent / one / "kustomization.yaml").is_file(), one
    for one in [*said.get("resources", ()), *said.get("patchesStrategicMerge", ())]:
        assert (path.parent / one).is_file(), one


@pytest.mark.parametrize("path", KUSTOMIZATIONS, ids=lambda p: p.parent.name)
def test_no_file_is_forgotten(path: Path) -> None:
    said = yaml.safe_load(path.read_text())
    listed = {*said.get("resources", ()), *said.get("patchesStrategicMerge", ())}
    assert listed == {one.name for one in path.parent.glob("*.yaml")} - {"kustomization.yaml"}


@pytest.mark.parametrize("name", OVERLAYS)
def test_what_an_overlay_has(name: str) -> None:
    objects = overlay(name)
    kinds = {one["kind"] for one in objects}
    assert {"CustomResourceDefinition", "Deployment", "ConfigMap", "NetworkPolicy"} <= kinds
    assert ("StatefulSet" in kinds) == (name != "external-etcd")
    role = [one for one in objects if one["metadata"]["name"] == "modelmesh-controller"]
    assert ("ClusterRole" in {one["kind"] for one in role}) == (name == "cluster-wide")
    keys = [(one["kind"], one["metadata"]["name"]) for one in objects]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("name", OVERLAYS)
def test_one_namespace(name: str) -> None:
    for one in overlay(name):
        said = one["metadata"].get("namespace")
        assert said == (None if one["kind"] in CLUSTER_KINDS else NAMESPACE)
        for subject in one.get("subjects", ()):
            assert subject["namespace"] == NAMESPACE


@pytest.mark.parametrize("name", OVERLAYS)
def test_too_new_objects_fit_their_schemas(name: str) -> None:
    checked = [check_schema(one) for one in overlay(name) if has_schema(one)]
    assert checked


@pytest.mark.parametrize("name", OVERLAYS)
def test_images_are_pinned(name: str) -> None:
    images = [
        (one["image"], who)
        for who, spec in pods(overlay(name))
        for one in spec["containers"]
        if "image" in one
    ]
    assert images
    for image, who in images:
        assert PINNED.fullmatch(image), f"{who}: {image}"


@pytest.mark.parametrize("name", OVERLAYS)
def test_containers_are_bounded_and_without_power(name: str) -> None:
    for who, spec in pods(overlay(name)):
        for one in spec["containers"]:
            resources = one["resources"]
            assert {"cpu", "memory"} <= resources["requests"].keys(), who
            assert "memory" in resources["limits"], who
            if one["name"] == "mesh":  # the controller adds the rest
                continue
            security = one["securityContext"]
            assert security["allowPrivilegeEscalation"] is False, who
            assert security["capabilities"] == {"drop": ["ALL"]}, who
            assert security["runAsNonRoot"] is True, who


@pytest.mark.parametrize("name", OVERLAYS)
def test_our_own_pods_have_a_read_only_root(name: str) -> None:
    for one in overlay(name):
        if one["kind"] not in ("Deployment", "StatefulSet"):
            continue
        spec = one["spec"]["template"]["spec"]
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in spec["containers"]:
            assert container["securityContext"]["readOnlyRootFilesystem"] is True
            mounted = {mount["name"] for mount in container["volumeMounts"]}
            claims = {c["metadata"]["name"] for c in one["spec"].get("volumeClaimTemplates", ())}
            assert mounted <= {v["name"] for v in spec.get("volumes", ())} | claims


@pytest.mark.parametrize("name", OVERLAYS)
def test_selectors_select_their_pods(name: str) -> None:
    """Budgets and network policies name pods that somebody makes."""
    config = ControllerConfig()
    source = RuntimeSource.of(documents(RUNTIMES[0])[0])
    made = [
        *router_objects(config, namespace="n"),
        *runtime_objects(source, config, namespace="n", replicas=1),
    ]
    labels = [*labels_of(overlay(name)), *labels_of(made)]
    for one in overlay(name):
        selector = (
            one["spec"].get("podSelector") or one["spec"].get("selector")
            if (one["kind"] in ("NetworkPolicy", "PodDisruptionBudget", "Service"))
            else None
        )
        if selector is None:
            continue
        wanted = selector.get("matchLabels", selector)
        found = [of for of in labels if wanted.items() <= of.items()]
        assert len(found) == 1, f"{one['kind']} {one['metadata']['name']} selects {found}"


@pytest.mark.parametrize("name", OVERLAYS)
def test_the_controllers_flags_are_its_command_lines(name: str) -> None:
    container = controller(name)
    assert container["command"] == ["mesh", "controller"]
    said = {one["name"] for one in container["env"] if one["name"].startswith("MESH_")}
    assert said
    assert said <= variables("controller")


def variables(command: str) -> set[str]:
    """Names of the environment that a command reads."""
    group = typer.main.get_command(app)
    found: set[str] = set()
    for parameter in group.commands[command].params:  # type: ignore[attr-defined]
        name = parameter.envvar
        found |= {name} if isinstance(name, str) else set(name or ())
    return found


def test_the_pods_variables_are_their_command_lines() -> None:
    config = ControllerConfig(tls_secret="t", tls_clients_shown=True, per_model_metrics=True)
    for path in RUNTIMES:
        made = runtime_objects(
            RuntimeSource.of(documents(path)[0]), config, namespace="n", replicas=1
        )
        for one in [*made, *router_objects(config, namespace="n")]:
            if one["kind"] != "Deployment":
                continue
            ours = one["spec"]["template"]["spec"]["containers"][0]
            said = {e["name"] for e in ours["env"] if e["name"].startswith("MESH_")}
            assert said <= variables(ours["command"][1])


@pytest.mark.parametrize("name", OVERLAYS)
def test_the_configuration_can_be_read(name: str) -> None:
    data = named(overlay(name), "ConfigMap", CONFIG_MAP)["data"]
    config, warnings = read_config(data, ControllerConfig())
    assert warnings == ()
    assert bool(config.tls_secret) == (name == "tls")
    assert config.tls_clients_shown == (name == "tls")


def test_the_examples_can_be_read() -> None:
    folder = DEPLOY / "examples" / "kubernetes"
    (secret,) = documents(folder / "etcd-secret.yaml")
    assert secret["metadata"]["name"] == ETCD_SECRET
    entries = {key: text.encode() for key, text in secret["stringData"].items()}
    found = parse_etcd_connection(entries[ETCD_KEY], entries.__getitem__)
    assert found.warnings == ()
    assert found.options.endpoints == (
        *("https://etcd-0.example:2379", "https://etcd-1.example:2379"),
    )
    assert found.options.tls is not None
    assert found.options.tls.key == entries["tls.key"]
    (storage,) = documents(folder / "storage-config.yaml")
    assert storage["metadata"]["name"] == ControllerConfig().storage_secret
    assert yaml.safe_load(storage["stringData"]["default"])["type"] == "s3"


@pytest.mark.parametrize("path", RUNTIMES, ids=lambda p: p.stem)
def test_the_runtimes(path: Path) -> None:
    (document,) = documents(path)
    source = RuntimeSource.of(document)
    assert source.name == path.stem
    assert refusal(source) is None
    containers = runtime_objects(source, ControllerConfig(), namespace="n", replicas=1)
    deployment = containers[-1]
    names = [one["name"] for one in deployment["spec"]["template"]["spec"]["containers"]]
    assert names[0] == "mesh"
    assert (len(names) == 2) == source.runtime.is_external


def test_the_etcds_members_know_each_other() -> None:
    etcd = named(overlay("single-namespace"), "StatefulSet", "modelmesh-etcd")
    (container,) = etcd["spec"]["template"]["spec"]["containers"]
    (cluster,) = [a for a in container["command"] if a.startswith("--initial-cluster=")]
    members = [m.partition("=")[0] for m in cluster.removeprefix("--initial-cluster=").split(",")]
    assert members == [f"modelmesh-etcd-{n}" for n in range(etcd["spec"]["replicas"])]
    assert etcd["spec"]["serviceName"] in cluster
    address = {one["name"]: one.get("value") for one in controller("single-namespace")["env"]}
    assert address["MESH_ETCD"] == "modelmesh-etcd.$(POD_NAMESPACE).svc:2379"


def test_the_external_etcd_is_read_from_its_secret() -> None:
    container = controller("external-etcd")
    (mount,) = [one for one in container["volumeMounts"] if one["name"] == "etcd"]
    said = {one["name"]: one.get("value") for one in container["env"]}
    assert said["MESH_ETCD_CONNECTION"] == f"{mount['mountPath']}/etcd_connection"
    assert "MESH_ETCD" not in said  # only one of the two may be given
    assert {"name": "tmp", "mountPath": "/tmp"} in container["volumeMounts"]


def test_the_images_user_is_the_pods() -> None:
    assert controller("tls")["securityContext"]["runAsUser"] == USER


def test_the_monitors_find_the_services() -> None:
    monitors = rendered("monitoring")
    service_monitor = named(monitors, "ServiceMonitor", "modelmesh-serving")
    wanted = service_monitor["spec"]["selector"]["matchLabels"]
    config = ControllerConfig()
    source = RuntimeSource.of(documents(RUNTIMES[0])[0])
    made = [
        *router_objects(config, namespace="n"),
        *runtime_objects(source, config, namespace="n", replicas=1),
    ]
    services = [one for one in made if one["kind"] == "Service"]
    assert len(services) == 2
    (endpoint,) = service_monitor["spec"]["endpoints"]
    for one in services:
        assert wanted.items() <= one["metadata"]["labels"].items()
        assert endpoint["port"] in {port["name"] for port in one["spec"]["ports"]}
    pod_monitor = named(monitors, "PodMonitor", "modelmesh-controller")
    found = pod_monitor["spec"]["selector"]["matchLabels"]
    assert any(found.items() <= labels.items() for labels in labels_of(overlay("tls")))
