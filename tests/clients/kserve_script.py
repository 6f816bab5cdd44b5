"""KServe's own clients against the mesh. Run in a virtual environment of its own.

Usage: kserve_script.py GRPC_ADDRESS REST_ADDRESS. Prints "passed" and exits 0, or a traceback.
"""

from __future__ import annotations

import asyncio
import sys

import numpy as np
from kserve import InferenceGRPCClient, InferenceRESTClient, InferInput, InferRequest, RESTConfig

FLOWERS = np.array([[5.1, 3.5, 1.4, 0.2], [6.3, 3.3, 6.0, 2.5]], np.float32)
EXPECTED = [0, 2]


def request(*, binary: bool) -> InferRequest:
    tensor = InferInput("input", list(FLOWERS.shape), "FP32")
    tensor.set_data_from_numpy(FLOWERS, binary_data=binary)
    return InferRequest("iris-0001", [tensor])


def labels(response: object) -> list[int]:
    output = next(o for o in response.outputs if o.name == "label")  # type: ignore[attr-defined]
    return [int(value) for value in output.as_numpy().reshape(-1)]


async def main() -> None:
    grpc_address, rest_address = sys.argv[1:3]
    client = InferenceGRPCClient(grpc_address)
    assert await client.is_server_live() and await client.is_server_ready()
    assert await client.is_model_ready("iris-0001")
    for binary in (True, False):
        response = await client.infer(request(binary=binary))
        assert labels(response) == EXPECTED
        assert response.model_name == "iris-0001"
    try:
        await client.is_model_ready("no-such")
    except Exception as error:
        assert "no-such" in str(error), error
    await client.close()

    url = f"http://{rest_address}"
    rest = InferenceRESTClient(RESTConfig(protocol="v2"))
    assert await rest.is_server_live(url) and await rest.is_server_ready(url)
    assert await rest.is_model_ready(url, "iris-0001")
    for binary in (True, False):
        response = await rest.infer(url, request(binary=binary), model_name="iris-0001")
        assert labels(response) == EXPECTED
    v1 = InferenceRESTClient(RESTConfig(protocol="v1"))
    reply = await v1.infer(url, {"instances": FLOWERS.tolist()}, model_name="iris-skops")
    assert reply["predictions"] == EXPECTED, reply
    print("passed")


if __name__ == "__main__":
    asyncio.run(main())
