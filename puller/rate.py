"""How fast the fetches of this process may read, all together.

``RateLimit`` is a bucket that fills at the rate and holds a tenth of a second's worth; who takes
more than there is waits until it is paid back. The decision (``wait_s``) is pure; ``spend`` sleeps.
A wait stops the reader from asking for more, so the sender is slowed by its own flow control.
"""

from __future__ import annotations

import asyncio
from typing import Final

_BURST_S: Final = 0.1


class RateLimit:
    """``bytes_per_s`` 0 is no limit."""

    def __init__(self, bytes_per_s: int) -> None:
        self._bytes_per_s = bytes_per_s
        self._paid_until_s: float | None = None  # when all that was taken will be paid for

    def wait_s(self, size_bytes: int, now_s: float) -> float:
        """Take ``size_bytes``; how long to wait before the next are taken."""
        if self._bytes_per_s == 0:
            return 0.0
        paid_s = now_s if self._paid_until_s is None else self._paid_until_s
        self._paid_until_s = max(paid_s, now_s - _BURST_S) + size_bytes / self._bytes_per_s
        return max(0.0, self._paid_until_s - now_s)

    async def spend(self, size_bytes: int) -> None:
        wait_s = self.wait_s(size_bytes, asyncio.get_running_loop().time())
        if wait_s > 0:
            await asyncio.sleep(wait_s)
