"""`mesh up` is ready when each router's view has all instances, not before."""

from __future__ import annotations

import asyncio
import json

from mesh.up.run import all_known


class Router:
    """Answers /readyz with what it is scripted to, the last answer for ever."""

    def __init__(self, *answers: bytes) -> None:
        self._answers = list(answers)
        self.asked = 0

    async def start(self) -> str:
        self._server = await asyncio.start_server(self._answer, "127.0.0.1", 0)
        return f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        self.asked += 1
        writer.write(self._answers.pop(0) if len(self._answers) > 1 else self._answers[0])
        writer.close()
        await writer.wait_closed()

    async def close(self) -> None:
        self._server.close()
        await self._server.wait_closed()


def knows(instances: int, status: bytes = b"200 OK") -> bytes:
    return b"HTTP/1.1 " + status + b"\r\n\r\n" + json.dumps({"instances": instances}).encode()


async def test_it_waits_until_every_router_knows_all_instances() -> None:
    slow = Router(knows(2, b"503 Not yet"), b"", b"HTTP/1.1 200 OK\r\n\r\n[]", knows(1), knows(2))
    quick = Router(knows(3))
    addresses = [await slow.start(), await quick.start()]
    try:
        async with asyncio.timeout(60):
            await all_known(addresses, 2)
    finally:
        await slow.close()
        await quick.close()
    assert (slow.asked, quick.asked) == (5, 1)
