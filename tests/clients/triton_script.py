"""Everything that tritonclient can ask of the mesh. Run in a virtual environment of its own.

Usage: triton_script.py GRPC_ADDRESS REST_ADDRESS. Prints "passed" and exits 0, or a traceback.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton_http
from tritonclient.utils import InferenceServerException

FLOWERS = np.array([[5.1, 3.5, 1.4, 0.2], [6.3, 3.3, 6.0, 2.5]], np.float32)
EXPECTED = [0, 2]


def check_inference(client: Any, module: Any) -> None:
    wanted = module.InferInput("input", list(FLOWERS.shape), "FP32")
    wanted.set_data_from_numpy(FLOWERS)
    outputs = [module.InferRequestedOutput("label")]
    result = client.infer("iris-0001", [wanted], outputs=outputs, request_id="r-1")
    assert result.as_numpy("label").tolist() == EXPECTED
    reply = result.get_response()
    name = reply["model_name"] if isinstance(reply, dict) else reply.model_name
    request_id = reply["id"] if isinstance(reply, dict) else reply.id
    assert (name, request_id) == ("iris-0001", "r-1"), (name, request_id)
    everything = client.infer("iris-0001", [wanted])
    assert everything.as_numpy("label").tolist() == EXPECTED


def check_metadata(client: Any) -> None:
    assert client.is_server_live() and client.is_server_ready()
    assert client.is_model_ready("iris-0001")
    metadata = client.get_model_metadata("iris-0001")
    inputs = metadata["inputs"] if isinstance(metadata, dict) else metadata.inputs
    first = inputs[0]
    assert (first["name"] if isinstance(first, dict) else first.name) == "input"
    server = client.get_server_metadata()
    assert server["name"] if isinstance(server, dict) else server.name
    client.get_model_config("iris-0001")
    client.get_inference_statistics("iris-0001")
    index = client.get_model_repository_index()
    models = index if isinstance(index, list) else index.models
    names = {m["name"] if isinstance(m, dict) else m.name for m in models}
    assert "iris-0001" in names, sorted(names)[:5]


def check_repository(client: Any) -> None:
    client.load_model("iris-0001")
    assert client.is_model_ready("iris-0001")
    client.unload_model("iris-0001")


def check_errors(client: Any, module: Any) -> None:
    wrong = module.InferInput("inptu", list(FLOWERS.shape), "FP32")
    wrong.set_data_from_numpy(FLOWERS)
    for model, tensor, part in (("no-such", wrong, "no-such"), ("iris-0001", wrong, "inptu")):
        try:
            client.infer(model, [tensor])
        except InferenceServerException as error:
            assert part in str(error), error
        else:
            raise AssertionError(f"{model} answered")


def check_stream(client: Any) -> None:
    answers: list[Any] = []
    errors: list[Any] = []

    def on_answer(result: Any, error: Any) -> None:
        (errors if error else answers).append(error or result)

    client.start_stream(on_answer)
    wanted = triton_grpc.InferInput("input", list(FLOWERS.shape), "FP32")
    wanted.set_data_from_numpy(FLOWERS)
    for number in range(20):
        client.async_stream_infer("iris-0001", [wanted], request_id=str(number))
    client.stop_stream()  # waits for the answers
    assert not errors, errors
    assert [a.get_response().id for a in answers] == [str(n) for n in range(20)]
    assert all(a.as_numpy("label").tolist() == EXPECTED for a in answers)


def main() -> None:
    grpc_address, rest_address = sys.argv[1:3]
    with triton_grpc.InferenceServerClient(grpc_address) as client:
        check_metadata(client)
        check_inference(client, triton_grpc)
        check_repository(client)
        check_errors(client, triton_grpc)
        check_stream(client)
        header = {"mm-vmodel-id": "iris-0001"}
        wanted = triton_grpc.InferInput("input", list(FLOWERS.shape), "FP32")
        wanted.set_data_from_numpy(FLOWERS)
        result = client.infer("", [wanted], headers=header)
        assert result.as_numpy("label").tolist() == EXPECTED
        assert result.get_response().model_name == "iris-0001"
    with triton_http.InferenceServerClient(rest_address) as client:
        check_metadata(client)
        check_inference(client, triton_http)
        check_repository(client)
        check_errors(client, triton_http)
        plain = triton_http.InferInput("input", list(FLOWERS.shape), "FP32")
        plain.set_data_from_numpy(FLOWERS, binary_data=False)
        output = triton_http.InferRequestedOutput("label", binary_data=False)
        assert (
            client.infer("iris-0001", [plain], outputs=[output]).as_numpy("label").tolist()
            == EXPECTED
        )
    print("passed")


if __name__ == "__main__":
    main()
