"""What native libraries hold on the C heap: measured around a load, given back after unloads.

The resident set is too coarse and too noisy for models of a few hundred KB, so glibc is asked
what is allocated. Where it cannot answer (another C library, glibc before 2.33), measurements are
None and nothing is given back. Safe for concurrent use.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

# Trimming walks the heap with its lock held, so it waits until this much may be lying idle.
TRIM_AFTER_BYTES: Final = 64 * 1024 * 1024


class _MallInfo2(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    )


@dataclass(slots=True)
class Growth:
    """``bytes_`` is how much more is allocated than before; None when it cannot be said."""

    bytes_: int | None = None


class NativeHeap:
    """The C heap of this process."""

    def __init__(self, trim_after_bytes: int = TRIM_AFTER_BYTES) -> None:
        self._lock = threading.Lock()
        self._measuring = 0
        self._overlaps = 0
        self._released_bytes = 0
        self._trim_after_bytes = trim_after_bytes
        libc = ctypes.CDLL(None)
        self._mallinfo2 = getattr(libc, "mallinfo2", None)
        if self._mallinfo2 is not None:
            self._mallinfo2.restype = _MallInfo2
        self._malloc_trim = getattr(libc, "malloc_trim", None)

    def allocated_bytes(self) -> int | None:
        if self._mallinfo2 is None:
            return None
        info = self._mallinfo2()
        return int(info.uordblks + info.hblkhd)

    @contextmanager
    def measure(self) -> Iterator[Growth]:
        """The growth over the block; None when another measured block ran beside it.

        Requests that run meanwhile free what they allocate, other loads do not: they would be
        counted in.
        """
        growth = Growth()
        with self._lock:
            self._measuring += 1
            self._overlaps += self._measuring > 1
            overlaps_before = self._overlaps if self._measuring == 1 else -1
        before = self.allocated_bytes()
        try:
            yield growth
            after = self.allocated_bytes()
            if before is not None and after is not None and overlaps_before == self._overlaps:
                growth.bytes_ = after - before
        finally:
            with self._lock:
                self._measuring -= 1

    def released(self, size_bytes: int) -> None:
        """Tells that this much was freed; now and then hands idle pages back to the system."""
        with self._lock:
            self._released_bytes += size_bytes
            if self._released_bytes < self._trim_after_bytes:
                return
            self._released_bytes = 0
        if self._malloc_trim is not None:
            self._malloc_trim(0)
