"""A process that dies costs the requests inside it; the model comes back by itself."""

from __future__ import annotations

import asyncio
import shutil
import signal
from pathlib import Path

import pytest

from mesh.core.errors import Code, MeshError
from mesh.runtimes.api import ModelLost
from mesh.runtimes.isolated_fork_server import ForkServers

from .isolation import MODEL, Isolation, alive, end, isolation

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.mark.parametrize(
    ("do", "code", "cause"),
    [
        pytest.param("segfault", Code.INTERNAL, "killed by SIGSEGV", id="a segfault"),
        pytest.param("exit", Code.INTERNAL, "exit status 7", id="an exit"),
        pytest.param("killed", Code.RESOURCE_EXHAUSTED, "SIGKILL", id="a kill from outside"),
        pytest.param("allocate", Code.RESOURCE_EXHAUSTED, "more than 209,715,200 bytes", id="OOM"),
        pytest.param(
            "allocate in a child",
            Code.RESOURCE_EXHAUSTED,
            "more than 209,715,200 bytes",
            id="OOM of a process that it has started",
        ),
    ],
)
async def test_a_request_hears_why_its_model_died_and_the_next_one_is_answered(
    workers: Isolation, do: str, code: Code, cause: str
) -> None:
    model = await workers.load("victim")
    error = await workers.fail(model, do)
    assert (error.code, cause in error.message, "'victim'" in error.message) == (code, True, True)
    assert await workers.ask(model) == [2.0, 4.0]


async def test_a_crash_leaves_the_worker_of_another_model_alone(workers: Isolation) -> None:
    victim, other = await workers.load("victim"), await workers.load("other")
    pid = other.pid
    await workers.fail(victim, "segfault")
    assert (await workers.ask(other), other.pid) == ([2.0, 4.0], pid)


async def test_all_requests_inside_a_crash_fail_with_its_cause(workers: Isolation) -> None:
    model = await workers.load("victim")
    waiting = [asyncio.create_task(workers.call(model, "sleep")) for _ in range(2)]
    await workers.until(lambda: model.channel.in_flight == 2)
    end(model.pid, signal.SIGABRT)
    for outcome in await asyncio.gather(*waiting):
        assert isinstance(outcome, MeshError)
        assert (outcome.code, "SIGABRT" in outcome.message) == (Code.INTERNAL, True)


async def test_an_error_of_the_model_is_no_crash(workers: Isolation) -> None:
    model = await workers.load("model")
    pid = model.pid
    error = await workers.fail(model, "raise")
    assert "no such luck" in error.message
    assert model.pid == pid


async def test_requests_that_come_while_a_model_is_away_wait_for_it(workers: Isolation) -> None:
    model = await workers.load("victim")
    await workers.fail(model, "segfault")
    assert not model.pid
    answers = await asyncio.gather(*(workers.ask(model, x=[n]) for n in range(5)))
    assert answers == [[2.0 * n] for n in range(5)]


async def test_who_waits_for_a_model_that_is_away_waits_until_its_deadline(
    tmp_path: Path, servers: ForkServers
) -> None:
    async with isolation(tmp_path, servers) as workers:
        model = await workers.load("slow", _hangs_the_second_time(tmp_path))
        await workers.fail(model, "segfault")
        error = await workers.fail(model, "", timeout_s=0.2)
        assert error.code is Code.DEADLINE_EXCEEDED
        assert "SIGSEGV" in error.message


async def test_who_waits_too_long_without_a_deadline_is_told_to_retry(
    tmp_path: Path, servers: ForkServers
) -> None:
    async with isolation(tmp_path, servers, replacing_wait_ms=100) as workers:
        model = await workers.load("slow", _hangs_the_second_time(tmp_path))
        await workers.fail(model, "segfault")
        error = await workers.fail(model, "")
        assert (error.code, bool(error.retry_after_ms)) == (Code.UNAVAILABLE, True)


async def test_a_model_that_crashes_again_and_again_is_given_up(workers: Isolation) -> None:
    model = await workers.load("victim")
    for _ in range(3):
        await workers.fail(model, "segfault")
    error = await workers.fail(model, "")
    assert isinstance(error, ModelLost)
    assert "3. time" in error.message
    assert not model.pid


async def test_a_model_whose_files_are_gone_when_it_crashes_is_given_up(
    workers: Isolation,
) -> None:
    model = await workers.load("victim")
    shutil.rmtree(workers.folder / "victim")
    await workers.fail(model, "segfault")
    assert isinstance(await workers.fail(model, ""), ModelLost)


async def test_all_models_return_when_their_fork_server_is_killed(workers: Isolation) -> None:
    models = [await workers.load(name) for name in ("a", "b")]
    before = [model.pid for model in models]
    end(workers.runtime.fork_server_pid("python"), signal.SIGKILL)
    await workers.until(lambda: not any(alive(pid) for pid in before))
    assert [await workers.ask(model) for model in models] == [[2.0, 4.0]] * 2


async def test_a_dead_fork_server_is_not_held_against_the_models(
    tmp_path: Path, servers: ForkServers
) -> None:
    async with isolation(tmp_path, servers, crashes_max=1) as workers:
        model = await workers.load("model")
        pid = model.pid
        end(workers.runtime.fork_server_pid("python"), signal.SIGKILL)
        await workers.until(lambda: not alive(pid))
        assert await workers.ask(model) == [2.0, 4.0]


def _hangs_the_second_time(folder: Path) -> str:
    flag = folder / "was-here"
    return (
        MODEL
        + f"""
    def load(self, path, parameters):
        import pathlib
        flag = pathlib.Path({str(flag)!r})
        if flag.exists():
            threading.Event().wait()
        flag.touch()
"""
    )
