"""Loads that take too much or too long, or end their process: told is why, left is nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from mesh.core.errors import Code
from mesh.runtimes.isolated_fork_server import ForkServers

from .isolation import MODEL, Isolation, alive, isolation

pytestmark = pytest.mark.asyncio(loop_scope="module")

DOES = """
import ctypes, os, threading, pathlib
class Model:
    def load(self, path, parameters):
        (pathlib.Path(path) / "pid").write_text(str(os.getpid()))
        {what}
    def predict(self, inputs):
        return {{"y": inputs["x"]}}
"""


def _pid(workers: Isolation, model_id: str) -> int:
    return int((workers.folder / model_id / "pid").read_text())


@pytest.mark.parametrize(
    ("what", "code", "cause"),
    [
        pytest.param(
            "self.x = [bytearray(b'x' * (1 << 20)) for _ in range(10_000)]",
            Code.RESOURCE_EXHAUSTED,
            "needed more than 209,715,200 bytes",
            id="that allocates 10 GB",
        ),
        pytest.param("os._exit(3)", Code.FAILED_PRECONDITION, "exit status 3", id="that exits"),
        pytest.param("ctypes.string_at(0)", Code.FAILED_PRECONDITION, "SIGSEGV", id="that crashes"),
        pytest.param("1 / 0", Code.FAILED_PRECONDITION, "division by zero", id="that raises"),
    ],
)
async def test_a_load(workers: Isolation, what: str, code: Code, cause: str) -> None:
    error = await workers.load_error("bad", DOES.format(what=what))
    assert (error.code, cause in error.message, "'bad'" in error.message) == (code, True, True)
    assert not alive(_pid(workers, "bad"))


@pytest.mark.parametrize(
    "what",
    [
        pytest.param("threading.Event().wait()", id="without the lock"),
        pytest.param("ctypes.PyDLL(None).sleep(1_000_000)", id="with the lock"),
    ],
)
async def test_a_load_that_hangs_is_ended_at_its_time_out(
    tmp_path: Path, servers: ForkServers, what: str
) -> None:
    async with isolation(tmp_path, servers, load_timeout_ms=700) as workers:
        error = await workers.load_error("bad", DOES.format(what=what))
        assert (error.code, "0.7 s" in error.message) == (Code.UNAVAILABLE, True)
        assert not alive(_pid(workers, "bad"))


async def test_a_bad_load_leaves_the_other_models_alone(workers: Isolation) -> None:
    good = await workers.load("good")
    pid = good.pid
    await workers.load_error("bad", DOES.format(what="ctypes.string_at(0)"))
    assert (await workers.ask(good), good.pid) == ([2.0, 4.0], pid)


async def test_code_is_refused_in_a_worker_as_in_the_pod(
    tmp_path: Path, servers: ForkServers
) -> None:
    async with isolation(tmp_path, servers, allow_python=False) as workers:
        error = await workers.load_error("code", MODEL)
        assert error.code is Code.FAILED_PRECONDITION
        assert "allow-python" in error.message


async def test_what_is_predicted_covers_the_process_that_runs_it(workers: Isolation) -> None:
    from mesh.runtimes.api import ModelSpec

    await workers.load("first")  # what a worker itself needs is measured
    path = workers.folder / "first"
    predicted = workers.runtime.predict_size_bytes(ModelSpec("second", "python", path))
    second = await workers.load("second")
    assert 0.5 * predicted < second.size_bytes < 1.5 * predicted
