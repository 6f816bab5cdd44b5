"""One daemon thread for one piece of blocking work: loads, unloads, predictions.

Not a pool: a runtime that hangs in a load must not hold a place that other loads need, nor keep
the process from exiting. The cache bounds how many there are by its slots and by memory.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import TypeVar

R = TypeVar("R")


async def in_thread(name: str, work: Callable[[], R]) -> R:
    """``work()`` in a thread of its own. Cancelling the waiter leaves the thread running."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[R] = loop.create_future()

    def settle(result: R | None, error: BaseException | None) -> None:
        if future.done():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)  # type: ignore[arg-type]

    def run() -> None:
        result: R | None = None
        failure: BaseException | None = None
        try:
            result = work()
        except StopIteration as error:  # a future cannot hold one
            failure = RuntimeError(f"{name}: {error!r}")
        except BaseException as error:
            failure = error
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(settle, result, failure)

    threading.Thread(target=run, name=name, daemon=True).start()
    return await future
