"""Owns the data directory of `mesh up`: its lock, what it remembers, and the ports of the mesh.

The lock is a ``flock`` on ``DATA_DIR/lock``: the kernel lets go of it when the process dies,
however it dies, so that no stale lock is ever in the way. What is remembered lies in
``state.json`` and is replaced atomically. A file that cannot be read is treated as absent, except
the lock.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class UpRefused(Exception):
    """`mesh up` cannot start here: one message that says what is in the way and what to do."""


@dataclass(frozen=True, slots=True)
class DataDir:
    """The paths below the data directory."""

    root: Path

    @property
    def lock(self) -> Path:
        return self.root / "lock"

    @property
    def state(self) -> Path:
        return self.root / "state.json"

    @property
    def etcd(self) -> Path:
        return self.root / "etcd"

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    @property
    def prometheus_sd(self) -> Path:
        return self.root / "prometheus_sd.json"

    @property
    def prometheus_config(self) -> Path:
        return self.root / "prometheus.yml"

    @property
    def folder_state(self) -> Path:
        return self.root / "folder_sync.json"

    @property
    def storage_config(self) -> Path:
        """KServe's storage secret, where no other folder is named for it."""
        return self.root / "storage-config"

    def cache(self, instance: str) -> Path:
        """The artifact cache of one instance; instances never share one."""
        return self.root / "cache" / instance


@contextlib.contextmanager
def locked(data_dir: DataDir) -> Iterator[None]:
    """Hold the data directory for this process, or raise ``UpRefused`` naming who holds it."""
    try:
        data_dir.logs.mkdir(parents=True, exist_ok=True)
        lock = os.open(data_dir.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise UpRefused(
            f"cannot use the data directory {data_dir.root}: {error.strerror}; "
            "name another one with --data-dir"
        ) from error
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(lock, 64, 0).decode("ascii", "replace").strip() or "unknown"
            raise UpRefused(
                f"another `mesh up` (pid {holder}) runs on the data directory {data_dir.root}; "
                "stop it, or start this one with another --data-dir and other ports"
            ) from error
        os.ftruncate(lock, 0)
        os.pwrite(lock, str(os.getpid()).encode(), 0)
        yield
    finally:
        os.close(lock)


def read_state(path: Path) -> dict[str, Any]:
    """What was remembered; empty when there is nothing, or nothing readable."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def write_atomic(path: Path, text: str) -> None:
    """Replace the file whole: a reader sees the old text or the new one."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, "utf-8")
    partial.replace(path)


def write_state(path: Path, state: dict[str, Any]) -> None:
    write_atomic(path, json.dumps(state, indent=1, sort_keys=True) + "\n")


@dataclass(frozen=True, slots=True)
class PortWish:
    """A port that the mesh is about to listen on, and the flag that moves it."""

    host: str
    port: int
    purpose: str
    flag: str


def port_is_free(host: str, port: int) -> bool:
    """Whether a listener could be opened now. Does not hold the port."""
    try:
        infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise UpRefused(f"--host {host}: {error.strerror or error}") from error
    for family, kind, protocol, _, address in infos:
        with socket.socket(family, kind, protocol) as probe:
            # As our servers do: connections that linger in TIME_WAIT are not in the way.
            # SO_REUSEPORT is not set, so that somebody else's listener with it is noticed.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(address)
                probe.listen(1)
            except OSError as error:
                if error.errno == errno.EADDRINUSE:
                    return False
                if error.errno == errno.EACCES:
                    raise UpRefused(
                        f"port {port} on {host} needs more rights than this user has; "
                        "use a port above 1023"
                    ) from error
                raise UpRefused(f"cannot listen on {host}:{port}: {error.strerror}") from error
    return True


def refuse_taken_ports(wishes: Sequence[PortWish]) -> None:
    """Raise one ``UpRefused`` that names every port that is taken or wanted twice."""
    faults: list[str] = []
    taken: list[str] = []
    seen: dict[int, PortWish] = {}
    for wish in wishes:
        other = seen.setdefault(wish.port, wish)
        if other is not wish:
            faults.append(
                f"port {wish.port} is wanted for {other.purpose} ({other.flag}) and for "
                f"{wish.purpose} ({wish.flag})"
            )
        elif wish.port > 65_535:
            faults.append(f"there is no port {wish.port} ({wish.purpose}, {wish.flag})")
        elif not port_is_free(wish.host, wish.port):
            taken.append(f"port {wish.port} on {wish.host} ({wish.purpose}: {wish.flag})")
    if taken:
        faults.append(
            f"taken: {', '.join(taken)}; stop who listens there, or choose others with these flags"
        )
    if faults:
        raise UpRefused("; ".join(faults))


def free_port(host: str, remembered: int = 0, avoid: frozenset[int] = frozenset()) -> int:
    """The remembered port if it is free, else one that the kernel picks."""
    if remembered and remembered not in avoid and port_is_free(host, remembered):
        return remembered
    for _ in range(100):
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.create_server((host, 0), family=family) as probe:
            port = int(probe.getsockname()[1])
        if port not in avoid:
            return port
    raise UpRefused(f"no free port on {host}")


def prometheus_files(
    data_dir: DataDir, routers: Sequence[str], instances: Sequence[str]
) -> dict[Path, str]:
    """The file_sd list of the metrics addresses, and a Prometheus configuration that reads it."""
    targets = [
        {"targets": [address], "labels": {"job": f"mesh-{role}", "instance": f"{role}-{number}"}}
        for role, addresses in (("router", routers), ("instance", instances))
        for number, address in enumerate(addresses, 1)
    ]
    config = (
        "# Written by `mesh up`. Start: prometheus --config.file=prometheus.yml\n"
        "global:\n"
        "  scrape_interval: 5s\n"
        "scrape_configs:\n"
        "  - job_name: mesh\n"
        "    file_sd_configs:\n"
        f"      - files: [{json.dumps(str(data_dir.prometheus_sd.resolve()))}]\n"
    )
    return {
        data_dir.prometheus_sd: json.dumps(targets, indent=1) + "\n",
        data_dir.prometheus_config: config,
    }
