from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest_asyncio

from mesh.runtimes.isolated_fork_server import ForkServers

from .isolation import Isolation, isolation


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def servers() -> AsyncIterator[ForkServers]:
    """Fork servers of a file's tests: a start costs half a second, and what a test does to its
    workers ends with them."""
    shared = ForkServers()
    yield shared
    await shared.close()


@pytest_asyncio.fixture(loop_scope="module")
async def workers(tmp_path: Path, servers: ForkServers) -> AsyncIterator[Isolation]:
    async with isolation(tmp_path, servers) as running:
        yield running
