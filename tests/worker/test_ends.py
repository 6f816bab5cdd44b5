"""Nothing is left: of an unloaded model, of a closed runtime, of a pod that was killed."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

import pytest

from mesh.runtimes.api import ModelLost
from mesh.runtimes.isolated_fork_server import ForkServers

from .isolation import MODEL, Isolation, alive, isolation, python_model

pytestmark = pytest.mark.asyncio(loop_scope="module")


def unloads(what: str) -> str:
    return (
        MODEL
        + f"""
    def load(self, path, parameters):
        import pathlib
        self.told = pathlib.Path(path) / "told"
    def unload(self):
        {what}
        self.told.touch()
"""
    )


def children_of(pid: int) -> list[int]:
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(child) for child in text.split()]


async def test_an_unload_ends_the_process(workers: Isolation) -> None:
    model = await workers.load("model")
    pid = model.pid
    await asyncio.to_thread(model.unload)
    assert not alive(pid)
    assert isinstance(await workers.fail(model, ""), ModelLost)


async def test_an_unload_lets_the_model_unload(workers: Isolation) -> None:
    model = await workers.load("model", unloads("pass"))
    await asyncio.to_thread(model.unload)
    assert (workers.folder / "model" / "told").exists()


async def test_an_unload_does_not_wait_for_a_model_that_hangs_in_it(
    tmp_path: Path, servers: ForkServers
) -> None:
    async with isolation(tmp_path, servers, unload_timeout_ms=300) as workers:
        model = await workers.load("model", unloads("ctypes.PyDLL(None).sleep(1_000_000)"))
        pid = model.pid
        await asyncio.to_thread(model.unload)
        assert not alive(pid)


async def test_an_unload_of_a_model_that_is_being_brought_back_leaves_nothing(
    workers: Isolation,
) -> None:
    model = await workers.load("model")
    await workers.fail(model, "segfault")
    await asyncio.to_thread(model.unload)
    fork_server = workers.runtime.fork_server_pid("python")
    assert not [pid for pid in children_of(fork_server) if alive(pid)]


async def test_a_closed_runtime_leaves_no_process_and_no_file(tmp_path: Path) -> None:
    async with isolation(tmp_path) as workers:
        models = [await workers.load(name) for name in ("a", "b")]
        pids = [workers.runtime.fork_server_pid("python"), *(model.pid for model in models)]
        sockets = Path(models[0].channel.address.removeprefix("unix:")).parents[1]
        assert sockets.is_dir()
    assert not [pid for pid in pids if alive(pid)]
    assert not sockets.exists()


async def test_a_pod_that_is_killed_leaves_no_process(workers: Isolation, tmp_path: Path) -> None:
    script = Path(__file__).with_name("pod_process.py")
    root = Path(__file__).parents[2]
    pod = await asyncio.create_subprocess_exec(
        *(sys.executable, str(script), str(python_model(tmp_path / "model"))),
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    assert pod.stdout is not None
    pids = [int(pid) for pid in (await pod.stdout.readline()).split()]
    assert len(pids) == 3
    assert all(map(alive, pids))
    pod.send_signal(signal.SIGKILL)
    await pod.wait()
    await workers.until(lambda: not any(map(alive, pids)))
