"""Processes that end under traffic.

kill -9 of an instance no client notices, of a router only its connections; an orderly end of
either, nobody; and the mesh itself ends when what it has begun is answered.
"""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests.e2e.asking import LABELS, Asker, eventually, instances_of, total
from tests.e2e.conftest import StartMesh
from tests.e2e.models import rounds, slow

pytestmark = [pytest.mark.e2e, pytest.mark.etcd]


class Traffic:
    """Clients that ask without pause; what went wrong is kept."""

    def __init__(self, address: str, clients: int = 3) -> None:
        self.failures: list[grpc.RpcError] = []
        self.answers = 0
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._ask, args=(address,)) for _ in range(clients)
        ]

    def _ask(self, address: str) -> None:
        with Asker(address) as ask:
            while not self._stop.is_set():
                try:
                    assert ask.labels("iris-0001") == LABELS
                    self.answers += 1
                except grpc.RpcError as error:
                    self.failures.append(error)
                    # grpcio fails every call at once until it has a connection again.
                    grpc.channel_ready_future(ask.channel).result(timeout=60)

    def more(self, count: int) -> None:
        """Until so many further answers have come."""
        target = self.answers + count
        eventually(lambda: self.answers >= target, "more answers")

    def __enter__(self) -> Traffic:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()


def test_killed_processes_come_back_and_the_mesh_serves_on(
    samples: Path, start_mesh: StartMesh
) -> None:
    mesh = start_mesh("--models", str(samples), "--routers", "2").ready()
    with Asker(mesh.address) as ask:
        assert ask.labels("iris-0001") == LABELS
        [holder] = ask.rows()["iris-0001"]["instance_ids"]
    victim = holder.rpartition("-")[0]  # instance-N

    with Traffic(mesh.address) as traffic:
        traffic.more(100)
        before = mesh.children()[victim]
        os.kill(before, signal.SIGKILL)
        traffic.more(200)
        mesh.until(lambda: mesh.children().get(victim, before) != before, "a new instance")
        traffic.more(100)
    assert traffic.failures == []

    mesh.until(lambda: "the mesh is complete again" in mesh.err, "a complete mesh")
    with Traffic(mesh.address) as traffic:
        traffic.more(100)
        before = mesh.children()["router-1"]
        os.kill(before, signal.SIGKILL)
        traffic.more(200)
    # Those that were on it lost what was under way, and found the other one.
    assert len(traffic.failures) <= 3
    assert all(error.code() is grpc.StatusCode.UNAVAILABLE for error in traffic.failures)
    mesh.until(lambda: mesh.err.count("the mesh is complete again") == 2, "a complete mesh")
    assert mesh.children()["router-1"] != before
    with Asker(mesh.address) as ask:
        # The killed one's record goes with its lease, a little later.
        assert len(ask.rows("instances")) >= 2


def test_an_orderly_end_of_a_process_costs_no_request(samples: Path, start_mesh: StartMesh) -> None:
    mesh = start_mesh("--models", str(samples), "--routers", "2").ready()
    with Asker(mesh.address) as ask:
        assert ask.labels("iris-0001") == LABELS
        [holder] = ask.rows()["iris-0001"]["instance_ids"]
    with Traffic(mesh.address, clients=4) as traffic:
        for victim in (holder.rpartition("-")[0], "router-1", "router-2"):
            traffic.more(100)
            before = mesh.children()[victim]
            os.kill(before, signal.SIGTERM)
            mesh.until(
                lambda victim=victim, before=before: mesh.children().get(victim, before) != before,
                f"a new {victim}",
            )
            traffic.more(100)
            told = mesh.err.count(f"{victim} is ready")
            mesh.until(
                lambda victim=victim: f"{victim} is ready" in mesh.err, f"{victim} being ready"
            )
            assert told <= 1
    assert traffic.failures == [], traffic.failures[:2]


def test_what_was_begun_is_answered_when_the_mesh_is_stopped(
    tmp_path: Path, start_mesh: StartMesh
) -> None:
    root = tmp_path / "root"
    slow(root / "slow" / "model.onnx")
    mesh = start_mesh("--models", str(root), "--instances", "1").ready()
    with Asker(mesh.address) as ask:
        eventually(lambda: "slow" in ask.rows(), "the model")  # its files have just been written
        ask.infer(rounds("slow", 1))
        running: Any = ask.infer_later(rounds("slow", 40_000))
        instances = instances_of(mesh)
        eventually(lambda: total(instances, "mesh_inflight_requests") >= 1, "it being inside")
        assert mesh.stop() == 0
        assert running.result(timeout=60)
