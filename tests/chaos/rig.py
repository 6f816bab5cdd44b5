"""A mesh that may be harmed: etcd, two routers, three instances, and models of which not all fit.

The mesh is the real command's; etcd is the tests' own and is reached through a proxy, so that both
can be harmed too. ``whole`` is the condition that each scenario begins with and ends at.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from tests.chaos.proxies import ThreadedProxy
from tests.chaos.steady import WAIT_S, Steady
from tests.e2e.asking import (
    Asker,
    eventually,
    http_ask,
    instances_of,
    isvc,
    raw_request,
    routers_of,
    total,
)
from tests.etcd_server import EtcdServer
from tests.up.live import LiveMesh

ROUTERS = 2
INSTANCES = 3
MODELS = 20
SAMPLES = 11  # four of them are the digits that the models are made of, 0.2 to 0.4 MB each
DIGITS = 4
# Three of these hold about two thirds of the models, two of them less than half: there is a load
# every few requests, and what a process that ends had loaded has to push something else out.
CAPACITY = "1536KiB"
# Connections enough that some lead to each router.
CONNECTIONS = 12


def readiness(router: str) -> dict[str, Any]:
    """A router's document, by its metrics address; empty when it is not ready or not there."""
    with contextlib.suppress(OSError):
        status, _, body = http_ask(router, "GET", "/readyz")
        if status == 200:
            document: dict[str, Any] = json.loads(body)
            return document
    return {}


class Rig:
    """One mesh for the scenarios of a session. ``names`` are its models, all alike to a client."""

    def __init__(self, etcd: EtcdServer, proxy: ThreadedProxy, mesh: LiveMesh) -> None:
        self.etcd = etcd
        self.proxy = proxy
        self.mesh = mesh
        self.names = [f"chaos-{number:02d}" for number in range(MODELS)]

    @property
    def address(self) -> str:
        return self.mesh.address

    @property
    def routers(self) -> list[str]:
        """Addresses of their metrics, as ``instances``."""
        return routers_of(self.mesh)

    @property
    def instances(self) -> list[str]:
        return instances_of(self.mesh)

    def register(self, samples: Path) -> None:
        with Asker(self.address) as ask:
            for number, name in enumerate(self.names):
                uri = (samples / f"digits-{number % DIGITS + 1:04d}").as_uri()
                ask.apply(isvc(name, uri))

    def steady(self, **wanted: Any) -> Steady:
        return Steady(self.address, self.names, **wanted)

    # ---- its state --------------------------------------------------------------------------

    def is_ready(self, address: str) -> bool:
        with contextlib.suppress(OSError):
            return http_ask(address, "GET", "/readyz")[0] == 200
        return False

    def is_whole(self) -> bool:
        """All processes are ready, and each router knows the instances and no dead ones."""
        if len(self.mesh.children()) != ROUTERS + INSTANCES:
            return False
        known = [readiness(address) for address in self.routers]
        return all(
            one.get("instances") == INSTANCES and one.get("store_connected") for one in known
        ) and all(self.is_ready(address) for address in self.instances)

    def whole(self) -> None:
        eventually(self.is_whole, f"a whole mesh: {self.mesh.err[-2_000:]}", WAIT_S)

    def loads(self, outcome: str = "loaded") -> float:
        """Loads that have ended so in all instances since each one started."""
        return total(self.instances, "mesh_loads_total", outcome=outcome)

    def loads_of(self, name: str) -> int:
        """Loads of one model that have ended well, by the logs of all instances: other models may
        be loaded at the same time, ahead of requests for one."""
        logs = (self.mesh.data_dir / "logs").glob("instance-*.log")
        return sum(log.read_text(errors="replace").count(f" loaded {name}__") for log in logs)

    def copies(self) -> dict[str, list[str]]:
        """Instances by name of model, as one router tells."""
        with Asker(self.address) as ask:
            return {name: list(row["instance_ids"]) for name, row in ask.rows().items()}

    def busiest(self) -> str:
        """The child (``instance-2``) that holds most of the first and so most used models."""
        copies = self.copies()
        held = [holder for name in self.names[:6] for holder in copies[name]]
        return max(set(held), key=lambda holder: (held.count(holder), holder)).rpartition("-")[0]

    # ---- harm -------------------------------------------------------------------------------

    def pid(self, child: str) -> int:
        return self.mesh.children()[child]

    def signal(self, child: str, number: signal.Signals) -> int:
        pid = self.pid(child)
        os.kill(pid, number)
        return pid

    def is_replaced(self, child: str, pid: int) -> bool:
        return self.mesh.children().get(child, pid) != pid

    @contextlib.contextmanager
    def policy(self, *overrides: str) -> Iterator[None]:
        """Thresholds of the running mesh, as long as the scenario lasts."""
        done = self.mesh.mesh("policy", "set", *overrides)
        assert done.returncode == 0, done.stderr
        try:
            yield
        finally:
            names = [override.partition("=")[0] for override in overrides]
            done = self.mesh.mesh("policy", "unset", *names)
            assert done.returncode == 0, done.stderr

    # ---- clients ----------------------------------------------------------------------------

    def ask_at_once(self, name: str, count: int) -> list[grpc.StatusCode | None]:
        """What becomes of so many requests, sent at once over connections to both routers."""
        request = raw_request(name, input=np.ones((1, 64), np.float32))
        with contextlib.ExitStack() as stack:
            askers = [stack.enter_context(Asker(self.address)) for _ in range(CONNECTIONS)]
            for asker in askers:
                grpc.channel_ready_future(asker.channel).result(timeout=WAIT_S)
            calls = [askers[n % CONNECTIONS].infer_later(request) for n in range(count)]
            return [call.code() if call.exception() else None for call in calls]

    def refused_apply(self, name: str, uri: str) -> tuple[grpc.StatusCode, str]:
        with Asker(self.address) as ask:
            try:
                ask.apply(isvc(name, uri))
            except grpc.RpcError as error:
                return error.code(), error.details() or ""
        raise AssertionError(f"{name} was registered")


class Views:
    """What the routers say of copies, over connections that lead to each of them."""

    def __init__(self, address: str) -> None:
        self._stack = contextlib.ExitStack()
        self._askers = [self._stack.enter_context(Asker(address)) for _ in range(CONNECTIONS)]

    def holders(self) -> set[str]:
        """Ids of instances that have a copy in some router's view."""
        found: set[str] = set()
        for asker in self._askers:
            for row in asker.rows().values():
                found.update(row["instance_ids"])
        return found

    def __enter__(self) -> Views:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
