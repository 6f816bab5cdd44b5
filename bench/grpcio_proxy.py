"""The baseline of the relay: grpc.aio passing the raw bytes of unary calls through.

``python -m bench.grpcio_proxy LISTEN_PORT BACKEND_PORT``
"""

from __future__ import annotations

import asyncio
import sys

import grpc
import grpc.aio

OPTIONS = (
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.so_reuseport", 0),
)


class PassThrough(grpc.GenericRpcHandler):  # type: ignore[misc]
    """Any unary method, bytes in, bytes out."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._channel = channel
        self._handlers: dict[str, grpc.RpcMethodHandler] = {}

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        handler = self._handlers.get(details.method)
        if handler is None:
            call = self._channel.unary_unary(details.method)

            async def relay(request: bytes, context: grpc.aio.ServicerContext) -> bytes:
                reply: bytes = await call(request)
                return reply

            handler = grpc.unary_unary_rpc_method_handler(relay)
            self._handlers[details.method] = handler
        return handler


async def serve(port: int, backend: int) -> None:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{backend}", options=OPTIONS) as channel:
        server = grpc.aio.server(options=OPTIONS)
        server.add_generic_rpc_handlers((PassThrough(channel),))
        server.add_insecure_port(f"127.0.0.1:{port}")
        await server.start()
        await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(serve(int(sys.argv[1]), int(sys.argv[2])))
