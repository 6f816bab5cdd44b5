"""Content checks with grpcio, byte for byte, before anything is measured."""

from __future__ import annotations

import grpc

from bench.payload import INFER_PATH, infer_message
from bench.process import BenchError

SIZES_BYTES = (400, 16_384, 65_536, 1 << 20, 4 << 20)
CALL_TIMEOUT_S = 20.0
CHANNEL_OPTIONS = (
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.use_local_subchannel_pool", 1),
)


def verify_echo(name: str, port: int, model: str) -> None:
    """Requests of several sizes, alone and eight at once, come back as they were sent."""
    with grpc.insecure_channel(f"127.0.0.1:{port}", options=CHANNEL_OPTIONS) as channel:
        call = channel.unary_unary(INFER_PATH)
        for size in SIZES_BYTES:
            message = infer_message(model, size)
            try:
                replies = [call(message, timeout=CALL_TIMEOUT_S)]
                pending = [call.future(message, timeout=CALL_TIMEOUT_S) for _ in range(8)]
                replies += [future.result() for future in pending]
            except grpc.RpcError as error:
                raise BenchError(f"{name} does not relay {size} bytes: {error}") from error
            if any(reply != message for reply in replies):
                raise BenchError(f"{name} changed the content of a message of {size} bytes")
