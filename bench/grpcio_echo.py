"""A back end that is none of ours: grpc.aio answering with the request's bytes.

Too slow to tell fast proxies apart; for checking the harness and for a second opinion on content.
``python -m bench.grpcio_echo PORT``
"""

from __future__ import annotations

import asyncio
import sys

import grpc
import grpc.aio

from bench.grpcio_proxy import OPTIONS


class Echo(grpc.GenericRpcHandler):  # type: ignore[misc]
    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        return HANDLER


async def echo(request: bytes, context: grpc.aio.ServicerContext) -> bytes:
    return request


HANDLER = grpc.unary_unary_rpc_method_handler(echo)


async def serve(port: int) -> None:
    server = grpc.aio.server(options=OPTIONS)
    server.add_generic_rpc_handlers((Echo(),))
    server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(serve(int(sys.argv[1])))
