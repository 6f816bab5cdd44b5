"""What `mesh up` does not start on: a data directory in use, and ports that are taken."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from tests.e2e.conftest import Shared, StartMesh
from tests.up.live import LiveMesh

pytestmark = [pytest.mark.e2e, pytest.mark.etcd]


def test_a_data_directory_in_use(shared: Shared) -> None:
    done = shared.mesh.mesh("up", "--data-dir", str(shared.mesh.data_dir), "--grpc-port", "0")
    assert done.returncode == 1
    assert str(shared.mesh.process.pid) in done.stderr
    assert str(shared.mesh.data_dir) in done.stderr and "--data-dir" in done.stderr


def test_every_port_that_is_taken_is_named(start_mesh: StartMesh, tmp_path: Path) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as one,
        socket.create_server(("127.0.0.1", 0)) as other,
    ):
        grpc_port, rest_port = one.getsockname()[1], other.getsockname()[1]
        mesh: LiveMesh = start_mesh("--grpc-port", str(grpc_port), "--rest-port", str(rest_port))
        assert mesh.process.wait(60) == 1
    for port, flag in ((grpc_port, "--grpc-port"), (rest_port, "--rest-port")):
        assert str(port) in mesh.err and flag in mesh.err
