"""The REST front end over a real instance: v2 with binary tensors, v1, the repository, errors."""

from __future__ import annotations

import asyncio
import struct
from pathlib import Path
from typing import Any

import orjson
import pytest
from yarl import URL

from mesh.core.errors import Code, LoadFailed, MeshError, ResourceExhausted, Unavailable
from router.rest import error_response
from router.rest_json import document_of
from tests.instance.fakes import until
from tests.router.mesh_rig import MeshRig, mesh

JSON_REQUEST = {
    "id": "r1",
    "inputs": [{"name": "x", "datatype": "FP32", "shape": [2], "data": [1.0, 2.0]}],
}


async def ask(rig: MeshRig, method: str, path: str, **options: Any) -> tuple[int, Any, Any]:
    """(status, JSON body, headers)"""
    async with rig.http.request(method, rig.url(path), **options) as reply:
        body = await reply.read()
        return reply.status, orjson.loads(body) if body else None, reply.headers


async def test_infer_by_json(tmp_path: Path) -> None:
    async with mesh(tmp_path) as rig:
        await rig.apply("iris", "fake://1")
        for path in ("/v2/models/iris/infer", "/v2/models/iris/versions/1/infer"):
            status, body, _ = await ask(rig, "POST", path, json=JSON_REQUEST)
            assert status == 200
            assert body["model_name"] == "iris"
            assert body["id"] == "r1"
            assert body["outputs"][0]["data"] == [2.0, 4.0]
        assert rig.routers[0].metrics.value("api_request", "ModelInfer", "OK") == 2


async def test_infer_with_binary_tensors_both_ways(tmp_path: Path) -> None:
    async with mesh(tmp_path) as rig:
        await rig.register("m")
        head = orjson.dumps(
            {
                "inputs": [
                    {
                        "name": "x",
                        "datatype": "FP32",
                        "shape": [2],
                        "parameters": {"binary_data_size": 8},
                    }
                ],
                "outputs": [{"name": "y", "parameters": {"binary_data": True}}],
            }
        )
        async with rig.http.post(
            rig.url("/v2/models/m/infer"),
            data=head + struct.pack("<2f", 1.0, 2.0),
            headers={"Inference-Header-Content-Length": str(len(head))},
        ) as reply:
            assert reply.status == 200
            assert reply.headers["Content-Type"] == "application/octet-stream"
            length = int(reply.headers["Inference-Header-Content-Length"])
            body = await reply.read()
        assert struct.unpack("<2f", body[length:]) == (2.0, 4.0)
        assert orjson.loads(body[:length])["outputs"][0]["name"] == "y"


async def test_v1_predict(tmp_path: Path) -> None:
    async with mesh(tmp_path) as rig:
        await rig.register("m")
        status, body, _ = await ask(
            rig, "POST", "/v1/models/m:predict", json={"instances": [1.0, 2.0]}
        )
        assert (status, body) == (200, {"predictions": [2.0, 4.0]})


async def test_names_are_percent_encoded(tmp_path: Path) -> None:
    async with mesh(tmp_path) as rig:
        await rig.register("äpfel & birnen")
        path = "/v2/models/%C3%A4pfel%20&%20birnen/infer"
        async with rig.http.post(URL(rig.url(path), encoded=True), json=JSON_REQUEST) as reply:
            assert reply.status == 200, await reply.text()
            assert orjson.loads(await reply.read())["model_name"] == "äpfel & birnen"
        path = "/v2/models/team%2Fbirnen/infer"
        async with rig.http.post(URL(rig.url(path), encoded=True), json=JSON_REQUEST) as reply:
            assert reply.status == 404
            assert "'team/birnen'" in orjson.loads(await reply.read())["error"]


async def test_the_header_names_the_model(tmp_path: Path) -> None:
    async with mesh(tmp_path) as rig:
        await rig.register("m")
        status, body, _ = await ask(
            rig, "POST", "/v2/models/shown/infer", json=JSON_REQUEST, headers={"mm-model-id": "m"}
        )
        assert (status, body["model_name"]) == (200, "shown")
        both = {"mm-model-id": "m", "mm-vmodel-id": "m"}
        status, body, _ = await ask(
            rig, "POST", "/v2/models/shown/infer", json=JSON_REQUEST, headers=both
        )
        assert status == 400


async def test_what_the_server_says_of_itself(tmp_path: Path) -> None:
    async with mesh(tmp_path, pods=0) as rig:
        assert (await ask(rig, "GET", "/v2"))[1]["extensions"]
        assert (await ask(rig, "GET", "/v2/health/live"))[:2] == (200, {"live": True})
        assert (await ask(rig, "GET", "/v2/health/ready"))[:2] == (200, {"ready": True})
        rig.routers[0].readiness.set_draining()
        assert (await ask(rig, "GET", "/v2/health/ready"))[:2] == (503, {"ready": False})


async def test_models_and_their_own_answers(tmp_path: Path) -> None:
    async with mesh(tmp_path) as rig:
        await rig.register("m")
        await rig.apply("iris", "fake://1")
        assert (await ask(rig, "GET", "/v2/models"))[1] == {"models": ["iris", "m"]}
        assert (await ask(rig, "GET", "/v1/models"))[1] == {"models": ["iris", "m"]}
        assert (await ask(rig, "GET", "/v2/models/m/ready"))[:2] == (
            200,
            {"name": "m", "ready": True},
        )
        assert (await ask(rig, "GET", "/v1/models/m"))[1] == {"name": "m", "ready": True}
        metadata = (await ask(rig, "GET", "/v2/models/iris"))[1]
        assert metadata["name"] == "iris"
        assert metadata["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1]}]
        assert (await ask(rig, "GET", "/v2/models/m/versions/1"))[0] == 200
        assert (await ask(rig, "GET", "/v2/models/m/config"))[1]["name"] == "m"
        stats = (await ask(rig, "GET", "/v2/models/m/stats"))[1]
        assert stats["model_stats"][0]["name"] == "m"


async def test_a_model_that_cannot_be_loaded_is_not_ready(tmp_path: Path) -> None:
    async with mesh(tmp_path) as rig:
        await rig.register("m")
        rig.pods[0].runtime.load_faults["m"] = [LoadFailed("corrupt")]
        status, body, _ = await ask(rig, "POST", "/v2/models/m/infer", json=JSON_REQUEST)
        assert status == 412
        assert "corrupt" in body["error"]
        status, body, _ = await ask(rig, "GET", "/v2/models/m/ready")
        assert (status, body["ready"]) == (503, False)
        assert "corrupt" in body["error"]


async def test_the_repository(tmp_path: Path) -> None:
    async with mesh(tmp_path) as rig:
        await rig.register("m")
        (entry,) = (await ask(rig, "POST", "/v2/repository/index"))[1]
        assert (entry["name"], entry["state"]) == ("m", "UNAVAILABLE")
        assert (await ask(rig, "POST", "/v2/repository/models/m/load"))[0] == 200
        assert rig.holders("m")
        (entry,) = (await ask(rig, "POST", "/v2/repository/index", json={"ready": True}))[1]
        assert entry["state"] == "READY"
        assert (await ask(rig, "POST", "/v2/repository/models/m/unload"))[0] == 200
        assert not rig.holders("m")
        assert (await ask(rig, "POST", "/v2/repository/index", json={"ready": True}))[1] == []
        assert (await ask(rig, "POST", "/v2/models/m/infer", json=JSON_REQUEST))[0] == 200


@pytest.mark.parametrize(
    ("method", "path", "options", "status", "what"),
    [
        ("POST", "/v2/models/nobody/infer", {"json": JSON_REQUEST}, 404, "nobody"),
        ("GET", "/v2/models/nobody/ready", {}, 404, "nobody"),
        ("GET", "/v2/models/nobody", {}, 404, "nobody"),
        ("POST", "/v2/repository/models/nobody/load", {}, 404, "nobody"),
        ("GET", "/v3", {}, 404, "/v3"),
        ("DELETE", "/v2/models", {}, 405, "DELETE"),
        ("POST", "/v1/models/m:explain", {"json": {}}, 501, "explanations"),
        ("POST", "/v2/models/m/infer", {"data": b"{"}, 400, "JSON"),
        ("POST", "/v2/models/m/infer", {"json": {"inputs": []}}, 400, "'x'"),
        ("POST", "/v2/models/m/versions/7/infer", {"json": JSON_REQUEST}, 404, "7"),
        (
            "POST",
            "/v2/models/m/infer",
            {"json": JSON_REQUEST, "headers": {"X-Request-Timeout": "soon"}},
            400,
            "X-Request-Timeout",
        ),
        ("POST", "/v2/repository/index", {"data": b"nonsense"}, 400, "JSON"),
        ("POST", "/v2/repository/index", {"json": {"ready": 3}}, 400, "ready"),
        (
            "POST",
            "/v2/repository/models/m/load",
            {"json": {"parameters": {"config": "{}"}}},
            501,
            "config",
        ),
    ],
)
async def test_wrong_requests(
    tmp_path: Path, method: str, path: str, options: dict[str, Any], status: int, what: str
) -> None:
    async with mesh(tmp_path) as rig:
        await rig.register("m")
        got, body, _ = await ask(rig, method, path, **options)
        assert got == status, body
        assert set(body) == {"error"}
        assert what in body["error"]


async def test_a_body_over_the_limit_is_413(tmp_path: Path) -> None:
    from dataclasses import replace

    from mesh.wire.limits import PUBLIC

    limits = replace(PUBLIC, max_message_bytes=1_000)
    async with mesh(tmp_path, limits=limits) as rig:
        await rig.register("m")
        status, body, _ = await ask(rig, "POST", "/v2/models/m/infer", data=b"x" * 2_000)
        assert status == 413
        assert "1000 bytes" in body["error"]


async def test_a_deadline_by_header(tmp_path: Path) -> None:
    async with mesh(tmp_path) as rig:
        await rig.register("m")
        gate = rig.pods[0].source.gates["m"] = asyncio.Event()
        status, body, _ = await ask(
            rig,
            "POST",
            "/v2/models/m/infer",
            json=JSON_REQUEST,
            headers={"X-Request-Timeout": "0.05"},
        )
        assert status == 504
        assert "0.05" in body["error"]
        assert rig.routers[0].loads.waiting == 0
        gate.set()


async def test_a_client_that_goes_away_cancels_its_request(tmp_path: Path) -> None:
    async with mesh(tmp_path) as rig:
        await rig.register("m")
        gate = rig.pods[0].source.gates["m"] = asyncio.Event()
        router = rig.routers[0]
        asked = asyncio.create_task(ask(rig, "POST", "/v2/models/m/infer", json=JSON_REQUEST))
        await until(lambda: router.loads.waiting == 1)
        asked.cancel()
        await until(lambda: router.loads.waiting == 0)
        assert router.gateway.inflight == 0
        gate.set()


async def test_an_instance_that_dies_is_replaced(tmp_path: Path) -> None:
    async with mesh(tmp_path, pods=2) as rig:
        await rig.register("m")
        assert (await ask(rig, "POST", "/v2/models/m/infer", json=JSON_REQUEST))[0] == 200
        (holder,) = rig.holders("m")
        await holder.instance.server.close()
        status, body, _ = await ask(rig, "POST", "/v2/models/m/infer", json=JSON_REQUEST)
        assert status == 200, body


@pytest.mark.parametrize(
    ("error", "status", "retry_after"),
    [
        (Unavailable("x", retry_after_ms=1_500), 503, "2"),
        (ResourceExhausted("x", retry_after_ms=100), 429, "1"),
        (MeshError("x", code=Code.FAILED_PRECONDITION, retry_after_ms=100), 412, None),
        (MeshError("x", code=Code.INTERNAL), 500, None),
    ],
)
def test_retry_after(error: MeshError, status: int, retry_after: str | None) -> None:
    response = error_response(error)
    assert response.status == status
    assert response.headers.get("Retry-After") == retry_after


def test_numbers_stay_numbers_and_enums_are_names() -> None:
    from protos import oip_pb2 as oip

    config = oip.ModelConfig(
        name="m", input=[oip.ModelInput(name="x", data_type="TYPE_FP32", dims=[1 << 40])]
    )
    config.parameters["k"].string_value = "v"
    document = document_of(config)
    assert document["input"][0]["dims"] == [1 << 40]
    assert document["input"][0]["data_type"] == "TYPE_FP32"
    assert document["parameters"] == {"k": {"string_value": "v"}}
    assert document["output"] == []
