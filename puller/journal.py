"""What of a download is on the disk already: the file by which a broken-off one goes on.

One JSON line for each range that was written: ``[path, start, end]``; the first names the boot of
the machine. Nothing is synced: what a dead process wrote is in the kernel's hands, so a journal
holds as long as the machine has not been started anew, and counts for nothing after that. A line
that was cut off ends it. All functions block.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Final

import orjson

JOURNAL: Final = "journal"
Range = tuple[int, int]


@lru_cache(maxsize=1)
def boot_id() -> str:
    """Changes whenever this machine starts; "" where the system does not tell."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
    except OSError:
        return ""


class Journal:
    """Of one staging folder, whose content is in ``content`` below it."""

    def __init__(self, staging: Path, content: str) -> None:
        self._path = staging / JOURNAL
        self._content = staging / content

    def read(self, sizes: Mapping[str, int | None]) -> dict[str, list[Range]]:
        """The ranges that are there, by file: merged, in order. A journal that does not hold is
        removed with all that it speaks of."""
        found: dict[str, list[Range]] = {}
        try:
            lines = self._path.read_bytes().split(b"\n")[:-1]
            if not lines or orjson.loads(lines[0]) != {"boot": boot_id()} or not boot_id():
                raise ValueError("of another boot")
            for line in lines[1:]:
                path, start, end = orjson.loads(line)
                size_bytes = sizes.get(path)
                if size_bytes is None or not 0 <= start < end <= size_bytes:
                    raise ValueError("not of this artifact")
                found.setdefault(path, []).append((start, end))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, TypeError):
            self.forget()
            return {}
        return {
            path: merged(ranges)
            for path, ranges in found.items()
            if (self._content / path).is_file()
        }

    def add(self, path: str, start: int, end: int) -> None:
        line = orjson.dumps([path, start, end]) + b"\n"
        with self._path.open("ab") as file:
            if file.tell() == 0:
                line = orjson.dumps({"boot": boot_id()}) + b"\n" + line
            file.write(line)

    def forget(self) -> None:
        """What is on the disk is not to be gone on with."""
        self._path.unlink(missing_ok=True)


def merged(ranges: Sequence[Range]) -> list[Range]:
    out: list[Range] = []
    for start, end in sorted(ranges):
        if out and start <= out[-1][1]:
            out[-1] = (out[-1][0], max(out[-1][1], end))
        else:
            out.append((start, end))
    return out


def missing(ranges: Sequence[Range], size_bytes: int) -> list[Range]:
    """The gaps between merged ``ranges`` up to the size."""
    out: list[Range] = []
    at = 0
    for start, end in ranges:
        if start > at:
            out.append((at, start))
        at = end
    if at < size_bytes:
        out.append((at, size_bytes))
    return out
