"""What `mesh up` was asked for."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, slots=True)
class UpSettings:
    """Read once, from the command line. A port of 0 is any free one."""

    data_dir: Path = Path(".mesh")
    instances: int = 2
    routers: int = 1
    models: Path | None = None
    host: str = "127.0.0.1"
    grpc_port: int = 8033
    rest_port: int = 8008
    metrics_port: int = 2112
    etcd: tuple[str, ...] = ()  # endpoints; empty: an etcd of our own
    # The file that says them, and the user and certificates: children read it themselves.
    etcd_connection: Path | None = None
    prefix: str = "mesh"
    namespace: str = "default"
    capacity_bytes: int = 1 << 30
    file_roots: tuple[Path, ...] = ()
    storage_config: Path | None = None  # None: a folder of the data directory
    # Passed on to the routers and to the instances as they are.
    router_flags: tuple[str, ...] = ()
    instance_flags: tuple[str, ...] = ()
    log_level: str = "info"
    verbose: bool = False


@dataclass(frozen=True, slots=True)
class Ports:
    """The ports of one run, all chosen and found free."""

    grpc: int
    rest: int
    router_metrics: tuple[int, ...]
    instance_metrics: tuple[int, ...]
    etcd_client: int = 0
    etcd_peer: int = 0


@dataclass(frozen=True, slots=True)
class Addresses:
    """What a person, a client or Prometheus is given."""

    grpc: str
    rest: str
    etcd: tuple[str, ...]
    router_metrics: tuple[str, ...] = field(default_factory=tuple)
    instance_metrics: tuple[str, ...] = field(default_factory=tuple)


def reachable_host(host: str) -> str:
    """A host that can be connected to, for one that is listened on."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(host, host)


def join_host(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
