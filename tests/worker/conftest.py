from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from .isolation import Isolation, isolation


@pytest.fixture
async def workers(tmp_path: Path) -> AsyncIterator[Isolation]:
    async with isolation(tmp_path) as running:
        yield running
