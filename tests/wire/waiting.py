"""Waiting for what has no event of its own, always with a time-out."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

WAIT_S = 60.0


async def until(condition: Callable[[], object], what: str = "") -> None:
    """Let the loop run until ``condition`` holds."""
    loop = asyncio.get_running_loop()
    end = loop.time() + WAIT_S
    while not condition():
        if loop.time() > end:
            raise AssertionError(f"did not come true in {WAIT_S:g} s: {what or condition}")
        await asyncio.sleep(0.001)
