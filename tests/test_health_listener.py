"""/drained holds whoever asks until the process closes, and answers them first."""

from __future__ import annotations

import asyncio

import aiohttp

from mesh.health_listener import HealthListener
from mesh.metrics import InstanceMetrics


async def test_drained_is_answered_at_the_end() -> None:
    listener = HealthListener(InstanceMetrics(), lambda: "draining")
    port = await listener.start("127.0.0.1", 0)
    async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as session:
        asked = asyncio.create_task(session.get("/drained"))
        # A whole exchange after the first has been sent: it is held, and holds nobody up.
        async with session.get("/readyz") as ready:
            assert ready.status == 503
        assert not asked.done()
        await listener.close()
        async with await asked as answer:
            assert answer.status == 200
