"""A runtime that has lost a model: it is loaded anew, and no client sees it."""

from __future__ import annotations

import asyncio
from pathlib import Path

import grpc
import numpy as np

from mesh.runtimes.api import ModelLost
from protos import oip_pb2 as oip
from tests.instance.fakes import until
from tests.router.mesh_rig import OIP, infer_request, mesh


async def test_a_model_lost_at_its_first_request_is_reloaded_unseen(tmp_path: Path) -> None:
    async with mesh(tmp_path) as rig:
        await rig.register("m")
        rig.pods[0].runtime.infer_faults["m"] = [ModelLost("the worker restarted")]
        assert await rig.infer("m", 1.0) == [2.0]
        assert rig.loads_of("m") == 2
        assert rig.pods[0].runtime.unloaded == ["m"]


async def test_a_model_lost_between_two_quick_requests_is_reloaded_unseen(tmp_path: Path) -> None:
    async with mesh(tmp_path, pods=2) as rig:
        await rig.register("m")
        for _ in range(20):  # it runs in the event loop by then
            await rig.infer("m", 1.0)
        holder = rig.holders("m")[0]
        assert holder.pod.servables["m"].statistics.inline_count
        holder.runtime.infer_faults["m"] = [ModelLost("gone")]
        assert await rig.infer("m", 3.0) == [6.0]
        assert rig.loads_of("m") == 2
        noted = holder.instance.decisions.decisions.recent(100, model_id="m")
        assert ("unload", "lost") in [(d.kind, d.reason) for d in noted]


async def test_all_who_asked_while_it_was_lost_are_answered(tmp_path: Path) -> None:
    async with mesh(tmp_path) as rig:
        await rig.register("m")
        await rig.infer("m", 1.0)
        rig.pods[0].runtime.infer_faults["m"] = [ModelLost("gone") for _ in range(5)]
        asked = [rig.infer("m", float(at)) for at in range(30)]
        assert await asyncio.gather(*asked) == [[2.0 * at] for at in range(30)]


async def test_a_stream_whose_model_is_lost_at_its_start_goes_on_elsewhere(tmp_path: Path) -> None:
    async with mesh(tmp_path) as rig:
        await rig.register("m")
        await rig.infer("m", 1.0)
        rig.pods[0].runtime.infer_faults["m"] = [ModelLost("gone")]
        stream = rig.channels[0].stream_stream(OIP + "ModelStreamInfer")
        call = stream(iter([infer_request("m", 4.0).SerializeToString()]), timeout=60)
        answers = [oip.ModelStreamInferResponse.FromString(raw) async for raw in call]
        assert [a.error_message for a in answers] == [""]
        raw = answers[0].infer_response.raw_output_contents[0]
        assert np.frombuffer(raw, dtype=np.float32).tolist() == [8.0]
        assert await call.code() is grpc.StatusCode.OK


async def test_the_store_forgets_the_lost_copy_too(tmp_path: Path) -> None:
    async with mesh(tmp_path) as rig:
        await rig.register("m")
        await rig.infer("m", 1.0)
        pod = rig.pods[0]
        await until(lambda: pod.copy("m"))
        pod.pod.lost("m")
        await until(lambda: pod.copy("m") is None)
        pod.pod.lost("m")  # again, by a request that was still inside: nothing happens
        assert pod.runtime.unloaded in (["m"], [])
