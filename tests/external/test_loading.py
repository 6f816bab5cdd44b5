"""A runtime's loads and sizes, and the unload that follows a load that came to nothing."""

from __future__ import annotations

import asyncio
from pathlib import Path

import grpc
import orjson
import pytest

from mesh.core.errors import Code, LoadFailed
from mesh.runtimes.api import ModelSpec
from protos import mmesh_pb2 as mmesh
from tests.external.scripted import Scripted, scripted, status
from tests.instance.fakes import until

UNAVAILABLE, NOT_FOUND = grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.NOT_FOUND
INTERNAL, UNIMPLEMENTED = grpc.StatusCode.INTERNAL, grpc.StatusCode.UNIMPLEMENTED


# ---- sizes --------------------------------------------------------------------------------------


async def test_the_size_that_a_load_tells_is_not_asked_for(tmp_path: Path) -> None:
    async with scripted(tmp_path) as one:
        assert (await one.load()).size_bytes == 5_000
        assert one.runtime.of("m") == ["loadModel"]


async def test_the_size_that_a_load_does_not_tell_is_asked_for(tmp_path: Path) -> None:
    async with scripted(tmp_path) as one:
        one.runtime.loaded = mmesh.LoadModelResponse()
        assert (await one.load()).size_bytes == 6_000
        assert one.runtime.of("m") == ["loadModel", "modelSize"]


@pytest.mark.parametrize("fault", [None, UNIMPLEMENTED], ids=["says 0", "cannot say"])
async def test_a_size_that_nobody_tells_is_the_default(
    tmp_path: Path, fault: grpc.StatusCode | None
) -> None:
    async with scripted(tmp_path) as one:
        one.runtime.loaded = mmesh.LoadModelResponse()
        one.runtime.measured = mmesh.ModelSizeResponse()
        if fault is not None:
            one.runtime.faults["modelSize"] = [(fault, "no")]
        assert (await one.load()).size_bytes == 7_777
        assert one.runtime.of("m") == ["loadModel", "modelSize"]


async def test_a_size_is_predicted(tmp_path: Path) -> None:
    async with scripted(tmp_path) as one:
        assert await one.predict() == 4_000
        one.runtime.predicted = mmesh.PredictModelSizeResponse()
        assert await one.predict() == 7_777
        assert one.runtime.of("m") == ["predictModelSize"] * 2


async def test_a_runtime_that_cannot_predict_is_not_asked_again(tmp_path: Path) -> None:
    async with scripted(tmp_path) as one:
        one.runtime.faults["predictModelSize"] = [(UNIMPLEMENTED, "no such method")]
        assert [await one.predict("a"), await one.predict("b")] == [7_777, 7_777]
        assert one.runtime.count("predictModelSize") == 1


async def test_another_failure_to_predict_is_not_for_ever(tmp_path: Path) -> None:
    async with scripted(tmp_path) as one:
        one.runtime.faults["predictModelSize"] = [(INTERNAL, "just now not")]
        assert [await one.predict(), await one.predict()] == [7_777, 4_000]


async def test_a_slow_prediction_is_not_waited_for(tmp_path: Path) -> None:
    async with scripted(tmp_path, predict_timeout_s=0.1) as one:
        one.runtime.gates["predictModelSize"] = asyncio.Event()
        assert await one.predict() == 7_777


# ---- loads that come to nothing -----------------------------------------------------------------


async def failure_of(one: Scripted) -> LoadFailed:
    with pytest.raises(LoadFailed) as caught:
        await one.load()
    return caught.value


@pytest.mark.parametrize(
    ("fault", "code", "unloads"),
    [
        (grpc.StatusCode.INVALID_ARGUMENT, Code.FAILED_PRECONDITION, 0),
        (grpc.StatusCode.FAILED_PRECONDITION, Code.FAILED_PRECONDITION, 0),
        (INTERNAL, Code.FAILED_PRECONDITION, 1),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, Code.UNAVAILABLE, 1),
        (UNAVAILABLE, Code.UNAVAILABLE, 1),
    ],
    ids=lambda value: value.name if isinstance(value, grpc.StatusCode) else None,
)
async def test_a_load_that_was_attempted_and_failed_is_unloaded(
    tmp_path: Path, fault: grpc.StatusCode, code: Code, unloads: int
) -> None:
    async with scripted(tmp_path) as one:
        one.runtime.faults["loadModel"] = [(fault, "the reason")]
        error = await failure_of(one)
        assert error.code is code
        assert error.message.endswith(f"did not load model 'm' ({fault.name}): the reason")
        assert one.runtime.of("m") == ["loadModel", *["unloadModel"] * unloads]
        assert (await one.load()).size_bytes == 5_000


async def test_a_load_that_is_called_off_is_cancelled_there_and_unloaded(tmp_path: Path) -> None:
    async with scripted(tmp_path) as one:
        one.runtime.gates["loadModel"] = asyncio.Event()
        loading = asyncio.create_task(one.load())
        await until(lambda: one.runtime.count("loadModel"))
        one.runtimes.cancel_load("m")
        with pytest.raises(LoadFailed, match="called off") as caught:
            await loading
        assert caught.value.code is Code.UNAVAILABLE
        assert one.runtime.of("m") == ["loadModel", "unloadModel"]
        await until(lambda: ("loadModel", "m") in one.runtime.ended)  # nobody has opened the gate
        assert not one.runtimes.pending_unloads


async def test_a_load_that_is_called_off_while_it_is_measured_is_unloaded(tmp_path: Path) -> None:
    async with scripted(tmp_path) as one:
        one.runtime.loaded = mmesh.LoadModelResponse()
        one.runtime.gates["modelSize"] = asyncio.Event()
        loading = asyncio.create_task(one.load())
        await until(lambda: one.runtime.count("modelSize"))
        one.runtimes.cancel_load("m")
        with pytest.raises(LoadFailed, match="called off"):
            await loading
        assert one.runtime.of("m") == ["loadModel", "modelSize", "unloadModel"]


async def test_a_load_that_is_called_off_before_the_runtime_is_back_never_begins(
    tmp_path: Path,
) -> None:
    async with scripted(tmp_path) as one:
        await one.runtime.close()
        await failure_of(one)
        calls = one.runtime.of("m")
        loading = asyncio.create_task(one.load())
        await until(lambda: "m" in one.runtimes._loads)
        one.runtimes.cancel_load("m")
        with pytest.raises(LoadFailed, match="called off"):
            await loading
        assert one.runtime.of("m") == calls


async def test_to_call_off_what_is_not_loading_is_nothing(tmp_path: Path) -> None:
    async with scripted(tmp_path) as one:
        one.runtimes.cancel_load("m")
        model = await one.load()
        one.runtimes.cancel_load("m")
        assert model.size_bytes == 5_000
        assert one.runtime.of("m") == ["loadModel"]


# ---- unloads ------------------------------------------------------------------------------------


async def test_an_unload_is_tried_until_it_succeeds(tmp_path: Path) -> None:
    async with scripted(tmp_path, unload_retry_s=0.0) as one:
        model = await one.load()
        one.runtime.faults["unloadModel"] = [(INTERNAL, "busy")] * 89
        await asyncio.to_thread(model.unload)
        assert one.runtime.count("unloadModel") == 90
        assert not one.runtimes.pending_unloads


async def test_an_unload_is_given_up_after_ninety_tries_with_the_last_reason(
    tmp_path: Path,
) -> None:
    async with scripted(tmp_path, unload_retry_s=0.0) as one:
        model = await one.load()
        one.runtime.faults["unloadModel"] = [(INTERNAL, f"busy {at}") for at in range(100)]
        with pytest.raises(Exception, match="did not unload model 'm' in 90 tries") as caught:
            await asyncio.to_thread(model.unload)
        assert str(caught.value).endswith("busy 89")
        assert one.runtime.count("unloadModel") == 90


async def test_a_model_that_the_runtime_does_not_have_is_unloaded(tmp_path: Path) -> None:
    async with scripted(tmp_path) as one:
        model = await one.load()
        one.runtime.faults["unloadModel"] = [(NOT_FOUND, "who?")]
        await asyncio.to_thread(model.unload)
        assert one.runtime.count("unloadModel") == 1


async def test_a_load_has_the_oldest_failed_unload_tried_again_first(tmp_path: Path) -> None:
    async with scripted(tmp_path, unload_retry_s=3_600.0) as one:
        olds = [await one.load(name) for name in ("old", "older")]
        one.runtime.faults["unloadModel"] = [(INTERNAL, "busy")] * 2
        unloading = [asyncio.create_task(asyncio.to_thread(olds[1].unload))]
        await until(lambda: one.runtimes.pending_unloads == ("older",))
        unloading.append(asyncio.create_task(asyncio.to_thread(olds[0].unload)))
        await until(lambda: one.runtimes.pending_unloads == ("older", "old"))
        await one.load("new")
        assert one.runtime.calls[-2:] == [("unloadModel", "older"), ("loadModel", "new")]
        await unloading[0]
        assert one.runtimes.pending_unloads == ("old",)
        await one.load("newer")
        await unloading[1]


async def test_a_load_ends_the_retries_of_its_own_models_unload(tmp_path: Path) -> None:
    async with scripted(tmp_path, unload_retry_s=3_600.0) as one:
        one.runtime.faults["loadModel"] = [(INTERNAL, "half way")]
        one.runtime.faults["unloadModel"] = [(INTERNAL, "busy")] * 2
        await failure_of(one)
        await until(lambda: one.runtimes.pending_unloads == ("m",))
        await one.load()
        assert one.runtime.of("m") == ["loadModel", "unloadModel", "unloadModel", "loadModel"]
        await until(lambda: not one.runtimes.pending_unloads)


async def test_retries_go_on_where_the_load_that_was_to_end_them_gave_up(tmp_path: Path) -> None:
    async with scripted(tmp_path, start=False, unload_retry_s=0.01) as one:
        one.runtime.said = [status(modelLoadingTimeoutMs=300)]
        await one.runtimes.start()
        one.runtime.faults["loadModel"] = [(INTERNAL, "half way")]
        one.runtime.faults["unloadModel"] = [(INTERNAL, "busy")] * 3
        gate = one.runtime.gates["unloadModel"] = asyncio.Event()
        failing = asyncio.create_task(failure_of(one))
        await until(lambda: one.runtime.count("unloadModel") == 1)
        gate.set()
        await failing
        gate.clear()
        await until(lambda: one.runtime.count("unloadModel") > one.runtime.ended.count(
            ("unloadModel", "m")))  # fmt: skip
        assert "timed out after 0.3s" in (await failure_of(one)).message
        gate.set()
        await until(lambda: not one.runtimes.pending_unloads)
        assert one.runtime.faults["unloadModel"] == []
        assert one.runtime.of("m").count("loadModel") == 1


# ---- what a runtime is told ---------------------------------------------------------------------


async def test_a_runtime_is_told_where_the_artifact_is_and_how_large(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x" * 321)
    key = b'{"storage_key":"k","model_type":{"name":"affine","version":"1"}}'
    async with scripted(tmp_path) as one:
        for said in (key.decode(), "", "no JSON"):
            order = ModelSpec("m", "affine", tmp_path / "file", {"path": "s3://x", "key": said})
            await asyncio.to_thread(one.runtimes.load, order)
        told = one.runtime.told
        assert {(one.modelId, one.modelType, one.modelPath) for one in told} == {
            ("m", "affine", f"{tmp_path}/file")
        }
        plain = {"model_type": {"name": "affine"}, "disk_size_bytes": 321}
        assert orjson.loads(told[0].modelKey) == {**orjson.loads(key), "disk_size_bytes": 321}
        assert orjson.loads(told[1].modelKey) == plain
        assert told[2].modelKey == "no JSON"
