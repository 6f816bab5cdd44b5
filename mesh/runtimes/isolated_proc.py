"""What the kernel says of another process's memory and time. A process that is gone says 0."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Final

_PAGE_BYTES: Final = os.sysconf("SC_PAGE_SIZE")
_TICKS_PER_S: Final = os.sysconf("SC_CLK_TCK")


def resident_bytes(pid: int) -> int:
    """What is resident, shared pages included; a few microseconds."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_bytes().split()[1]) * _PAGE_BYTES
    except (OSError, IndexError):
        return 0


def private_bytes(pid: int) -> int:
    """What would come back if the process ended: its pages that nobody shares."""
    total_kb = 0
    with contextlib.suppress(OSError):
        for row in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if row.startswith("Private_"):
                total_kb += int(row.split()[1])
    return total_kb * 1024


def cpu_ms(pid: int) -> int:
    """Processor time that it has used."""
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(after_name[11]) + int(after_name[12])) * 1_000 // _TICKS_PER_S
    except (OSError, IndexError):
        return 0
