"""Unix milliseconds that never go back.

The wall clock may be stepped; last-use instants, the order of eviction and time-outs must not care.
So the wall clock is read once, and the monotonic one from then on.
"""

from __future__ import annotations

import time


class Clock:
    """``offset_ms + perf_counter_ns() // 1_000_000`` is ``now_ms`` for who has the reading."""

    __slots__ = ("offset_ms",)

    def __init__(self) -> None:
        self.offset_ms = time.time_ns() // 1_000_000 - time.perf_counter_ns() // 1_000_000

    def now_ms(self) -> int:
        return self.offset_ms + time.perf_counter_ns() // 1_000_000
