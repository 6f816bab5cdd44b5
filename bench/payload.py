"""Requests of a chosen size, as messages and as gRPC frames for h2load."""

from __future__ import annotations

import random

from protos import oip_pb2

INFER_PATH = "/inference.GRPCInferenceService/ModelInfer"

# Bytes by which length prefixes can grow between an empty tensor and a large one, and an id's two.
_SLACK_BYTES = 12


def infer_message(model: str, size_bytes: int) -> bytes:
    """A ``ModelInferRequest`` of exactly ``size_bytes`` with one raw UINT8 input; the filling is
    random (with a fixed seed), so that a mixed-up or repeated part shows."""
    filling = random.Random(size_bytes).randbytes(size_bytes)
    count = size_bytes - _request(model, b"", "").ByteSize() - _SLACK_BYTES
    if count < 0:
        raise ValueError(f"a request for {model!r} does not fit into {size_bytes} bytes")
    missing = size_bytes - _request(model, filling[:count], "").ByteSize()
    return _request(model, filling[:count], "i" * (missing - 2)).SerializeToString()


def _request(model: str, content: bytes, ident: str) -> oip_pb2.ModelInferRequest:
    request = oip_pb2.ModelInferRequest(model_name=model, id=ident)
    request.inputs.add(name="x", datatype="UINT8", shape=[len(content)])
    request.raw_input_contents.append(content)
    return request


def framed(message: bytes) -> bytes:
    """gRPC's prefix (uncompressed, length) and the message: the body that h2load posts."""
    return b"\0" + len(message).to_bytes(4, "big") + message
