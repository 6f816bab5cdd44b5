"""Inferences that do not come back: the process is ended, and the model returns."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from mesh.core.errors import Code, MeshError
from mesh.runtimes.isolated_fork_server import ForkServers

from .isolation import isolation

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def test_an_inference_that_never_ends_is_ended(tmp_path: Path, servers: ForkServers) -> None:
    async with isolation(tmp_path, servers, infer_timeout_ms=500, ping_every_ms=100) as workers:
        model = await workers.load("stuck")
        error = await workers.fail(model, "sleep")
        assert (error.code, "0.5 s" in error.message) == (Code.DEADLINE_EXCEEDED, True)
        assert await workers.ask(model) == [2.0, 4.0]


async def test_a_hang_that_holds_the_interpreter_is_ended(
    tmp_path: Path, servers: ForkServers
) -> None:
    async with isolation(tmp_path, servers, silence_timeout_ms=400, ping_every_ms=100) as workers:
        model = await workers.load("stuck")
        error = await workers.fail(model, "sleep with the lock")
        assert (error.code, "hung" in error.message) == (Code.DEADLINE_EXCEEDED, True)
        assert await workers.ask(model) == [2.0, 4.0]


async def test_an_inference_that_nobody_waits_for_is_ended(
    tmp_path: Path, servers: ForkServers
) -> None:
    async with isolation(tmp_path, servers, abandoned_timeout_ms=400, ping_every_ms=100) as workers:
        model = await workers.load("stuck")
        pid = model.pid
        error = await workers.fail(model, "sleep", timeout_s=0.2)
        assert error.code is Code.DEADLINE_EXCEEDED
        await workers.until(lambda: model.pid not in (0, pid))
        assert await workers.ask(model) == [2.0, 4.0]


async def test_a_process_that_cannot_be_reached_any_more_is_ended(
    tmp_path: Path, servers: ForkServers
) -> None:
    async with isolation(
        tmp_path, servers, silence_timeout_ms=500, infer_timeout_ms=3_000
    ) as workers:
        model = await workers.load("cut off")
        pid = model.pid
        assert isinstance(await workers.call(model, "close everything"), MeshError)
        await workers.until(lambda: model.pid not in (0, pid))
        assert await workers.ask(model) == [2.0, 4.0]


async def test_a_hung_inference_does_not_hold_up_others(
    tmp_path: Path, servers: ForkServers
) -> None:
    async with isolation(tmp_path, servers) as workers:
        model = await workers.load("stuck")
        hung = asyncio.create_task(workers.call(model, "sleep"))
        await workers.until(lambda: model.channel.in_flight)
        assert await workers.ask(model) == [2.0, 4.0]
        hung.cancel()
        await asyncio.wait({hung})


@pytest.mark.parametrize("do", ["", "raise"])
async def test_short_limits_do_no_harm_to_a_model_that_answers(
    tmp_path: Path, servers: ForkServers, do: str
) -> None:
    async with isolation(
        tmp_path,
        servers,
        ping_every_ms=50,
        infer_timeout_ms=400,
        silence_timeout_ms=400,
        abandoned_timeout_ms=400,
    ) as workers:
        model = await workers.load("good")
        pid = model.pid
        for _ in range(200):
            await workers.call(model, do)
        assert model.pid == pid
