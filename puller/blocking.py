"""The puller's own few threads: file I/O and hashing never run in the event loop.

A pool of its own, because the loop's default pool also serves whoever else is in the process. A
call that has begun always ends before ``run`` returns, even when the caller is cancelled: no
thread is left writing into a folder that is being removed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class BlockingPool:
    def __init__(self, threads: int) -> None:
        self._pool = ThreadPoolExecutor(max_workers=threads, thread_name_prefix="puller")

    async def run(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        loop = asyncio.get_running_loop()
        future = loop.run_in_executor(self._pool, lambda: call(*args, **kwargs))
        cancelled: asyncio.CancelledError | None = None
        while not future.done():
            try:
                await asyncio.wait([future])
            except asyncio.CancelledError as error:
                cancelled = error
        if cancelled is not None:
            future.exception()  # seen: the cancel comes first
            raise cancelled
        return future.result()

    def close(self) -> None:
        self._pool.shutdown(wait=False)
