"""Which of --etcd, --etcd-connection and their variables counts, and what is passed to pods."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from mesh.cli.controller import pod_etcd_of
from mesh.cli.etcd_choice import ChosenEtcd, EtcdConnectionOption, choose_etcd
from mesh.cli.exits import CommandError
from mesh.cli.server_options import EtcdOption
from mesh.reconciler.config import PodEtcd

DEFAULT = ("127.0.0.1:2379",)
GIVEN, WRITTEN = ("given:1",), ("http://written:2",)


def write(folder: Path, **said: str) -> Path:
    path = folder / "etcd_connection"
    path.write_text(json.dumps({"endpoints": "written:2", **said}))
    return path


def choose(*flags: str, prefix: str = "mesh", **env: str) -> ChosenEtcd:
    """As a command has it. Raises CommandError."""
    app, found = typer.Typer(), list[ChosenEtcd]()

    @app.command()
    def _command(
        context: typer.Context,
        etcd: EtcdOption = None,
        etcd_connection: EtcdConnectionOption = None,
    ) -> None:
        found.append(choose_etcd(context, etcd, etcd_connection, prefix))

    CliRunner().invoke(app, flags, env=env, catch_exceptions=False)
    return found[0]


@pytest.mark.parametrize(
    ("flags", "env", "expected"),
    [
        ("", "", DEFAULT),
        ("etcd", "", GIVEN),
        ("", "etcd", GIVEN),
        ("file", "", WRITTEN),
        ("", "file", WRITTEN),
        ("etcd", "file", GIVEN),
        ("file", "etcd", WRITTEN),
        ("etcd file", "", None),
        ("", "etcd file", None),
    ],
)
def test_what_counts(
    tmp_path: Path, flags: str, env: str, expected: tuple[str, ...] | None
) -> None:
    file = str(write(tmp_path))
    as_flag = {"etcd": ("--etcd", *GIVEN), "file": ("--etcd-connection", file)}
    as_variable = {"etcd": ("MESH_ETCD", *GIVEN), "file": ("MESH_ETCD_CONNECTION", file)}
    said = [part for one in flags.split() for part in as_flag[one]]
    variables = dict(as_variable[one] for one in env.split())
    if expected is None:
        with pytest.raises(CommandError, match="exclude each other"):
            choose(*said, **variables)
    else:
        found = choose(*said, **variables)
        assert found.options.endpoints == expected
        assert (found.file is not None) == (expected == WRITTEN)


def test_the_files_prefix_counts_over_the_flags(tmp_path: Path) -> None:
    file = write(tmp_path, root_prefix="mine")
    assert choose("--etcd-connection", str(file), prefix="p").prefix == "mine"
    file = write(tmp_path)
    assert choose("--etcd-connection", str(file), prefix="p").prefix == "p"


@pytest.mark.parametrize("text", ["https://e:1", "user:hunter2@e:1"])
def test_what_only_the_file_can_say(text: str) -> None:
    with pytest.raises(CommandError, match="--etcd-connection") as caught:
        choose("--etcd", text)
    assert "hunter2" not in caught.value.message


def test_pods_mount_the_secret_that_the_controller_was_given(tmp_path: Path) -> None:
    assert not pod_etcd_of(choose("--etcd", "e:1"), None).from_secret
    chosen = choose("--etcd-connection", str(write(tmp_path, root_prefix="mine")))
    assert pod_etcd_of(chosen, None) == PodEtcd(WRITTEN, "mine", from_secret=True)
    assert pod_etcd_of(chosen, ["inside:1"]) == PodEtcd(("inside:1",), "mine")


def test_pods_are_not_left_without_a_password(tmp_path: Path) -> None:
    chosen = choose("--etcd-connection", str(write(tmp_path, userid="u", password="p")))
    with pytest.raises(CommandError, match="--pod-etcd has neither TLS nor a user"):
        pod_etcd_of(chosen, ["inside:1"])
