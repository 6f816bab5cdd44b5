"""etcd that is not there: at the start the mesh waits and says so; later it serves and loads."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from tests.e2e.asking import LABELS, Asker, eventually, instances_of, isvc, routers_of, total
from tests.e2e.conftest import StartMesh
from tests.etcd_server import EtcdServer

pytestmark = [pytest.mark.e2e, pytest.mark.etcd]


@pytest.fixture
def etcd() -> Iterator[EtcdServer]:
    server = EtcdServer()  # not started
    try:
        yield server
    finally:
        server.close()


def test_waits_at_the_start_serves_when_it_goes_and_catches_up_when_it_is_back(
    etcd: EtcdServer, samples: Path, start_mesh: StartMesh
) -> None:
    mesh = start_mesh("--etcd", etcd.endpoint, "--file-root", str(samples), "--instances", "1")

    def said(part: str) -> bool:
        logs = (mesh.data_dir / "logs").glob("*.log")
        return all(etcd.endpoint in log.read_text() for log in logs) and part in mesh.err

    mesh.until(lambda: said(etcd.endpoint), "a word about the etcd that is waited for")
    assert "mesh is ready" not in mesh.out
    etcd.start()
    mesh.ready()

    with Asker(mesh.address) as ask:
        ask.apply(isvc("loaded", (samples / "iris-0001").as_uri()))
        ask.apply(isvc("asleep", (samples / "iris-0001").as_uri()))
        assert ask.labels("loaded") == LABELS

        etcd.kill()
        routers = routers_of(mesh)
        for _ in range(20):
            assert ask.labels("loaded") == LABELS
        mesh.until(lambda: total(routers, "mesh_store_connected") == 0, "the loss being noticed")
        for _ in range(20):
            assert ask.labels("loaded") == LABELS
        assert ask.labels("asleep") == LABELS, "what nobody has asked for yet is loaded too"
        assert refusal_of_a_write(ask, samples) is grpc.StatusCode.UNAVAILABLE

        etcd.start()
        mesh.until(lambda: total(routers, "mesh_store_connected") == 1, "the store's return")
        assert ask.labels("asleep") == LABELS
        assert ask.labels("loaded") == LABELS
        ask.apply(isvc("new", (samples / "iris-0001").as_uri()))
        assert ask.labels("new") == LABELS
        eventually(
            lambda: all(r["copies_loaded"] == 1 for r in ask.rows().values()), "one view of all"
        )
        assert total(instances_of(mesh), "mesh_loads_total", outcome="loaded") == 3, "one each"
    assert mesh.children().keys() == {"router-1", "instance-1"}, "nobody had to be restarted"
    assert "died" not in mesh.err


def refusal_of_a_write(ask: Asker, samples: Path) -> grpc.StatusCode:
    """What a write is answered while there is no store."""
    try:
        ask.apply(isvc("in-vain", (samples / "iris-0001").as_uri()))
    except grpc.RpcError as error:
        code: grpc.StatusCode = error.code()
        return code
    raise AssertionError("written without a store")
