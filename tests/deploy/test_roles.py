"""The roles grant what ``mesh.reconciler.permissions`` lists, and nothing else."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from mesh.reconciler import kube_resources
from mesh.reconciler.kube_resources import INFERENCE_GRAPHS, SERVICE_ACCOUNTS, Resource
from mesh.reconciler.permissions import NEEDED, Where
from tests.deploy.manifests import DEPLOY, documents

Right = tuple[str, str, str, str]  # API group, resource, verb, name ("" for all)


def granted(scope: str, *names: str) -> set[Right]:
    """By the roles of these names."""
    roles: list[dict[str, Any]] = documents(DEPLOY / "rbac" / scope / "roles.yaml")
    return {
        (group, resource, verb, name)
        for role in roles
        if role["kind"] in ("Role", "ClusterRole") and role["metadata"]["name"] in names
        for rule in role["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
        for name in rule.get("resourceNames") or [""]
    }


def needed(where: Iterable[Where]) -> set[Right]:
    wanted = set(where)
    return {
        (one.resource.group, one.rbac_name, verb, name)
        for one in NEEDED
        if one.where in wanted
        for verb in one.verbs
        for name in one.names or ("",)
    }


def test_one_namespace() -> None:
    assert granted("namespace", "modelmesh-controller") == needed([Where.SERVED])
    assert granted("namespace", "modelmesh-controller-leader") == needed([Where.CONTROLLER])
    assert granted("namespace", "modelmesh-controller-runtimes") == needed([Where.CLUSTER])


def test_all_namespaces() -> None:
    assert granted("cluster", "modelmesh-controller") == needed(
        [Where.SERVED, Where.CLUSTER, Where.ALL_NAMESPACES]
    )
    assert granted("cluster", "modelmesh-controller-leader") == needed([Where.CONTROLLER])


def test_only_what_has_to_be_cluster_wide_is() -> None:
    roles = documents(DEPLOY / "rbac" / "namespace" / "roles.yaml")
    wide = [one["metadata"]["name"] for one in roles if one["kind"] == "ClusterRole"]
    assert wide == ["modelmesh-controller-runtimes"]


def test_nothing_is_granted_by_a_star_and_no_secret_but_one() -> None:
    for scope in ("namespace", "cluster"):
        names = [one["metadata"]["name"] for one in documents(DEPLOY / f"rbac/{scope}/roles.yaml")]
        rights = granted(scope, *names)
        assert not [right for right in rights if "*" in right]
        assert {name for _, resource, _, name in rights if resource == "secrets"} == {
            "storage-config"
        }


def test_every_kind_that_the_controller_names_is_in_the_table() -> None:
    known = {one for one in vars(kube_resources).values() if isinstance(one, Resource)}
    listed = {one.resource for one in NEEDED}
    assert listed <= known
    # Named, and not read by the controller.
    assert known - listed == {INFERENCE_GRAPHS, SERVICE_ACCOUNTS}


def test_every_role_is_bound() -> None:
    for scope in ("namespace", "cluster"):
        objects = documents(DEPLOY / "rbac" / scope / "roles.yaml")
        roles = {(o["kind"], o["metadata"]["name"]) for o in objects if "rules" in o}
        bound = {(o["roleRef"]["kind"], o["roleRef"]["name"]) for o in objects if "roleRef" in o}
        assert roles == bound
