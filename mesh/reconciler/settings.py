"""What an operator may set for the controller; built once, in a composition root."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from mesh.reconciler.config import ControllerConfig
from mesh.store.etcd_options import EtcdOptions


@dataclass(frozen=True, slots=True)
class ControllerSettings:
    """``config`` is what the ConfigMap model-serving-config is laid over."""

    kubeconfig: Path | None = None  # None: as the pod that this runs in
    namespace: str | None = None  # None: the kubeconfig's own, or the pod's
    all_namespaces: bool = False  # those with the label modelmesh-enabled: "true"
    etcd_endpoints: tuple[str, ...] = ("127.0.0.1:2379",)
    etcd: EtcdOptions | None = None  # in place of etcd_endpoints: with TLS, or as a user
    prefix: str = "mesh"
    leader_elect: bool = False
    # Serving pods and routers are made in the cluster; without, they are somebody else's.
    workloads: bool = True
    # For serving pods outside of the cluster: where the storage secret is written to, a folder for
    # each namespace where all are served.
    storage_config_dir: Path | None = None
    metrics_host: str = "127.0.0.1"
    metrics_port: int | None = 0  # None: no listener
    workers: int = 16  # objects that are reconciled at once
    software_version: str = "0.1.0"
    config: ControllerConfig = field(default_factory=ControllerConfig)

    def __post_init__(self) -> None:
        if self.all_namespaces and self.namespace is not None:
            raise ValueError("--namespace and --all-namespaces exclude each other")
        if not self.etcd_endpoints:
            raise ValueError("ControllerSettings.etcd_endpoints must name at least one endpoint")
        if self.workers < 1:
            raise ValueError("ControllerSettings.workers must be at least 1")

    @property
    def etcd_options(self) -> EtcdOptions:
        return self.etcd or EtcdOptions(self.etcd_endpoints)
