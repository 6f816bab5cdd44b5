"""Fixtures of the data plane's tests."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.wire.relay_world import World, make_world, running


@pytest.fixture
async def world() -> AsyncIterator[World]:
    """Two instances behind a relay; at the end nothing may be left over."""
    async with running(await make_world()) as world:
        yield world
