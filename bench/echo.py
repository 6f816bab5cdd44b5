"""The back end of the relay measurements: answers each unary call with the request's bytes.

It obeys HTTP/2 windows in both directions and replies when it has the whole request, as an
instance does, but it keeps the pieces as they came: little of the core that it shares with the
proxy goes into it. ``python -m bench.echo PORT``
"""

from __future__ import annotations

import asyncio
import gc
import signal
import sys

import uvloop

from mesh.wire import hpack
from mesh.wire.head import RequestHead
from mesh.wire.limits import INSIDE
from mesh.wire.outbound import Outbound
from mesh.wire.server import Server
from mesh.wire.stream import Buffer, Stream

REPLY_BLOCK = hpack.encode([(b":status", b"200"), (b"content-type", b"application/grpc")])
TRAILERS_BLOCK = hpack.encode([(b"grpc-status", b"0")])


class EchoStream(Stream):
    """Keeps what it receives and sends it when the request has ended."""

    __slots__ = ("filled", "whole")

    def __init__(self, conn: Outbound, stream_id: int) -> None:
        super().__init__(conn, stream_id)
        self.whole = bytearray()
        self.filled = 0

    def on_data(self, data: Buffer, end: bool) -> None:
        if end and not self.filled:  # all of it in one frame
            self.answer(bytes(data))
            return
        size = len(data)
        if not self.filled:  # as an instance does: room for the message, and a larger window
            self.whole = bytearray(5 + int.from_bytes(data[1:5], "big"))
            self.grow_window(self.conn.limits.accepted_window_bytes)
        self.whole[self.filled : self.filled + size] = data
        self.filled += size
        if not end:
            self.consume(size)
            return
        # In one piece, so that it leaves in frames of full size: HAProxy 2.6 ends a connection with
        # INTERNAL_ERROR when several streams send it DATA of odd sizes at once.
        self.answer(memoryview(self.whole))

    def answer(self, message: Buffer) -> None:
        self.send_headers(REPLY_BLOCK, False)
        self.send_data(message, False)
        self.send_trailers(TRAILERS_BLOCK)

    def on_reset(self, code: int) -> None:
        self.whole = bytearray()


class EchoEverything:
    """A server's fallback: every path is an echo."""

    def new_stream(
        self, conn: Outbound, stream_id: int, head: RequestHead, end: bool
    ) -> Stream | None:
        stream = EchoStream(conn, stream_id)
        stream.remote_closed = end
        conn.streams[stream_id] = stream
        if end:
            stream.on_data(b"", True)
        return stream


async def serve(port: int) -> None:
    server = Server({}, limits=INSIDE, fallback=EchoEverything())
    await server.start("127.0.0.1", port)
    gc.freeze()
    stopped = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopped.set)
    await stopped.wait()
    await server.close()


if __name__ == "__main__":
    uvloop.run(serve(int(sys.argv[1])))
