"""The puller's own few threads: file I/O and hashing never run in the event loop.

A pool of its own, because the loop's default pool also serves whoever else is in the process. A
call that has begun always ends before ``run`` returns, even when the caller is cancelled: no
thread is left writing into a folder that is being removed.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class BlockingPool:
    def __init__(self, threads: int) -> None:
        self._pool = ThreadPoolExecutor(max_workers=threads, thread_name_prefix="puller")

    async def run(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        # Not loop.run_in_executor: uvloop's looks at the signature of what it is given, each time.
        future = asyncio.wrap_future(self._pool.submit(call, *args, **kwargs))
        try:
            return await asyncio.shield(future)  # a third of what asyncio.wait costs
        except asyncio.CancelledError:
            while not future.done():
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.wait([future])
            if not future.cancelled():
                future.exception()  # seen: the cancel comes first
            raise

    def close(self) -> None:
        self._pool.shutdown(wait=False)
