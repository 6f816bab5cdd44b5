"""The ceiling of the instance: one loop that parses, runs and serialises the same request.

No socket, no HTTP/2, no cache of models. ``python -m bench.bare_loop MODEL REQUEST SECONDS``
prints ``{"requests": n, "seconds": s, "cpu_seconds": s}``.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from protos import oip_pb2

BATCH = 100


def answer(session: Any, message: bytes) -> bytes:
    request = oip_pb2.ModelInferRequest.FromString(message)
    tensor = request.inputs[0]
    values = np.frombuffer(request.raw_input_contents[0], np.float32).reshape(tensor.shape)
    (result,) = session.run(None, {tensor.name: values})
    reply = oip_pb2.ModelInferResponse(model_name=request.model_name, id=request.id)
    reply.outputs.add(name="y", datatype="FP32", shape=result.shape)
    reply.raw_output_contents.append(result.tobytes())
    made: bytes = reply.SerializeToString()
    return made


def open_session(model: bytes) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def run(model: bytes, message: bytes, seconds: float) -> dict[str, float]:
    session = open_session(model)
    for _ in range(BATCH):
        answer(session, message)
    requests = 0
    started, cpu_started = time.perf_counter(), time.process_time()
    until = started + seconds
    while time.perf_counter() < until:
        for _ in range(BATCH):
            answer(session, message)
        requests += BATCH
    return {
        "requests": requests,
        "seconds": time.perf_counter() - started,
        "cpu_seconds": time.process_time() - cpu_started,
    }


if __name__ == "__main__":
    model_file, request_file, length = sys.argv[1:]
    found = run(Path(model_file).read_bytes(), Path(request_file).read_bytes(), float(length))
    json.dump(found, sys.stdout)
