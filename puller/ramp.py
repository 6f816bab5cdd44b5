"""How many reads one download has at once: more only while it waits for its store. Pure.

A far store sends a tenth of what a line carries on each connection, so a download needs several;
a near one fills the processor with one, and each further connection then only costs: memory that
has left the processor's caches, and half of the rate at eight (measured on loopback). What tells
them apart is the share of its time that a download spends on bytes that have come. It begins with
one read, doubles while that share is small (a far store has all reads after 75 ms), and ends one
after its part while the share is large.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

LOOK_MS: Final = 25  # between two looks; a near store's first bytes are there by then
_IDLE_SHARE: Final = 0.25  # one connection on loopback, one core: a half; a far store: below 0.1
_BUSY_SHARE: Final = 0.6


@dataclass(slots=True)
class Ramp:
    """Shares are of all the time since the beginning, so that one pause late does not count."""

    reads_max: int
    started_s: float
    reads: int = 1
    busy_s: float = 0.0  # on bytes that have come, over all reads; also what a rate limit takes

    def more(self, now_s: float) -> int:
        """How many reads to begin now; they count as begun."""
        if self.busy_s >= _IDLE_SHARE * (now_s - self.started_s):
            return 0
        added = min(self.reads, self.reads_max - self.reads)
        self.reads += added
        return added

    def one_less(self, now_s: float) -> bool:
        """Whether a read that has come to the end of its part ends; it counts as ended."""
        if self.reads == 1 or self.busy_s <= _BUSY_SHARE * (now_s - self.started_s):
            return False
        self.reads -= 1
        return True
