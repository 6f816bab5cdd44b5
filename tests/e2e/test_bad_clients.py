"""A client that goes away, does not read or sends garbage costs its own connection only."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import h2.connection
import h2.errors
import h2.events
import h2.settings
import numpy as np
import pytest
from onnx import TensorProto

from protos import oip_pb2 as oip
from tests.e2e.asking import LABELS, Asker, eventually, isvc, raw_request, routers_of, total
from tests.e2e.conftest import Shared
from tests.runtimes.models import identity

pytestmark = [pytest.mark.e2e, pytest.mark.etcd]

HEADERS = [
    (":method", "POST"),
    (":scheme", "http"),
    (":path", "/inference.GRPCInferenceService/ModelInfer"),
    (":authority", "mesh"),
    ("content-type", "application/grpc"),
    ("te", "trailers"),
]


@pytest.fixture
def bystanders(shared: Shared) -> Iterator[list[Asker]]:
    """Other clients, by several connections: on both routers but for one time in 128."""
    with contextlib.ExitStack() as stack:
        askers = [stack.enter_context(Asker(shared.grpc)) for _ in range(8)]
        check(askers)
        yield askers
        check(askers)


def check(askers: list[Asker]) -> None:
    assert all(asker.labels("iris-0001") == LABELS for asker in askers)


def dial(address: str) -> socket.socket:
    host, _, port = address.rpartition(":")
    connection = socket.create_connection((host, int(port)), timeout=60)
    # Or each window's last frame waits 40 ms for the acknowledgement of the one before.
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def read_to_end(connection: socket.socket) -> bytes:
    """Until the other side closes; that it does is the assertion (or the time-out raises)."""
    parts = []
    with contextlib.suppress(ConnectionResetError):
        while part := connection.recv(65_536):
            parts.append(part)
    return b"".join(parts)


GARBAGE = {
    "http/1.1": b"GET /v2 HTTP/1.1\r\nhost: x\r\n\r\n",
    "a TLS hello": bytes.fromhex("1603010200010001fc0303") + bytes(500),
    "zeros": bytes(100),
    "noise after the preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\xfe" * 200,
    "a huge frame": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\xff\xff\xff\x00\x00\x00\x00\x00\x01",
    "data on stream 0": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    + b"\x00\x00\x00\x04\x00\x00\x00\x00\x00"
    + b"\x00\x00\x01\x00\x00\x00\x00\x00\x00x",
}


@pytest.mark.parametrize("kind", GARBAGE)
def test_garbage_closes_its_connection(shared: Shared, bystanders: list[Asker], kind: str) -> None:
    with dial(shared.grpc) as connection:
        connection.sendall(GARBAGE[kind])
        read_to_end(connection)
        check(bystanders)


def test_garbage_by_rest_closes_its_connection(shared: Shared, bystanders: list[Asker]) -> None:
    with dial(shared.rest) as connection:
        connection.sendall(b"\x00\x01\x02 nonsense\r\n\r\n")
        answer = read_to_end(connection)
        assert not answer or b" 400 " in answer.splitlines()[0]
        check(bystanders)


def open_h2(
    address: str, settings: dict[int, int] | None = None
) -> tuple[socket.socket, h2.connection.H2Connection]:
    connection = dial(address)
    peer = h2.connection.H2Connection()
    if settings:
        peer.local_settings.update(settings)
    peer.initiate_connection()
    connection.sendall(peer.data_to_send())
    return connection, peer


def grpc_frame(message: oip.ModelInferRequest) -> bytes:
    body = message.SerializeToString()
    return struct.pack(">BI", 0, len(body)) + body


def test_clients_that_vanish_in_the_middle_of_a_message(
    shared: Shared, bystanders: list[Asker]
) -> None:
    message = grpc_frame(raw_request("iris-0001", input=np.ones((200, 4), np.float32)))
    for number in range(20):
        connection, peer = open_h2(shared.grpc)
        peer.send_headers(1, HEADERS)
        peer.send_data(1, message[: 40 + 50 * number])
        connection.sendall(peer.data_to_send())
        if number % 2:
            reset = struct.pack("ii", 1, 0)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
        connection.close()
    check(bystanders)
    routers = routers_of(shared.mesh)
    eventually(lambda: total(routers, "mesh_buffered_bytes") == 0, "the end of what was held")


def test_a_client_that_does_not_read_holds_up_nobody_and_little_memory(
    shared: Shared, bystanders: list[Asker], ask: Asker
) -> None:
    identity(shared.root / "echo-large" / "model.onnx", TensorProto.FLOAT)
    ask.apply(isvc("echo-large", (shared.root / "echo-large").as_uri()))
    message = grpc_frame(raw_request("echo-large", x=np.ones((1 << 20,), np.float32)))  # 4 MiB
    connection, peer = open_h2(shared.grpc)
    before = routers_resident_bytes(shared)
    with connection:
        for number in range(16):
            send_all(connection, peer, 2 * number + 1, message)
        # 64 MiB of answers want to come, and 64 KiB of them may: the router takes at most a
        # window of each.
        for _ in range(20):
            check(bystanders)
        assert routers_resident_bytes(shared) < before + (32 << 20)
    routers = routers_of(shared.mesh)
    eventually(lambda: total(routers, "mesh_buffered_bytes") == 0, "the end of what was held")
    assert ask.delete("echo-large")


def routers_resident_bytes(shared: Shared) -> int:
    page = os.sysconf("SC_PAGE_SIZE")
    pids = [pid for name, pid in shared.mesh.children().items() if name.startswith("router")]
    return sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * page for pid in pids)


def send_all(
    connection: socket.socket, peer: h2.connection.H2Connection, stream: int, message: bytes
) -> None:
    """A whole request, as the router's windows allow; its answer is not taken."""
    peer.send_headers(stream, HEADERS)
    sent = 0
    while sent < len(message):
        size = min(
            peer.local_flow_control_window(stream), peer.max_outbound_frame_size,
            len(message) - sent,
        )  # fmt: skip
        if size > 0:
            last = sent + size == len(message)
            peer.send_data(stream, message[sent : sent + size], end_stream=last)
            sent += size
        connection.sendall(peer.data_to_send())
        if size <= 0:
            # What comes is looked at for windows only: no window is ever given back.
            peer.receive_data(connection.recv(65_536))


def test_streams_opened_and_reset_without_end_close_the_connection(
    shared: Shared, bystanders: list[Asker]
) -> None:
    connection, peer = open_h2(shared.grpc)
    with connection, contextlib.suppress(BrokenPipeError, ConnectionResetError):
        for number in range(5_000):
            peer.send_headers(2 * number + 1, HEADERS)
            peer.reset_stream(2 * number + 1, h2.errors.ErrorCodes.CANCEL)
            if number % 100 == 99:
                connection.sendall(peer.data_to_send())
        answer = read_to_end(connection)
        # The last frame is GOAWAY with ENHANCE_YOUR_CALM.
        assert h2.errors.ErrorCodes.ENHANCE_YOUR_CALM.to_bytes(4, "big") in answer[-200:]
    check(bystanders)


def test_a_header_block_without_end_closes_the_connection(
    shared: Shared, bystanders: list[Asker]
) -> None:
    connection, _ = open_h2(shared.grpc)
    with connection, contextlib.suppress(BrokenPipeError, ConnectionResetError):
        connection.sendall(b"\x00\x00\x01\x01\x00\x00\x00\x00\x01\x83")  # HEADERS, no END_HEADERS
        for _ in range(2_000):
            connection.sendall(
                b"\x00\x00\x10\x09\x00\x00\x00\x00\x01" + b"\x00\x03abc\x0adefghijklm"[:16]
            )
        read_to_end(connection)
    check(bystanders)


def test_a_client_that_gives_up_costs_nothing(shared: Shared, bystanders: list[Asker]) -> None:
    """Cancels and deadlines of requests that wait for a load and of those that run."""
    with Asker(shared.grpc) as ask:
        for _ in range(30):
            ask.infer_later(raw_request("digits-0001", input=np.ones((1, 64), np.float32))).cancel()
    check(bystanders)
    with Asker(shared.grpc) as ask:
        reply = ask.infer(raw_request("digits-0001", input=np.ones((1, 64), np.float32)))
        assert reply.model_name == "digits-0001"
    routers = routers_of(shared.mesh)
    eventually(lambda: total(routers, "mesh_waiting_requests") == 0, "the end of all waiting")
