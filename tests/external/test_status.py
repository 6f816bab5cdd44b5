"""What a runtime says of itself at the start, and what the pod makes of it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from mesh.core.errors import Code, FailedPrecondition, InvalidArgument, MeshError, Unavailable
from mesh.runtimes.external_status import minimum_capacity_bytes
from tests.external.scripted import FAILING, READY, STARTING, Scripted, scripted, status

MIB = 1 << 20


async def start_of(one: Scripted) -> MeshError:
    with pytest.raises(MeshError) as caught:
        await one.runtimes.start()
    return caught.value


async def test_a_starting_runtime_is_asked_until_it_is_ready(tmp_path: Path) -> None:
    async with scripted(tmp_path, start=False) as one:
        one.runtime.said = [STARTING, STARTING, READY]
        found = await one.runtimes.start()
        assert one.runtime.count("runtimeStatus") == 3
        assert (found.capacity_bytes, found.max_loading_concurrency) == (64 * MIB, 2)
        assert (found.loading_timeout_ms, found.default_model_size_bytes) == (30_000, 7_777)


async def test_one_that_goes_on_starting_is_given_up(tmp_path: Path) -> None:
    async with scripted(tmp_path, start=False, start_timeout_s=0.2) as one:
        one.runtime.said = [STARTING]
        error = await start_of(one)
        assert isinstance(error, Unavailable)
        assert error.message.endswith("is not ready after 0.2s: it is STARTING")
        assert one.runtime.count("runtimeStatus") > 1


async def test_one_that_nobody_started_is_given_up_with_the_reason(tmp_path: Path) -> None:
    async with scripted(tmp_path, start=False, start_timeout_s=0.2) as one:
        await one.runtime.close()
        error = await start_of(one)
        assert isinstance(error, Unavailable)
        assert "is not ready after 0.2s: " in error.message
        assert "STARTING" not in error.message


async def test_a_failing_runtime_is_not_waited_for(tmp_path: Path) -> None:
    async with scripted(tmp_path, start=False) as one:
        one.runtime.said = [STARTING, FAILING]
        error = await start_of(one)
        assert error.code is Code.FAILED_PRECONDITION
        assert "says FAILING" in error.message
        assert one.runtime.count("runtimeStatus") == 2


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (
            {"capacityInBytes": 10 * 7_777 - 1},
            "capacityInBytes is 77769; with defaultModelSizeInBytes 7777 it must be at least 77770",
        ),
        ({"modelLoadingTimeoutMs": 99}, "modelLoadingTimeoutMs is 99; at least 100"),
        ({"maxLoadingConcurrency": 0}, "maxLoadingConcurrency is 0; at least 1"),
    ],
    ids=["too little room", "no time for a load", "no load at a time"],
)
async def test_one_that_cannot_be_worked_with_is_refused(
    tmp_path: Path, fields: dict[str, Any], words: str
) -> None:
    async with scripted(tmp_path, start=False) as one:
        one.runtime.said = [status(**fields)]
        error = await start_of(one)
        assert isinstance(error, FailedPrecondition)
        assert error.message.endswith(words)


async def test_just_enough_room_is_enough(tmp_path: Path) -> None:
    async with scripted(tmp_path, start=False) as one:
        one.runtime.said = [status(capacityInBytes=77_770)]
        assert (await one.runtimes.start()).capacity_bytes == 77_770


@pytest.mark.parametrize(
    ("default_mib", "least_mib"),
    [(1, 10), (51, 510), (52, 512), (256, 512), (300, 600)],
    ids=["ten of them", "ten still", "512 MiB", "512 MiB still", "two of them"],
)
def test_how_much_room_is_enough(default_mib: int, least_mib: int) -> None:
    assert minimum_capacity_bytes(default_mib * MIB) == least_mib * MIB


async def test_a_path_that_is_none_is_refused_with_its_method(tmp_path: Path) -> None:
    async with scripted(tmp_path, start=False) as one:
        said = status()
        said.methodInfos["a.B/C"].idInjectionPath.append(0)
        one.runtime.said = [said]
        error = await start_of(one)
        assert isinstance(error, InvalidArgument)
        assert error.message.startswith("runtimeStatus: methodInfos['a.B/C'].idInjectionPath")


@pytest.mark.parametrize("meanwhile", [FAILING, STARTING], ids=["failing", "starting"])
async def test_one_that_went_away_is_waited_for_whatever_it_says_meanwhile(
    tmp_path: Path, meanwhile: Any
) -> None:
    async with scripted(tmp_path) as one:
        await one.runtime.close()
        with pytest.raises(MeshError):
            await one.load()
        again = type(one.runtime)(tmp_path)
        again.said = [meanwhile, meanwhile, status(defaultModelSizeInBytes=8_888)]
        await again.start()
        try:
            async with asyncio.timeout(60):
                assert (await one.load()).size_bytes == 5_000
            assert again.count("runtimeStatus") == 3
            assert one.runtimes.status.default_model_size_bytes == 8_888
        finally:
            await again.close()
