"""A client that sends large requests and never opens its windows again.

Uses ``h2`` (a test library of the project), because a well-behaved client library reads.
"""

from __future__ import annotations

import contextlib
import importlib.util
import select
import socket
import time

import grpc

from bench.payload import INFER_PATH, framed
from bench.process import Unavailable
from bench.proxies import Proxy

STREAMS = 16
WATCH_SECONDS = 2.0
CALL_TIMEOUT_S = 5.0
CHUNK_BYTES = 16_384


def slow_reader_growth(target: Proxy, large: bytes, small: bytes) -> tuple[int, bool]:
    """(growth of the proxy's peak RSS in bytes, whether another client was served meanwhile)."""
    if importlib.util.find_spec("h2") is None:
        raise Unavailable("the slow reader needs the h2 package (pip install h2)")
    target.child.reset_peak_rss()
    before = target.child.rss_bytes()
    with socket.create_connection(("127.0.0.1", target.port)) as connection:
        send_without_reading(connection, framed(large), target.port)
        served = _another_client_is_served(target.port, small)
    return max(0, target.child.peak_rss_bytes() - before), served


def send_without_reading(connection: socket.socket, body: bytes, port: int) -> None:
    """Open the streams, send what the windows allow for a while, acknowledge no DATA at all."""
    from h2.config import H2Configuration
    from h2.connection import H2Connection

    client = H2Connection(H2Configuration(client_side=True, header_encoding=None))
    client.initiate_connection()
    headers = [
        (b":method", b"POST"), (b":scheme", b"http"), (b":path", INFER_PATH.encode()),
        (b":authority", f"127.0.0.1:{port}".encode()), (b"content-type", b"application/grpc"),
        (b"te", b"trailers"),
    ]  # fmt: skip
    left: dict[int, memoryview] = {}
    for _ in range(STREAMS):
        stream = client.get_next_available_stream_id()
        client.send_headers(stream, headers)
        left[stream] = memoryview(body)
    deadline = time.monotonic() + WATCH_SECONDS
    connection.setblocking(False)
    unsent = bytearray()
    while time.monotonic() < deadline:
        for stream in list(left):
            room = min(client.local_flow_control_window(stream), CHUNK_BYTES, len(left[stream]))
            if room > 0 and len(unsent) < 1 << 20:
                client.send_data(stream, bytes(left[stream][:room]))
                left[stream] = left[stream][room:]
                if not left[stream]:
                    client.end_stream(stream)
                    del left[stream]
        unsent += client.data_to_send()
        readable, writable, _ = select.select(
            [connection], [connection] if unsent else [], [], 0.01
        )
        if writable:
            with contextlib.suppress(BlockingIOError):
                del unsent[: connection.send(unsent[: 1 << 18])]
        if readable:
            data = connection.recv(1 << 16)
            if not data:
                return
            client.receive_data(data)


def _another_client_is_served(port: int, message: bytes) -> bool:
    with grpc.insecure_channel(
        f"127.0.0.1:{port}", options=(("grpc.use_local_subchannel_pool", 1),)
    ) as channel:
        try:
            reply = channel.unary_unary(INFER_PATH)(message, timeout=CALL_TIMEOUT_S)
        except grpc.RpcError:
            return False
    return bool(reply == message)
