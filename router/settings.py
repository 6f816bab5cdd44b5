"""What an operator may set for one router; built once, in a composition root."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from mesh.core.policy import Policy
from mesh.store.etcd_options import EtcdOptions
from mesh.wire.limits import INSIDE, PUBLIC, Limits


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """PEM files of the router's listeners. With ``client_ca`` only clients that show a certificate
    of these authorities get in (mutual TLS)."""

    cert: Path
    key: Path
    client_ca: Path | None = None


@dataclass(frozen=True, slots=True)
class RouterSettings:
    """Bytes, counts, milliseconds as named. A value out of range fails here, with its name."""

    host: str = "127.0.0.1"
    grpc_port: int = 8033  # 0: any free one
    rest_port: int | None = 8008  # None: no REST
    metrics_host: str = "127.0.0.1"
    metrics_port: int | None = 2112  # None: no listener
    reuse_port: bool = True  # several routers share gRPC and REST ports
    etcd_endpoints: tuple[str, ...] = ("127.0.0.1:2379",)
    etcd: EtcdOptions | None = None  # in place of etcd_endpoints: with TLS, or as a user
    prefix: str = "mesh"
    namespace: str = "default"
    name: str = "router"  # start of the router's id; the rest is drawn at each start
    tls: TlsFiles | None = None
    drain_notice_ms: int = 500  # goes on serving for so long after it has told that it leaves
    drain_timeout_ms: int = 20_000  # then for so long at most lets requests in flight finish
    per_model_metrics: bool = False
    # ModelMesh's DataplaneApiConfig: a file, read again when it changes, or its JSON; "": none.
    dataplane_config: str = ""
    software_version: str = "0.1.0"
    policy: Policy = field(default_factory=Policy)
    limits: Limits = PUBLIC
    inside_limits: Limits = INSIDE

    def __post_init__(self) -> None:
        if not self.etcd_endpoints:
            raise ValueError("RouterSettings.etcd_endpoints must name at least one endpoint")
        for what in ("drain_notice_ms", "drain_timeout_ms"):
            if getattr(self, what) < 0:
                raise ValueError(f"RouterSettings.{what} is {getattr(self, what)}; at least 0")

    @property
    def etcd_options(self) -> EtcdOptions:
        return self.etcd or EtcdOptions(self.etcd_endpoints)
