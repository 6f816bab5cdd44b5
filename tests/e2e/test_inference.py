"""Open Inference Protocol by gRPC: every call, both forms of tensors, names and headers."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from onnx import TensorProto

from protos import oip_pb2 as oip
from tests.e2e.asking import (
    FLOWERS,
    LABELS,
    OIP,
    Asker,
    flowers,
    isvc,
    label_of,
    raw_request,
    typed_flowers,
)
from tests.e2e.conftest import Shared
from tests.runtimes.models import identity

pytestmark = [pytest.mark.e2e, pytest.mark.etcd]


def test_the_server_is_live_and_ready_and_names_itself(ask: Asker) -> None:
    assert ask.call(OIP + "ServerLive", oip.ServerLiveRequest(), oip.ServerLiveResponse).live
    assert ask.call(OIP + "ServerReady", oip.ServerReadyRequest(), oip.ServerReadyResponse).ready
    metadata = ask.call(
        OIP + "ServerMetadata", oip.ServerMetadataRequest(), oip.ServerMetadataResponse
    )
    assert metadata.name == "modelmesh-py" and metadata.version


def test_raw_tensors_are_answered_raw_and_typed_ones_typed(ask: Asker) -> None:
    raw = ask.infer(flowers("iris-0001"))
    assert raw.raw_output_contents and label_of(raw) == LABELS
    typed = ask.infer(typed_flowers("iris-0001"))
    assert not typed.raw_output_contents and label_of(typed) == LABELS


def test_the_reply_carries_the_clients_name_and_id(ask: Asker) -> None:
    request = flowers("iris-0001")
    request.id = "request-7"
    reply = ask.infer(request)
    assert (reply.model_name, reply.id) == ("iris-0001", "request-7")


def test_only_the_outputs_that_were_named_come_back(ask: Asker) -> None:
    assert [o.name for o in ask.infer(flowers("iris-0001")).outputs] == ["label"]
    everything = raw_request("iris-0001", input=FLOWERS)
    assert {o.name for o in ask.infer(everything).outputs} == {"label", "probabilities"}


@pytest.mark.parametrize("header", ["mm-model-id", "mm-vmodel-id", "mm-model-id-bin"])
def test_a_header_names_the_model(ask: Asker, header: str) -> None:
    request = flowers("")
    value: str | bytes = b"iris-0001" if header.endswith("-bin") else "iris-0001"
    reply = ask.infer(request, [(header, value)])
    assert label_of(reply) == LABELS and reply.model_name == "iris-0001"


def test_metadata_config_and_statistics_of_a_model(ask: Asker) -> None:
    ask.labels("iris-0001")
    metadata = ask.call(
        OIP + "ModelMetadata",
        oip.ModelMetadataRequest(name="iris-0001"),
        oip.ModelMetadataResponse,
    )
    assert metadata.name == "iris-0001" and list(metadata.versions) == ["1"]
    tensors = {t.name: (t.datatype, list(t.shape)) for t in metadata.inputs}
    assert tensors == {"input": ("FP32", [-1, 4])}
    config = ask.call(
        OIP + "ModelConfig", oip.ModelConfigRequest(name="iris-0001"), oip.ModelConfigResponse
    ).config
    assert (config.name, config.max_batch_size) == ("iris-0001", 0)
    assert [i.name for i in config.input] == ["input"]
    statistics = ask.call(
        OIP + "ModelStatistics",
        oip.ModelStatisticsRequest(name="iris-0001"),
        oip.ModelStatisticsResponse,
    ).model_stats
    assert [(s.name, s.version) for s in statistics] == [("iris-0001", "1")]
    assert statistics[0].inference_count >= 1


def test_the_index_and_readiness_tell_of_all_models(ask: Asker, shared: Shared) -> None:
    index = ask.call(
        OIP + "RepositoryIndex", oip.RepositoryIndexRequest(), oip.RepositoryIndexResponse
    )
    registered = {path.name for path in shared.models.iterdir() if not path.name.startswith(".")}
    assert registered <= {model.name for model in index.models}
    ready = ask.call(
        OIP + "ModelReady", oip.ModelReadyRequest(name="wine-0001"), oip.ModelReadyResponse
    )
    assert ready.ready  # loaded or not: a request would be answered


def test_load_and_unload_by_the_repository(ask: Asker) -> None:
    load = oip.RepositoryModelLoadRequest(model_name="wine-0001")
    ask.call(OIP + "RepositoryModelLoad", load, oip.RepositoryModelLoadResponse)
    assert ask.rows()["wine-0001"]["state"] == "LOADED"
    unload = oip.RepositoryModelUnloadRequest(model_name="wine-0001")
    ask.call(OIP + "RepositoryModelUnload", unload, oip.RepositoryModelUnloadResponse)
    assert ask.rows()["wine-0001"]["state"] == "NOT_LOADED"
    wine = raw_request("wine-0001", input=np.ones((1, 13), np.float32))
    assert ask.infer(wine).model_name == "wine-0001"


def test_a_stream_answers_in_order_and_tells_of_a_wrong_request(ask: Asker) -> None:
    def requests() -> Iterator[bytes]:
        for number in range(50):
            request = flowers("iris-0001")
            request.id = str(number)
            if number == 20:
                request.inputs[0].name = "inptu"
            yield request.SerializeToString()

    stream = ask.channel.stream_stream(
        OIP + "ModelStreamInfer", response_deserializer=oip.ModelStreamInferResponse.FromString
    )
    answers = list(stream(requests(), timeout=30))
    assert len(answers) == 50
    assert "inptu" in answers[20].error_message
    good = [a for a in answers if not a.error_message]
    assert [a.infer_response.id for a in good] == [str(n) for n in range(50) if n != 20]
    assert all(label_of(a.infer_response) == LABELS for a in good)


# (ONNX's type, raw bytes, typed field and values; FP16 and BF16 have no typed form)
DATATYPES = {
    "BOOL": (TensorProto.BOOL, b"\x01\x00", ("bool_contents", [True, False])),
    "INT8": (TensorProto.INT8, np.array([-3, 4], "i1").tobytes(), ("int_contents", [-3, 4])),
    "INT16": (TensorProto.INT16, np.array([-3, 4], "i2").tobytes(), ("int_contents", [-3, 4])),
    "INT32": (TensorProto.INT32, np.array([-3, 4], "i4").tobytes(), ("int_contents", [-3, 4])),
    "INT64": (TensorProto.INT64, np.array([-3, 4], "i8").tobytes(), ("int64_contents", [-3, 4])),
    "UINT8": (TensorProto.UINT8, b"\x03\x04", ("uint_contents", [3, 4])),
    "UINT16": (TensorProto.UINT16, np.array([3, 4], "u2").tobytes(), ("uint_contents", [3, 4])),
    "UINT32": (TensorProto.UINT32, np.array([3, 4], "u4").tobytes(), ("uint_contents", [3, 4])),
    "UINT64": (TensorProto.UINT64, np.array([3, 4], "u8").tobytes(), ("uint64_contents", [3, 4])),
    "FP16": (TensorProto.FLOAT16, np.array([0.5, -2], "f2").tobytes(), None),
    "BF16": (TensorProto.BFLOAT16, b"\x00\x3f\x00\xc0", None),
    "FP32": (TensorProto.FLOAT, np.array([0.5, -2], "f4").tobytes(), ("fp32_contents", [0.5, -2])),
    "FP64": (TensorProto.DOUBLE, np.array([0.5, -2], "f8").tobytes(), ("fp64_contents", [0.5, -2])),
    "BYTES": (
        TensorProto.STRING,
        b"\x02\x00\x00\x00hi\x00\x00\x00\x00",
        ("bytes_contents", [b"hi", b""]),
    ),
}  # fmt: skip


@pytest.mark.parametrize("datatype", DATATYPES)
def test_every_datatype_goes_there_and_back(ask: Asker, shared: Shared, datatype: str) -> None:
    kind, raw, typed = DATATYPES[datatype]
    name = f"echo-{datatype.lower()}"
    folder = shared.root / name
    identity(folder / "model.onnx", kind)
    ask.apply(isvc(name, folder.as_uri()))
    request = oip.ModelInferRequest(model_name=name, raw_input_contents=[raw])
    request.inputs.add(name="x", datatype=datatype, shape=[2])
    reply = ask.infer(request)
    assert reply.outputs[0].datatype == datatype and list(reply.outputs[0].shape) == [2]
    assert reply.raw_output_contents[0] == raw
    if typed is not None:
        field, values = typed
        request = oip.ModelInferRequest(model_name=name)
        tensor = request.inputs.add(name="x", datatype=datatype, shape=[2])
        getattr(tensor.contents, field).extend(values)
        reply = ask.infer(request)
        assert list(getattr(reply.outputs[0].contents, field)) == values
    assert ask.delete(name)


def test_parameters_are_taken(ask: Asker) -> None:
    request = flowers("iris-0001")
    request.parameters["priority"].int64_param = 3
    request.parameters["note"].string_param = "x"
    assert label_of(ask.infer(request)) == LABELS
