"""RBAC for a test's user, as one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mesh.reconciler.kube_resources import Resource
from mesh.reconciler.permissions import NEEDED, Where
from tests.kube_server import KubeServer


def grant(kube: KubeServer, namespace: str, user: str, resource: Resource, *verbs: str) -> None:
    """A role for that resource in that namespace, bound to the user."""
    base = f"/apis/rbac.authorization.k8s.io/v1/namespaces/{namespace}"
    name = f"{user}-{resource.plural}"
    rule = {"apiGroups": [resource.group], "resources": [resource.plural], "verbs": list(verbs)}
    kube.request("POST", f"{base}/roles", {"metadata": {"name": name}, "rules": [rule]})
    kube.request(
        "POST",
        f"{base}/rolebindings",
        {
            "metadata": {"name": name},
            "roleRef": {
                "apiGroup": "rbac.authorization.k8s.io",
                "kind": "Role",
                "name": name,
            },
            "subjects": [{"kind": "User", "name": user}],
        },
    )


def revoke(kube: KubeServer, namespace: str, user: str, resource: Resource) -> None:
    base = f"/apis/rbac.authorization.k8s.io/v1/namespaces/{namespace}"
    kube.request("DELETE", f"{base}/rolebindings/{user}-{resource.plural}")
    kube.request("DELETE", f"{base}/roles/{user}-{resource.plural}")


@contextmanager
def granted(
    kube: KubeServer, namespace: str, user: str, *, but: tuple[str, str] = ("", "")
) -> Iterator[None]:
    """All that a controller of one namespace needs, except for one verb of one resource (as RBAC
    names it). What is cluster-wide is taken back at the end: other tests have the same user."""
    roles: dict[bool, list[dict[str, Any]]] = {False: [], True: []}
    for one in NEEDED:
        if one.where is Where.ALL_NAMESPACES:
            continue
        verbs = [verb for verb in one.verbs if (one.rbac_name, verb) != but]
        rule = {"apiGroups": [one.resource.group], "resources": [one.rbac_name], "verbs": verbs}
        if one.names:
            rule["resourceNames"] = list(one.names)
        roles[one.where is Where.CLUSTER].append(rule)
    base = "/apis/rbac.authorization.k8s.io/v1"
    made = []
    for whole, rules in roles.items():
        kind = "ClusterRole" if whole else "Role"
        place = base if whole else f"{base}/namespaces/{namespace}"
        name = f"{namespace}-{user}"
        about = {
            "metadata": {"name": name},
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": kind, "name": name},
            "subjects": [{"kind": "User", "name": user}],
        }
        plural = f"{kind.lower()}s"
        kube.request("POST", f"{place}/{plural}", {"metadata": {"name": name}, "rules": rules})
        kube.request("POST", f"{place}/{kind.lower()}bindings", about)
        made += [f"{place}/{kind.lower()}bindings/{name}", f"{place}/{plural}/{name}"]
    try:
        yield
    finally:
        for path in made:
            kube.request("DELETE", path)


def allow(kube: KubeServer, namespace: str, user: str, resource: Resource, verb: str) -> None:
    """What was kept back."""
    path = f"/apis/rbac.authorization.k8s.io/v1/namespaces/{namespace}/roles/{namespace}-{user}"
    role = kube.request("GET", path)
    rule = {"apiGroups": [resource.group], "resources": [resource.plural], "verbs": [verb]}
    role["rules"].append(rule)
    kube.request("PUT", path, role)
