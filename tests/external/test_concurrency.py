"""How many requests at once a runtime lets into one model, and whether it says so at all."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from mesh.instance.answers import LoadOutcome
from protos import mmesh_pb2 as mmesh
from protos import oip_pb2 as oip
from tests.external.rig import OIP, WAIT_S, Pod, request
from tests.external.scripted import ScriptedRuntime, scripted, status
from tests.instance.fakes import until


@asynccontextmanager
async def pod_with(
    tmp_path: Path, *, limits: bool, **fields: Any
) -> AsyncIterator[tuple[Pod, ScriptedRuntime]]:
    """With model ``m`` loaded, of which the runtime says that it takes two requests at once."""
    async with scripted(tmp_path, start=False) as one:
        one.runtime.said = [status(limitModelConcurrency=limits)]
        one.runtime.loaded = mmesh.LoadModelResponse(sizeInBytes=5_000, maxConcurrency=2)
        pod = Pod(tmp_path, one.runtimes, "affine")
        try:
            await pod.start()
            pod.write("m")
            loaded = await pod.load("m", **fields)
            assert loaded.outcome is LoadOutcome.LOADED, loaded
            for method in ("ModelInfer", "ModelStreamInfer"):
                one.runtime.gates[method] = asyncio.Event()
            yield pod, one.runtime
        finally:
            for gate in one.runtime.gates.values():
                gate.set()
            await pod.close()


async def test_no_more_requests_at_once_than_the_runtime_says(tmp_path: Path) -> None:
    async with pod_with(tmp_path, limits=True) as (pod, runtime):
        asking = [asyncio.create_task(pod.infer("m", 1.0)) for _ in range(4)]
        carrier = pod.instance.carrier
        await until(lambda: (carrier.running, carrier.queued, runtime.working) == (2, 2, 2))
        runtime.gates["ModelInfer"].set()
        assert {reply.model_name for reply in await asyncio.gather(*asking)} == {"m"}
        assert runtime.most_working == 2


async def test_a_stream_counts_among_them(tmp_path: Path) -> None:
    async with pod_with(tmp_path, limits=True) as (pod, runtime):
        method = pod.channel.stream_stream(OIP + "ModelStreamInfer")
        streams = []
        for _ in range(3):
            call = method(metadata=[("mm-model-id", "m")], timeout=WAIT_S)
            await call.write(request("m", 1.0).SerializeToString())
            streams.append(call)
        carrier = pod.instance.carrier
        await until(lambda: (carrier.running, carrier.queued, runtime.working) == (2, 1, 2))
        runtime.gates["ModelStreamInfer"].set()
        for call in streams:
            await call.done_writing()
        for call in streams:
            answer = oip.ModelStreamInferResponse.FromString(await call.read())
            assert answer.infer_response.model_name == "m"
        assert runtime.most_working == 2


async def test_what_the_user_says_counts_within_that(tmp_path: Path) -> None:
    async with pod_with(tmp_path, limits=True, max_concurrency=1) as (pod, _):
        assert pod.instance.pod.servables["m"].max_concurrency == 1
    async with pod_with(tmp_path, limits=True, max_concurrency=9) as (pod, _):
        assert pod.instance.pod.servables["m"].max_concurrency == 2


async def test_a_runtime_that_does_not_limit_gets_them_all(tmp_path: Path) -> None:
    async with pod_with(tmp_path, limits=False) as (pod, runtime):
        asking = [asyncio.create_task(pod.infer("m", 1.0)) for _ in range(4)]
        await until(lambda: runtime.working == 4)
        assert pod.instance.carrier.queued == 0
        runtime.gates["ModelInfer"].set()
        await asyncio.gather(*asking)
