"""The overlays against a real API server: objects by dry run, and roles by what they allow."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from mesh.reconciler.permissions import NEEDED, Permission, Where
from tests.deploy.accepting import check_accepted, has_schema
from tests.deploy.manifests import DEPLOY, OVERLAYS, documents, overlay
from tests.kube_server import KubeServer

pytestmark = pytest.mark.kube
RBAC = "/apis/rbac.authorization.k8s.io/v1"


def test_every_object_is_accepted(kube: KubeServer, namespace: str) -> None:
    seen: dict[str, dict[str, Any]] = {}
    for name in OVERLAYS:
        for one in overlay(name):
            # The CRDs are in use already.
            if not has_schema(one) and one["kind"] != "CustomResourceDefinition":
                seen[json.dumps(one, sort_keys=True)] = one
    examples = [
        document
        for path in sorted((DEPLOY / "examples" / "kubernetes").glob("*.yaml"))
        for document in documents(path)
    ]
    assert len(seen) > 20
    for one in [*seen.values(), *examples]:
        check_accepted(kube, one, namespace)


def test_kubectl_takes_what_it_renders(kube: KubeServer) -> None:
    objects = [
        {**one, "metadata": {**one["metadata"], "namespace": "default"}}
        if "namespace" in one["metadata"]
        else one
        for one in overlay("cluster-wide")
        if not has_schema(one) and one["kind"] != "CustomResourceDefinition"
    ]
    text = json.dumps({"apiVersion": "v1", "kind": "List", "items": objects})
    ran = kube.kubectl("apply", "--dry-run=server", "-f", "-", stdin=text)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("(server dry run)") == len(objects)


@contextmanager
def bound(kube: KubeServer, scope: str, namespace: str) -> Iterator[None]:
    """The roles of ``deploy/rbac``, bound to a user of the tests in place of the account."""
    made: list[str] = []
    try:
        for one in documents(DEPLOY / "rbac" / scope / "roles.yaml"):
            kind = f"{one['kind'].lower()}s"
            path = RBAC if one["kind"].startswith("Cluster") else f"{RBAC}/namespaces/{namespace}"
            if "subjects" in one:
                user = {"kind": "User", "name": "controller"}
                one["subjects"] = [{**user, "apiGroup": "rbac.authorization.k8s.io"}]
            kube.request("POST", f"{path}/{kind}", one)
            made.append(f"{path}/{kind}/{one['metadata']['name']}")
        yield
    finally:
        for path in made:
            kube.request("DELETE", path)


def may(kube: KubeServer, verb: str, of: Permission, namespace: str, name: str) -> bool:
    asked = {
        "verb": verb,
        "group": of.resource.group,
        "version": of.resource.version,
        "resource": of.resource.plural,
        "subresource": of.subresource,
        "namespace": namespace if of.resource.namespaced else "",
        "name": name,
    }
    review = {
        "apiVersion": "authorization.k8s.io/v1",
        "kind": "SelfSubjectAccessReview",
        "spec": {"resourceAttributes": asked},
    }
    path = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews"
    answer = kube.request("POST", path, review, user="controller")
    return bool(answer["status"]["allowed"])


@pytest.mark.parametrize("scope", ["namespace", "cluster"])
def test_the_roles_allow_what_is_needed_and_where(
    scope: str, kube: KubeServer, namespace: str
) -> None:
    other = kube.create_namespace()
    with bound(kube, scope, namespace):
        for one in NEEDED:
            if one.where is Where.ALL_NAMESPACES and scope == "namespace":
                continue
            for verb in one.verbs:
                name = one.names[0] if one.names else "x"
                assert may(kube, verb, one, namespace, name), f"{verb} {one.rbac_name}"
                if one.names:
                    assert not may(kube, verb, one, namespace, "other")
                elsewhere = one.where is not Where.CONTROLLER and scope == "cluster"
                if one.resource.namespaced:
                    assert may(kube, verb, one, other, name) == elsewhere
