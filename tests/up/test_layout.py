"""The data directory's lock and memory, and the ports, on real files and sockets."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from mesh.up.layout import (
    DataDir,
    PortWish,
    UpRefused,
    free_port,
    locked,
    port_is_free,
    prometheus_files,
    read_state,
    refuse_taken_ports,
    write_state,
)

HOST = "127.0.0.1"


def test_a_second_holder_of_the_data_directory_is_refused_by_pid(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path\n"
        "from mesh.up.layout import DataDir, locked\n"
        "with locked(DataDir(Path(sys.argv[1]))):\n"
        "    print('held', flush=True); sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    ) as holder:
        assert holder.stdout is not None and holder.stdin is not None
        assert holder.stdout.readline() == b"held\n"
        with (
            pytest.raises(UpRefused, match=rf"pid {holder.pid}\).*--data-dir"),
            locked(DataDir(tmp_path)),
        ):
            pass
        holder.kill()
    with locked(DataDir(tmp_path)):  # a lock dies with its holder
        assert (tmp_path / "lock").read_text() == str(os.getpid())


def test_a_data_directory_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UpRefused, match="--data-dir"), locked(DataDir(tmp_path / "file" / "x")):
        pass


@pytest.mark.parametrize("text", ["", "{", "[]", "3"])
def test_a_broken_memory_is_an_empty_one(tmp_path: Path, text: str) -> None:
    (tmp_path / "state.json").write_text(text)
    assert read_state(tmp_path / "state.json") == {}


def test_the_memory_is_read_back(tmp_path: Path) -> None:
    write_state(tmp_path / "state.json", {"etcd_client_port": 7})
    assert read_state(tmp_path / "state.json") == {"etcd_client_port": 7}
    assert [path.name for path in tmp_path.iterdir()] == ["state.json"]


def test_every_taken_port_is_named_with_its_flag() -> None:
    with socket.create_server((HOST, 0)) as one, socket.create_server((HOST, 0)) as two:
        grpc, rest = one.getsockname()[1], two.getsockname()[1]
        with pytest.raises(UpRefused) as refused:
            refuse_taken_ports(
                [
                    PortWish(HOST, grpc, "gRPC", "--grpc-port"),
                    PortWish(HOST, rest, "REST", "--rest-port"),
                ]
            )
    text = str(refused.value)
    assert text.startswith("taken: ")
    assert f"port {grpc} on {HOST} (gRPC: --grpc-port)" in text
    assert f"port {rest} on {HOST} (REST: --rest-port)" in text


def test_a_port_shared_with_so_reuseport_is_taken_all_the_same() -> None:
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        other.bind((HOST, 0))
        other.listen()
        assert not port_is_free(HOST, other.getsockname()[1])


def test_the_same_port_wanted_twice_is_named() -> None:
    port = free_port(HOST)
    with pytest.raises(UpRefused, match=r"gRPC \(--grpc-port\) and for REST \(--rest-port\)"):
        refuse_taken_ports(
            [
                PortWish(HOST, port, "gRPC", "--grpc-port"),
                PortWish(HOST, port, "REST", "--rest-port"),
            ]
        )


def test_a_port_beyond_the_last_is_named() -> None:
    with pytest.raises(UpRefused, match="no port 65536"):
        refuse_taken_ports([PortWish(HOST, 65_536, "metrics", "--metrics-port")])


def test_a_host_that_is_not_ours_is_refused() -> None:
    with pytest.raises(UpRefused, match=r"192\.0\.2\.1"):
        port_is_free("192.0.2.1", 8033)


def test_a_remembered_port_is_kept_while_it_is_free() -> None:
    port = free_port(HOST)
    assert free_port(HOST, remembered=port) == port
    assert free_port(HOST, remembered=port, avoid=frozenset({port})) != port
    with socket.create_server((HOST, port)):
        assert free_port(HOST, remembered=port) != port


def test_prometheus_is_told_of_every_metrics_address(tmp_path: Path) -> None:
    data_dir = DataDir(tmp_path)
    files = prometheus_files(data_dir, ["127.0.0.1:2112"], ["127.0.0.1:2113", "127.0.0.1:2114"])
    targets = json.loads(files[data_dir.prometheus_sd])
    assert [entry["targets"] for entry in targets] == [
        ["127.0.0.1:2112"],
        ["127.0.0.1:2113"],
        ["127.0.0.1:2114"],
    ]
    assert [tuple(entry["labels"].values()) for entry in targets] == [
        ("mesh-router", "router-1"),
        ("mesh-instance", "instance-1"),
        ("mesh-instance", "instance-2"),
    ]
    assert str(data_dir.prometheus_sd.resolve()) in files[data_dir.prometheus_config]
