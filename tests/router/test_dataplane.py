"""A router that is told which methods there are and where each names its model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import grpc
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh import registry
from mesh.core.errors import InvalidArgument
from mesh.core.types import VModelRecord
from mesh.protobuf_path import extract, splice
from mesh.store.api import Put
from mesh.wire.messages import prefix
from mesh.wire.peek import peek_at_path
from protos import oip_pb2 as oip
from router.dataplane import Dataplane, parse_dataplane_config
from tests.instance.fakes import until
from tests.router.mesh_rig import OIP, MeshRig, infer_request, mesh

INFER = OIP + "ModelInfer"


def config(*, vmodel: bool = False, **fields: Any) -> str:
    return orjson.dumps(
        {"rpcConfigs": {INFER[1:]: {"idExtractionPath": [3], "vModelId": vmodel}}, **fields}
    ).decode()


def by_id(model_id: str) -> oip.ModelInferRequest:
    request = infer_request("named otherwise", 2.0)
    request.id = model_id
    return request


async def test_the_model_is_named_where_the_config_says(tmp_path: Path) -> None:
    async with mesh(tmp_path, dataplane_config=config()) as rig:
        await rig.register("m")
        reply = await rig.call(INFER, by_id("m"), oip.ModelInferResponse)
        assert (reply.model_name, rig.loads_of("m")) == ("named otherwise", 1)


def alias(rig: MeshRig, name: str, model_id: str) -> None:
    record = VModelRecord(name, model_id, model_id)
    rig.server.apply([Put(registry.key_of(record), registry.encode(record))])


async def test_a_name_that_is_said_to_be_a_vmodels_is_no_models_own(tmp_path: Path) -> None:
    async with mesh(tmp_path, dataplane_config=config(vmodel=True)) as rig:
        await rig.register("m")
        for name in ("m", "nobody"):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await rig.call(INFER, by_id(name), oip.ModelInferResponse)
            assert caught.value.code() is grpc.StatusCode.NOT_FOUND
            assert (caught.value.details() or "").startswith("vmodel not found: ")
        assert rig.loads_of("m") == 0
        alias(rig, "stable", "m")  # the router may hear of it later than of the request
        reply = await rig.call(INFER, by_id("stable"), oip.ModelInferResponse)
        assert (reply.model_name, rig.loads_of("m")) == ("named otherwise", 1)
        # A header says by itself what it names.
        await rig.call(INFER, by_id(""), oip.ModelInferResponse, metadata=[("mm-model-id", "m")])
        header = [("mm-vmodel-id", "m")]
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await rig.call(INFER, by_id(""), oip.ModelInferResponse, metadata=header)
        assert "vmodel not found: 'm' is a model's own id" in (caught.value.details() or "")


async def test_a_name_of_which_nothing_is_said_is_an_alias_or_a_model(tmp_path: Path) -> None:
    async with mesh(tmp_path, dataplane_config=config()) as rig:
        await rig.register("m")
        await rig.register("other")
        alias(rig, "m", "other")
        await until(lambda: "m" in rig.routers[0].view.vmodels)
        await rig.call(INFER, by_id("m"), oip.ModelInferResponse)
        assert (rig.loads_of("m"), rig.loads_of("other")) == (0, 1)


async def test_a_header_names_the_model_where_the_message_does_not(tmp_path: Path) -> None:
    async with mesh(tmp_path, dataplane_config=config()) as rig:
        await rig.register("m")
        await rig.call(INFER, by_id(""), oip.ModelInferResponse, metadata=[("mm-model-id", "m")])
        assert rig.loads_of("m") == 1


async def test_a_method_that_is_not_listed_is_refused_until_others_are_allowed(
    tmp_path: Path,
) -> None:
    file = tmp_path / "dataplane.json"
    file.write_text(config())
    async with mesh(tmp_path, dataplane_config=str(file)) as rig:
        await rig.register("m")
        request = oip.ModelMetadataRequest(name="m")
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await rig.call(OIP + "ModelMetadata", request, oip.ModelMetadataResponse)
        assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED
        assert refused.value.details() == "Method not found or not permitted"
        file.write_text(config(allowOtherRpcs=True))
        dataplane = rig.routers[0].dataplane
        assert dataplane is not None
        rig.routers[0].relay.rpcs = dataplane.again()
        reply = await rig.call(OIP + "ModelMetadata", request, oip.ModelMetadataResponse)
        assert reply.name == "m"


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("{", "the dataplane config is no JSON"),
        ("[]", ": expected a mapping"),
        ('{"rpcConfigs": []}', "rpcConfigs: "),
        ('{"rpcConfigs": {"Method": {}}}', "rpcConfigs.Method: "),
        ('{"rpcConfigs": {"a.B/C": {"idExtractionPath": 1}}}', "rpcConfigs[a.B/C].idExtraction"),
        ('{"rpcConfigs": {"a.B/C": {"idExtractionPath": [0]}}}', "rpcConfigs[a.B/C].idExtraction"),
        ('{"rpcConfigs": {"a.B/C": {"vModelId": "x"}}}', "rpcConfigs[a.B/C].vModelId: "),
        ('{"allowOtherRpcs": 1}', "allowOtherRpcs: "),
    ],
)
def test_a_wrong_config_is_refused_with_its_field(text: str, path: str) -> None:
    with pytest.raises(InvalidArgument) as wrong:
        parse_dataplane_config(text.encode())
    assert wrong.value.message.startswith(path)


def test_a_file_that_is_broken_later_changes_nothing(tmp_path: Path) -> None:
    file = tmp_path / "dataplane.json"
    file.write_text(config())
    dataplane = Dataplane(str(file))
    before = dataplane.read()
    file.write_text("{")
    assert dataplane.again() is before
    file.unlink()
    assert dataplane.again() is before


@given(st.text("abc", min_size=1), st.sampled_from([(1,), (3,), (6, 1)]), st.integers(0, 400))
def test_the_first_bytes_name_the_model_or_leave_it_open(
    name: str, path: tuple[int, ...], cut: int
) -> None:
    message = splice(infer_request("", 1.0, 2.0).SerializeToString(), path, name.encode())
    framed = prefix(message) + message
    assert extract(message, path) == name
    assert peek_at_path(framed, b"identity", 1 << 20, path, ended=True) == (name, True)
    found, whole = peek_at_path(framed[:cut], b"identity", 1 << 20, path, ended=False)
    assert found in (None, name)
    assert whole == (cut >= len(framed))
