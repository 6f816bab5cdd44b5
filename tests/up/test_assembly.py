"""From settings to ports, files and command lines; and which etcd fits which data."""

from __future__ import annotations

import json
import socket
import stat
from pathlib import Path

import pytest

from mesh.store.etcd_binary import EtcdBinary, caution_of
from mesh.up.assembly import assemble, choose_ports
from mesh.up.child import LINE_MAX_BYTES, RotatingLog, describe_exit
from mesh.up.etcd_server import etcd_for_data
from mesh.up.layout import DataDir, UpRefused, free_port, locked, read_state
from mesh.up.settings import UpSettings
from mesh.up.terminal import is_alarm


def any_ports(data_dir: Path, **more: object) -> UpSettings:
    return UpSettings(data_dir=data_dir, grpc_port=0, rest_port=0, metrics_port=0, **more)  # type: ignore[arg-type]


def test_metrics_ports_run_on_routers_first() -> None:
    # A run of four free ports; somebody else could take one meanwhile, hence the tries.
    for _ in range(20):
        base = free_port("127.0.0.1")
        settings = UpSettings(
            grpc_port=0, rest_port=0, metrics_port=base, routers=2, instances=2, etcd=("e:1",)
        )
        try:
            ports = choose_ports(settings, {})
        except UpRefused:
            continue
        assert ports.router_metrics == (base, base + 1)
        assert ports.instance_metrics == (base + 2, base + 3)
        assert (ports.etcd_client, ports.etcd_peer) == (0, 0)
        return
    pytest.fail("no run of four free ports in twenty tries")


def test_a_taken_metrics_port_names_whose_it_is() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        settings = UpSettings(grpc_port=0, rest_port=0, metrics_port=port, etcd=("e:1",))
        with pytest.raises(UpRefused, match=r"metrics of router-1: --metrics-port"):
            choose_ports(settings, {})


def test_children_read_etcds_secrets_themselves(tmp_path: Path) -> None:
    file = tmp_path / "etcd_connection"
    settings = any_ports(tmp_path, etcd=("https://e:1",), etcd_connection=file)
    data_dir = DataDir(tmp_path)
    with locked(data_dir):
        assembly = assemble(settings, data_dir, ("mesh",))
    assert [one.name for one in assembly.commands] == ["router-1", "instance-1", "instance-2"]
    for command in assembly.commands:
        assert command.argv[command.argv.index("--etcd-connection") + 1] == str(file)
        assert "--etcd" not in command.argv


def test_etcd_ports_are_remembered(tmp_path: Path) -> None:
    data_dir = DataDir(tmp_path)
    with locked(data_dir):
        first = assemble(any_ports(tmp_path), data_dir).addresses.etcd
        assert assemble(any_ports(tmp_path), data_dir).addresses.etcd == first


def test_the_command_lines_and_the_files_agree(tmp_path: Path) -> None:
    models = tmp_path / "models"
    models.mkdir()
    data_dir = DataDir(tmp_path / "data")
    settings = any_ports(
        tmp_path / "data",
        models=models,
        routers=2,
        capacity_bytes=123 << 20,
        instance_flags=("--allow-pickle",),
    )
    with locked(data_dir):
        assembly = assemble(settings, data_dir, ("mesh",))
    commands = {command.name: command for command in assembly.commands}
    assert list(commands) == ["etcd", "router-1", "router-2", "instance-1", "instance-2"]
    stages = {c.name: (c.start_stage, c.stop_stage) for c in assembly.commands}
    assert stages["etcd"] == (0, 2)
    assert stages["router-1"] == (1, 0) and stages["instance-2"] == (1, 1)
    router, instance = commands["router-1"].argv, commands["instance-1"].argv
    grpc_port = assembly.addresses.grpc.rpartition(":")[2]
    assert router[router.index("--grpc-port") + 1] == grpc_port
    assert instance[instance.index("--capacity") + 1] == str(123 << 20)
    assert instance[instance.index("--file-root") + 1] == str(models)
    assert "--allow-pickle" in instance and "--allow-pickle" not in router
    caches = {c.argv[c.argv.index("--cache-dir") + 1] for c in assembly.commands[3:]}
    assert len(caches) == 2, "instances never share a cache"
    assert f"--data-dir={data_dir.etcd}" in commands["etcd"].argv
    targets = json.loads(data_dir.prometheus_sd.read_text())
    assert [t for entry in targets for t in entry["targets"]] == [
        *assembly.addresses.router_metrics,
        *assembly.addresses.instance_metrics,
    ]
    assert read_state(data_dir.state)["grpc"] == assembly.addresses.grpc


def test_the_storage_secret_has_a_folder_that_every_instance_reads(tmp_path: Path) -> None:
    data_dir = DataDir(tmp_path / "data")
    named = tmp_path / "named"
    with locked(data_dir):
        for settings, folder in (
            (any_ports(data_dir.root), data_dir.storage_config),
            (any_ports(data_dir.root, storage_config=named), named),
        ):
            assembly = assemble(settings, data_dir)
            found = [c.argv for c in assembly.commands if "instance" in c.argv]
            assert len(found) == 2
            for argv in found:
                assert argv[argv.index("--storage-config") + 1] == str(folder)
            assert assembly.storage_config == folder
            assert read_state(data_dir.state)["storage_config"] == str(folder)
    assert stat.S_IMODE(data_dir.storage_config.stat().st_mode) == 0o700
    assert not named.exists(), "a folder that was named is its owner's to make"


def test_a_named_etcd_is_used_and_none_is_started(tmp_path: Path) -> None:
    data_dir = DataDir(tmp_path)
    with locked(data_dir):
        assembly = assemble(any_ports(tmp_path, etcd=("10.0.0.1:2379",)), data_dir)
    assert assembly.etcd is None
    assert [c.name for c in assembly.commands] == ["router-1", "instance-1", "instance-2"]
    assert "10.0.0.1:2379" in assembly.commands[0].argv


def binary(*version: int) -> EtcdBinary:
    assert len(version) == 3
    return EtcdBinary(Path(f"/etcd-{version}"), version, caution_of(version))  # type: ignore[arg-type]


def test_data_of_a_newer_etcd_is_given_to_one_that_can_read_it() -> None:
    chosen = etcd_for_data(
        binary(3, 4, 23),
        (3, 5),
        packaged=lambda: Path("/packaged"),
        ask_version=lambda path: (3, 5, 1),
    )
    assert chosen.path == Path("/packaged") and "13766" in chosen.caution


@pytest.mark.parametrize("written_by", [None, (3, 4), (3, 3)])
def test_data_of_the_same_or_an_older_etcd_is_fine(written_by: tuple[int, int] | None) -> None:
    found = binary(3, 4, 23)
    assert etcd_for_data(found, written_by, packaged=lambda: None) is found


def test_data_that_no_etcd_at_hand_can_read_is_refused() -> None:
    with pytest.raises(UpRefused, match=r"written by etcd 3\.6.*--data-dir"):
        etcd_for_data(binary(3, 4, 23), (3, 6), packaged=lambda: None)


def test_a_log_stays_within_its_bound(tmp_path: Path) -> None:
    path = tmp_path / "a.log"
    log = RotatingLog(path, max_bytes=100, kept=3)
    for number in range(100):
        log.write(b"%08d\n" % number)
    log.close()
    files = sorted(tmp_path.iterdir())
    assert [file.name for file in files] == ["a.log", "a.log.1", "a.log.2"]
    assert all(file.stat().st_size <= 100 for file in files)
    assert path.read_bytes().endswith(b"00000099\n")
    assert LINE_MAX_BYTES < 65_536, "one read holds at least one whole line"


@pytest.mark.parametrize(
    ("status", "text"),
    [(0, "exit status 0"), (3, "exit status 3"), (-9, "killed by SIGKILL"), (None, "could not")],
)
def test_an_exit_in_words(status: int | None, text: str) -> None:
    assert describe_exit(status).startswith(text)


@pytest.mark.parametrize(
    ("line", "alarming"),
    [
        ("2026-01-01 00:00:00 ERROR mesh.instance: model x did not load", True),
        ("Traceback (most recent call last):", True),
        ("OSError: [Errno 98] Address already in use", True),
        ('{"level":"fatal","msg":"discovery failed"}', True),
        ('{"level":"warn","msg":"slow fdatasync"}', False),
        ("2026-01-01 00:00:00 INFO mesh.router: ready", False),
        ("INFO: no errors so far", False),
    ],
)
def test_which_lines_of_a_child_are_shown(line: str, alarming: bool) -> None:
    assert is_alarm(line) is alarming
