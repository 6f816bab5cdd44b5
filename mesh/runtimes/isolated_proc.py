"""What the kernel says of another process's memory, time and children. A process that is gone
says 0, and has none."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Final

_PAGE_BYTES: Final = os.sysconf("SC_PAGE_SIZE")
# Descendants that are looked for; who starts more is not measured to the last of them.
_DESCENDANTS_MAX: Final = 1_024
_TICKS_PER_S: Final = os.sysconf("SC_CLK_TCK")


def resident_bytes(pid: int) -> int:
    """What is resident, shared pages included; a few microseconds."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_bytes().split()[1]) * _PAGE_BYTES
    except (OSError, IndexError):
        return 0


def private_bytes(pid: int) -> int:
    """What would come back if the process ended: its pages that nobody shares."""
    return _rolled_up_bytes(pid, "Private_")


def proportional_bytes(pid: int) -> int:
    """What is resident, a shared page by halves, thirds ...: over a family, each counts once."""
    return _rolled_up_bytes(pid, "Pss:")


def _rolled_up_bytes(pid: int, rows: str) -> int:
    total_kb = 0
    with contextlib.suppress(OSError):
        for row in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if row.startswith(rows):
                total_kb += int(row.split()[1])
    return total_kb * 1024


def descendants(pid: int) -> list[int]:
    """Children, their children, and so on; some 20 us for a process that has none."""
    found = _children(pid)
    for child in found:  # grows meanwhile
        if len(found) >= _DESCENDANTS_MAX:
            break
        found += _children(child)
    return found


def _children(pid: int) -> list[int]:
    folder = f"/proc/{pid}/task"
    found: list[int] = []
    with contextlib.suppress(OSError, ValueError):
        for task in os.listdir(folder):  # noqa: PTH208 - names are all that is wanted
            with contextlib.suppress(OSError):
                found += map(int, Path(f"{folder}/{task}/children").read_bytes().split())
    return found


def cpu_ms(pid: int) -> int:
    """Processor time that it has used."""
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(after_name[11]) + int(after_name[12])) * 1_000 // _TICKS_PER_S
    except (OSError, IndexError):
        return 0
