"""What a model's process has not got, and what a hostile pickle gets at."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest

from mesh.core.errors import Code
from mesh.runtimes.isolated_fork_server import ForkServers, worker_environment

from .isolation import Isolation, alive, isolation

pytestmark = pytest.mark.asyncio(loop_scope="module")

SECRETS = {
    "AWS_SECRET_ACCESS_KEY": "hush",
    "MESH_STORAGE_CONFIG_KEY": "hush",
    "SOME_TOKEN": "hush",
    "DATABASE_URL": "hush",
}


@pytest.fixture(autouse=True, scope="module")
def secrets() -> Iterator[None]:
    """The pod has them when its fork servers start."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SECRETS.items():
            patch.setenv(name, value)
        yield


class Runs:
    """Unpickled, it runs a command."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (self.command,)


def hostile_pickle(folder: Path, command: str) -> Path:
    folder.mkdir(parents=True)
    (folder / "model.pkl").write_bytes(pickle.dumps(Runs(command)))
    return folder


def open_here() -> set[str]:
    """What this process has open beside the standard streams."""
    fds = Path("/proc/self/fd").iterdir()
    return {str(fd.readlink()) for fd in fds if int(fd.name) > 2 and fd.exists()}


async def test_a_pickle_that_runs_a_command_is_refused_before_it_runs(
    tmp_path: Path, servers: ForkServers
) -> None:
    ran = tmp_path / "ran"
    path = hostile_pickle(tmp_path / "model", f"touch {ran}")
    async with isolation(tmp_path, servers, allow_pickle=False) as workers:
        error = await workers.load_error("hostile", path=path, kind="sklearn")
    assert (error.code, ran.exists()) == (Code.FAILED_PRECONDITION, False)
    assert "--allow-pickle" in error.message


async def test_a_pickle_that_runs_a_command_is_confined_where_it_is_allowed(
    tmp_path: Path, servers: ForkServers
) -> None:
    seen = tmp_path / "seen"
    command = (
        f"sleep 1000 & echo $! $PPID > {seen.with_suffix('.pids')}; env > {seen}; kill -9 $PPID"
    )
    path = hostile_pickle(tmp_path / "model", command)
    async with isolation(tmp_path, servers) as workers:
        error = await workers.load_error("hostile", path=path, kind="sklearn")
        assert "SIGKILL" in error.message  # of its own process; ours goes on
        assert "hush" not in seen.read_text()
        child, worker = map(int, seen.with_suffix(".pids").read_text().split())
        assert worker != os.getpid()
        await workers.until(lambda: not alive(child))


async def test_a_worker_has_no_variable_of_the_pods_that_it_does_not_need(
    workers: Isolation,
) -> None:
    model = await workers.load("model")
    variables = b"\n".join(await workers.ask(model, "environment")).decode()
    assert "PATH=" in variables
    assert not [name for name in SECRETS if name in variables]
    assert "hush" not in variables


async def test_a_worker_has_no_file_of_the_pods_open(workers: Isolation, tmp_path: Path) -> None:
    with (tmp_path / "private").open("w"):
        await workers.load("other")
        model = await workers.load("model")
        links = {link.decode() for link in await workers.ask(model, "descriptors")}
        ours = open_here()
    assert any("private" in link for link in ours)
    assert not {link for link in links & ours if not link.startswith(("/dev/", "anon_inode:"))}


async def test_what_a_model_has_started_ends_with_it(workers: Isolation) -> None:
    model = await workers.load("model")
    (child,) = await workers.ask(model, "start a child")
    assert alive(child)
    await workers.fail(model, "segfault")
    await workers.until(lambda: not alive(child))


async def test_secrets_of_any_name_stay_behind() -> None:
    given = {"PATH": "/bin", "LC_ALL": "C", "CUDA_VISIBLE_DEVICES": "0", **SECRETS}
    kept = worker_environment(given)
    assert given.keys() & kept.keys() == {"PATH", "LC_ALL", "CUDA_VISIBLE_DEVICES"}
    assert "hush" not in json.dumps(kept)
