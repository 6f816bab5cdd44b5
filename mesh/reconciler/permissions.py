"""What the controller asks of the API server: every resource, every verb, and where.

The roles in ``deploy/rbac`` grant this and nothing else: a test holds the two together. Pure data;
whoever has the controller do something new to an object adds it here.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from mesh.reconciler.kube_resources import (
    AUTOSCALERS,
    BUDGETS,
    CLUSTER_SERVING_RUNTIMES,
    CONFIG_MAPS,
    DEPLOYMENTS,
    EVENTS,
    INFERENCE_SERVICES,
    LEASES,
    NAMESPACES,
    PODS,
    PREDICTORS,
    SECRETS,
    SERVICES,
    SERVING_RUNTIMES,
    Resource,
)

_READ: Final = ("get", "list", "watch")
# Server-side apply is a patch, which also needs `create` for an object that is not there.
_OWN: Final = (*_READ, "create", "patch", "delete")


class Where(StrEnum):
    """The namespaces that a permission is for."""

    SERVED = "served"  # each namespace with a mesh
    CONTROLLER = "controller"  # only the one that the controller runs in
    CLUSTER = "cluster"  # no namespace: the objects have none
    ALL_NAMESPACES = "all-namespaces"  # as CLUSTER, and only with --all-namespaces


@dataclass(frozen=True, slots=True)
class Permission:
    """``names``: only objects of these names; () is all."""

    resource: Resource
    verbs: tuple[str, ...]
    where: Where = Where.SERVED
    subresource: str = ""
    names: tuple[str, ...] = ()

    @property
    def rbac_name(self) -> str:
        plural = self.resource.plural
        return f"{plural}/{self.subresource}" if self.subresource else plural


NEEDED: Final[tuple[Permission, ...]] = (
    # Patched for the finalizer.
    Permission(INFERENCE_SERVICES, (*_READ, "patch", "update")),
    Permission(PREDICTORS, (*_READ, "patch", "update")),
    Permission(INFERENCE_SERVICES, ("patch", "update"), subresource="status"),
    Permission(PREDICTORS, ("patch", "update"), subresource="status"),
    Permission(SERVING_RUNTIMES, _READ),
    Permission(CLUSTER_SERVING_RUNTIMES, _READ, Where.CLUSTER),
    # Lists and watches name it by a field selector, without which the name would not count.
    Permission(SECRETS, _READ, names=("storage-config",)),
    Permission(CONFIG_MAPS, _OWN),
    Permission(SERVICES, _OWN),
    Permission(DEPLOYMENTS, _OWN),
    Permission(BUDGETS, _OWN),
    Permission(AUTOSCALERS, _OWN),
    # An annotation, so that the kubelet mounts a changed secret at once.
    Permission(PODS, ("list", "patch")),
    Permission(EVENTS, ("create", "patch")),
    Permission(LEASES, ("get", "create", "update", "patch"), Where.CONTROLLER),
    Permission(NAMESPACES, _READ, Where.ALL_NAMESPACES),
)
