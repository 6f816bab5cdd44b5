"""From what was asked for to ports, files and command lines: everything before a child is started.

Touches the data directory and probes ports; starts nothing. What is in the way is ``UpRefused``.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mesh.core.errors import MeshError
from mesh.store.etcd_binary import EtcdBinary, find_etcd
from mesh.up.child import ChildCommand, ReadyCheck, http_ready
from mesh.up.etcd_server import etcd_command, etcd_for_data
from mesh.up.layout import (
    DataDir,
    PortWish,
    UpRefused,
    free_port,
    prometheus_files,
    read_state,
    refuse_taken_ports,
    write_atomic,
    write_state,
)
from mesh.up.settings import Addresses, Ports, UpSettings, join_host, reachable_host

MESH_COMMAND = (sys.executable, "-m", "mesh.cli")


@dataclass(frozen=True, slots=True)
class Assembly:
    """All that is needed to start: ``etcd`` is None when one was named from outside.
    ``storage_config`` is the folder with the storage secret that every instance reads."""

    commands: tuple[ChildCommand, ...]
    addresses: Addresses
    etcd: EtcdBinary | None
    storage_config: Path


def assemble(
    settings: UpSettings, data_dir: DataDir, mesh_command: Sequence[str] = MESH_COMMAND
) -> Assembly:
    """Choose and check everything, write the files of the data directory. Raises UpRefused."""
    state = read_state(data_dir.state)
    binary = None if settings.etcd else _etcd_binary(data_dir, state)
    ports = choose_ports(settings, state)
    addresses = _addresses(settings, ports)
    for path, text in prometheus_files(
        data_dir, addresses.router_metrics, addresses.instance_metrics
    ).items():
        write_atomic(path, text)
    storage_config = _storage_config(settings, data_dir)
    _remember(data_dir, state, ports, addresses, binary, storage_config)
    commands: list[ChildCommand] = []
    if binary is not None:
        commands.append(etcd_command(binary.path, data_dir, ports))
    for number, port in enumerate(ports.router_metrics, 1):
        commands.append(_router(settings, data_dir, addresses, ports, number, port, mesh_command))
    for number, port in enumerate(ports.instance_metrics, 1):
        flags = (*settings.instance_flags, "--storage-config", str(storage_config))
        commands.append(_instance(settings, data_dir, addresses, number, port, mesh_command, flags))
    return Assembly(tuple(commands), addresses, binary, storage_config)


def choose_ports(settings: UpSettings, state: dict[str, Any]) -> Ports:
    """The ports that were asked for, found free; and free ones where any will do."""
    host, taken = settings.host, set[int]()

    def chosen(port: int, remembered: str = "", on: str = host) -> int:
        found = port or free_port(on, int(state.get(remembered) or 0), frozenset(taken))
        taken.add(found)
        return found

    grpc, rest = chosen(settings.grpc_port), chosen(settings.rest_port)
    metrics = [
        chosen(settings.metrics_port + number if settings.metrics_port else 0)
        for number in range(settings.routers + settings.instances)
    ]
    wishes = [
        PortWish(host, grpc, "gRPC", "--grpc-port"),
        PortWish(host, rest, "REST", "--rest-port"),
        *(
            PortWish(host, port, f"metrics of {_owner(settings, at)}", "--metrics-port")
            for at, port in enumerate(metrics)
        ),
    ]
    refuse_taken_ports(wishes)
    own_etcd = not settings.etcd
    return Ports(
        grpc=grpc,
        rest=rest,
        router_metrics=tuple(metrics[: settings.routers]),
        instance_metrics=tuple(metrics[settings.routers :]),
        etcd_client=chosen(0, "etcd_client_port", "127.0.0.1") if own_etcd else 0,
        etcd_peer=chosen(0, "etcd_peer_port", "127.0.0.1") if own_etcd else 0,
    )


def _owner(settings: UpSettings, at: int) -> str:
    if at < settings.routers:
        return f"router-{at + 1}"
    return f"instance-{at - settings.routers + 1}"


def _storage_config(settings: UpSettings, data_dir: DataDir) -> Path:
    """Absolute. One of our own is there from the start, for `mesh apply` to write into."""
    if settings.storage_config is not None:
        return settings.storage_config.resolve()
    folder = data_dir.storage_config
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise UpRefused(f"cannot make the folder {folder}: {error.strerror}") from error
    return folder.resolve()


def _etcd_binary(data_dir: DataDir, state: dict[str, Any]) -> EtcdBinary:
    try:
        found = find_etcd()
    except MeshError as error:
        raise UpRefused(f"{error.message}; or name one that runs already with --etcd") from error
    known = state.get("etcd_version")
    has_data = data_dir.etcd.is_dir() and isinstance(known, list) and len(known) == 2
    return etcd_for_data(found, (int(known[0]), int(known[1])) if has_data and known else None)


def _addresses(settings: UpSettings, ports: Ports) -> Addresses:
    host = reachable_host(settings.host)
    return Addresses(
        grpc=join_host(host, ports.grpc),
        rest=join_host(host, ports.rest),
        etcd=settings.etcd or (f"127.0.0.1:{ports.etcd_client}",),
        router_metrics=tuple(join_host(host, port) for port in ports.router_metrics),
        instance_metrics=tuple(join_host(host, port) for port in ports.instance_metrics),
    )


def _remember(
    data_dir: DataDir,
    state: dict[str, Any],
    ports: Ports,
    addresses: Addresses,
    binary: EtcdBinary | None,
    storage_config: Path,
) -> None:
    now: dict[str, Any] = {
        "storage_config": str(storage_config),
        "grpc": addresses.grpc,
        "rest": addresses.rest,
        "etcd": list(addresses.etcd),
        "router_metrics": list(addresses.router_metrics),
        "instance_metrics": list(addresses.instance_metrics),
    }
    if binary is not None:
        now["etcd_client_port"] = ports.etcd_client
        now["etcd_peer_port"] = ports.etcd_peer
        now["etcd_version"] = list(binary.version[:2])
    write_state(data_dir.state, {**state, **now})


def _shared_flags(settings: UpSettings, addresses: Addresses, metrics_port: int) -> list[str]:
    etcd: tuple[str, str] = ("--etcd", ",".join(addresses.etcd))
    if settings.etcd_connection is not None:
        etcd = ("--etcd-connection", str(settings.etcd_connection))
    return [
        *etcd,
        *("--prefix", settings.prefix, "--namespace", settings.namespace),
        *("--metrics-host", settings.host, "--metrics-port", str(metrics_port)),
        *("--log-level", settings.log_level),
    ]


def _router(
    settings: UpSettings,
    data_dir: DataDir,
    addresses: Addresses,
    ports: Ports,
    number: int,
    metrics_port: int,
    mesh_command: Sequence[str],
) -> ChildCommand:
    name = f"router-{number}"
    return ChildCommand(
        name=name,
        argv=(
            *mesh_command,
            "router",
            *("--name", name),
            *_shared_flags(settings, addresses, metrics_port),
            *("--host", settings.host),
            *("--grpc-port", str(ports.grpc), "--rest-port", str(ports.rest)),
            *settings.router_flags,
        ),
        ready=_readiness(settings, metrics_port),
        log_path=data_dir.logs / f"{name}.log",
        start_stage=1,
        stop_stage=0,
    )


def _instance(
    settings: UpSettings,
    data_dir: DataDir,
    addresses: Addresses,
    number: int,
    metrics_port: int,
    mesh_command: Sequence[str],
    flags: Sequence[str],
) -> ChildCommand:
    name = f"instance-{number}"
    roots: list[Path] = [*settings.file_roots]
    if settings.models is not None:
        roots.append(settings.models)
    return ChildCommand(
        name=name,
        argv=(
            *mesh_command,
            "instance",
            *("--name", name),
            *_shared_flags(settings, addresses, metrics_port),
            # Only routers of this machine talk to it.
            *("--host", "127.0.0.1", "--grpc-port", "0"),
            *("--capacity", str(settings.capacity_bytes)),
            *("--cache-dir", str(data_dir.cache(name))),
            *(part for root in roots for part in ("--file-root", str(root.resolve()))),
            *flags,
        ),
        ready=_readiness(settings, metrics_port),
        log_path=data_dir.logs / f"{name}.log",
        start_stage=1,
        stop_stage=1,
    )


def _readiness(settings: UpSettings, metrics_port: int) -> ReadyCheck:
    host = reachable_host(settings.host)

    async def ready() -> bool:
        return await http_ready(host, metrics_port, "/readyz")

    return ready
