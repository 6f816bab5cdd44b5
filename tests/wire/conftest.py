"""Fixtures of the data plane's tests."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

import pytest
import uvloop

from tests.wire.relay_world import World, make_world, running


def pytest_asyncio_loop_factories() -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Every test with a loop runs on both kinds: their transports differ."""
    return {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}


@pytest.fixture
async def world() -> AsyncIterator[World]:
    """Two instances behind a relay; at the end nothing may be left over."""
    async with running(await make_world()) as world:
        yield world
