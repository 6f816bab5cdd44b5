"""The MD5 of a file whose parts arrive in any order, reckoned while the rest is on its way.

It follows the part of the file that is complete from its beginning, reading it back from the disk
(from the kernel's memory, that is), in a thread. Whoever brings the next part does a stretch of it;
nobody waits for another's. So at the end little is left to do, where reading it all again would
take as long as the network did.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import Sequence
from typing import Final

from puller.blocking import BlockingPool
from puller.journal import Range, merged

_STRETCH_BYTES: Final = 16 << 20  # in one go of a thread
_BLOCK_BYTES: Final = 1 << 20


class FollowingMd5:
    def __init__(self, wanted: str, present: Sequence[Range]) -> None:
        self.wanted = wanted
        self._digest = hashlib.md5(usedforsecurity=False)
        self._at = 0
        self._there = list(present)
        self._busy = asyncio.Lock()

    async def follow(self, pool: BlockingPool, descriptor: int, arrived: Range) -> None:
        """A part is on the disk. Hashes what has become contiguous, unless somebody is at it."""
        if arrived[0] < arrived[1]:
            self._there = merged([*self._there, arrived])
        if not self._busy.locked():
            await self._catch_up(pool, descriptor)

    async def result(self, pool: BlockingPool, descriptor: int) -> str:
        """When all parts are there."""
        await self._catch_up(pool, descriptor)
        return self._digest.hexdigest()

    async def _catch_up(self, pool: BlockingPool, descriptor: int) -> None:
        async with self._busy:
            while (end := self._contiguous()) > self._at:
                await pool.run(self._hash, descriptor, min(end, self._at + _STRETCH_BYTES))

    def _contiguous(self) -> int:
        return self._there[0][1] if self._there and self._there[0][0] == 0 else 0

    def _hash(self, descriptor: int, end: int) -> None:
        while self._at < end:
            block = os.pread(descriptor, min(_BLOCK_BYTES, end - self._at), self._at)
            if not block:
                raise OSError(f"the file ends at {self._at}, {end} bytes were written")
            self._digest.update(block)
            self._at += len(block)
