"""The back end of the relay measurements: answers each unary call with the request's bytes.

It obeys HTTP/2 windows in both directions: ``mesh.wire.server``, as an instance uses it.
``python -m bench.echo PORT``
"""

from __future__ import annotations

import asyncio
import gc
import signal
import sys

import uvloop

from bench.payload import INFER_PATH
from mesh.wire.limits import INSIDE
from mesh.wire.server import Server, ServerCall, Unary


def echo(call: ServerCall, message: bytes) -> None:
    call.reply(message)


async def serve(port: int) -> None:
    server = Server({INFER_PATH: Unary(echo)}, limits=INSIDE)
    await server.start("127.0.0.1", port)
    gc.freeze()
    stopped = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopped.set)
    await stopped.wait()
    await server.close()


if __name__ == "__main__":
    uvloop.run(serve(int(sys.argv[1])))
