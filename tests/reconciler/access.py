"""RBAC for a test's user, as one line."""

from __future__ import annotations

from mesh.reconciler.kube_resources import Resource
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
