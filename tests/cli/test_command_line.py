"""The command line itself: help, exit codes, addresses, TLS, completion, quantities."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import grpc
import pytest
from typer.testing import CliRunner, Result

from mesh.cli.main import app
from mesh.cli.quantities import format_age, format_size, parse_duration_ms, parse_size
from mesh.cli.session import hoist_global_flags
from tests.cli.conftest import Mesh
from tests.cli.fake_router import FakeRouter

REPOSITORY = Path(__file__).parents[2]


def run(*args: str, env: dict[str, str] | None = None) -> Result:
    return CliRunner().invoke(
        app, list(args), env={"NO_COLOR": "1", "COLUMNS": "200", **(env or {})}
    )


def test_help_names_every_command_and_the_exit_codes() -> None:
    text = run("--help").stdout
    for command in (
        *("up", "router", "instance", "apply", "get", "describe"),
        *("delete", "infer", "explain", "version", "policy", "type-constraints"),
    ):
        assert f" {command} " in text
    assert "3 the mesh cannot be reached" in " ".join(text.split())


@pytest.mark.parametrize(
    "flag",
    [
        *("--instances", "--models", "--data-dir", "--host", "--grpc-port", "--rest-port"),
        *("--metrics-port", "--etcd", "--capacity", "--routers", "--tls-cert", "--file-root"),
    ],
)
def test_up_has_the_documented_flags(flag: str) -> None:
    assert f"{flag} " in run("up", "--help").stdout


def test_help_imports_nothing_heavy() -> None:
    program = (
        "import sys, mesh.cli.main\n"
        "heavy = {'grpc', 'numpy', 'yaml', 'google.protobuf', 'onnxruntime', 'aiohttp'}\n"
        "print(sorted(heavy & sys.modules.keys()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=REPOSITORY, check=True
    )
    assert done.stdout == "[]\n"


def test_python_dash_m_is_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mesh.cli", "version"],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
    )
    assert done.returncode == 0 and done.stdout.startswith("mesh ")


def test_completion_of_commands_and_of_models(router: FakeRouter) -> None:
    router.rows["models"] = [{"name": "iris"}, {"name": "irritant"}, {"name": "wine"}]

    def complete(words: str) -> list[str]:
        done = subprocess.run(
            [sys.executable, "-c", "from mesh.cli.main import app; app(prog_name='mesh')"],
            env={
                **os.environ,
                "_MESH_COMPLETE": "complete_bash",
                "COMP_WORDS": words,
                "COMP_CWORD": str(len(words.split(" ")) - 1),
                "MESH_ADDRESS": router.address,
            },
            capture_output=True,
            text=True,
            cwd=REPOSITORY,
        )
        return done.stdout.split()

    assert complete("mesh de") == ["describe", "delete"]
    assert complete("mesh infer ir") == ["iris", "irritant"]


def test_nobody_listens() -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))  # bound, not listening: connections are refused
        address = f"127.0.0.1:{held.getsockname()[1]}"
        result = run("--address", address, "get", "models")
    assert result.exit_code == 3
    assert result.stderr.startswith(f"error: cannot reach the mesh at {address}: ")
    assert "MESH_ADDRESS" in result.stderr and "Traceback" not in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_an_address_that_is_none() -> None:
    result = run("--address", "nonsense", "get", "models")
    assert result.exit_code == 3 and "not HOST:PORT" in result.stderr


def test_the_address_comes_from_the_environment(router: FakeRouter) -> None:
    result = run("get", "models", env={"MESH_ADDRESS": router.address})
    assert result.exit_code == 0


def test_the_address_may_stand_behind_the_command(router: FakeRouter) -> None:
    assert run("get", "models", "--address", router.address).exit_code == 0
    assert run("get", "--address=" + router.address, "models").exit_code == 0


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["get", "models", "--address", "x"], ["--address", "x", "get", "models"]),
        (["get", "--tls", "models"], ["--tls", "get", "models"]),
        (["infer", "m", "--", "--address"], ["infer", "m", "--", "--address"]),
        (["up", "--tls-cert", "x"], ["up", "--tls-cert", "x"]),
        (["--address", "a", "router", "--tls-key", "x"], None),
        (["get", "--address"], ["--address", "get"]),
    ],
)
def test_which_flags_are_moved_to_the_front(given: list[str], expected: list[str] | None) -> None:
    assert hoist_global_flags(given) == (given if expected is None else expected)


@pytest.mark.parametrize(
    ("code", "exit_code"),
    [
        (grpc.StatusCode.NOT_FOUND, 1),
        (grpc.StatusCode.FAILED_PRECONDITION, 1),
        (grpc.StatusCode.UNAVAILABLE, 1),
        (grpc.StatusCode.DEADLINE_EXCEEDED, 4),
    ],
)
def test_what_the_mesh_says_becomes_an_exit_code(
    router: FakeRouter, mesh: Mesh, code: grpc.StatusCode, exit_code: int
) -> None:
    router.answers["Explain"] = lambda request: (code, "because")
    result = mesh("explain", "x")
    assert result.exit_code == exit_code
    assert "because" in result.stderr and len(result.stderr.splitlines()) == 1


def test_a_server_that_is_no_router_is_named_as_such(mesh: Mesh) -> None:
    result = mesh("explain", "x")  # the fake knows List only
    assert result.exit_code == 1 and "is it a router" in result.stderr


def test_a_mesh_that_goes_away_during_a_call_is_unreachable(router: FakeRouter, mesh: Mesh) -> None:
    def die(request: bytes) -> tuple[grpc.StatusCode, str]:
        return grpc.StatusCode.UNAVAILABLE, "Socket closed"

    router.answers["Explain"] = die
    assert mesh("explain", "x").exit_code == 3


def test_an_answer_that_cannot_be_read_is_one_line(router: FakeRouter, mesh: Mesh) -> None:
    from protos import mesh_admin_pb2 as pb

    router.answers["Explain"] = lambda request: pb.ExplainResponse(
        json='{"name": 3}'
    ).SerializeToString()
    result = mesh("explain", "x")
    assert result.exit_code == 1 and "-o json" in result.stderr


@pytest.mark.parametrize(
    "args",
    [
        ("up", "--capacity", "lots"),
        ("up", "--instances", "0"),
        ("up", "--grpc-port", "70000"),
        ("get", "models", "--timeout", "soon"),
        ("get", "models", "-o", "csv"),
        ("up", "--tls-cert", "/dev/null"),
        ("up", "--tls-client-ca", "/dev/null"),
        ("up", "--etcd", "https://e:2379"),
        ("up", "--etcd", "nonsense"),
        ("up", "--etcd", ","),
        ("up", "--etcd-connection", "/no/such/file"),
        ("router", "--etcd-connection", "/dev/null"),
        ("instance", "--etcd", "e:1", "--etcd-connection", "/dev/null"),
        ("up", "--file-root", "/no/such/folder"),
        ("instance", "--storage-config", "/no/such/folder"),
        ("instance", "--capacity", "3"),
        ("infer", "x"),
        ("describe", "instance", "i"),
        ("frobnicate",),
    ],
)
def test_wrong_usage_exits_with_2_and_no_traceback(args: tuple[str, ...]) -> None:
    result = run(*args)
    assert result.exit_code == 2, result.output
    assert result.stderr and "Traceback" not in result.output


def test_a_data_directory_in_use_is_refused_by_the_command(tmp_path: Path) -> None:
    from mesh.up.layout import DataDir, locked

    with locked(DataDir(tmp_path)):
        result = run("up", "--data-dir", str(tmp_path))
    assert result.exit_code == 1
    assert "another `mesh up` (pid " in result.stderr and "--data-dir" in result.stderr


def test_a_port_in_use_is_refused_by_the_command(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        result = run("up", "--data-dir", str(tmp_path), "--grpc-port", port, "--rest-port", "0")
    assert result.exit_code == 1
    assert f"port {port} on 127.0.0.1 (gRPC: --grpc-port)" in result.stderr


def test_a_models_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    result = run("up", "--data-dir", str(tmp_path), "--models", str(tmp_path / "none"))
    assert result.exit_code == 1 and "no such folder" in result.stderr


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("1GiB", 1 << 30),
        ("512Mi", 512 << 20),
        ("1.5 GB", 1_500_000_000),
        ("1048576", 1 << 20),
        ("0.5KiB", 512),
        ("2g", 2_000_000_000),
    ],
)
def test_sizes(text: str, size_bytes: int) -> None:
    assert parse_size(text) == size_bytes


@pytest.mark.parametrize("text", ["", "GiB", "1 XB", "-1GiB", "0", "1GiB2", "1e3"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match=r"write for example"):
        parse_size(text)


@pytest.mark.parametrize(
    ("text", "duration_ms"),
    [("30s", 30_000), ("250ms", 250), ("1h30m", 5_400_000), ("2", 2_000), ("0.5s", 500)],
)
def test_durations(text: str, duration_ms: int) -> None:
    assert parse_duration_ms(text) == duration_ms


@pytest.mark.parametrize("text", ["", "s", "1x", "1s2", "-3s"])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(ValueError, match=r"write for example"):
        parse_duration_ms(text)


def test_sizes_and_ages_as_shown() -> None:
    assert [format_size(n) for n in (0, 1023, 1024, 1536, 123 << 20, 5 << 40)] == [
        *("0 B", "1023 B", "1 KiB", "1.5 KiB", "123 MiB", "5 TiB"),
    ]
    assert [format_age(ms) for ms in (-5, 5_000, 200_000, 8_000_000, 200_000_000)] == [
        *("0s", "5s", "3m", "2h", "2d"),
    ]
