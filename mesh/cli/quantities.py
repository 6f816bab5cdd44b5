"""Sizes (`1GiB`) and durations (`30s`) as people write them on a command line.

Pure. A text that cannot be read raises ``ValueError`` with what was expected.
"""

from __future__ import annotations

import re
from typing import Final

_SIZE: Final = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")
_DURATION: Final = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)")
# Both ways of writing binary units are in use: ours (GiB) and Kubernetes' (Gi).
_UNITS: Final[dict[str, int]] = {
    "": 1,
    "b": 1,
    "k": 1000,
    "kb": 1000,
    "m": 1000**2,
    "mb": 1000**2,
    "g": 1000**3,
    "gb": 1000**3,
    "t": 1000**4,
    "tb": 1000**4,
    "ki": 1024,
    "kib": 1024,
    "mi": 1024**2,
    "mib": 1024**2,
    "gi": 1024**3,
    "gib": 1024**3,
    "ti": 1024**4,
    "tib": 1024**4,
}
_MILLISECONDS: Final[dict[str, int]] = {
    "ms": 1,
    "s": 1000,
    "m": 60_000,
    "h": 3_600_000,
    "d": 86_400_000,
}


def parse_size(text: str) -> int:
    """Bytes of ``1GiB``, ``512Mi``, ``1.5GB`` or ``1048576``."""
    match = _SIZE.fullmatch(text)
    factor = _UNITS.get(match[2].lower()) if match else None
    if match is None or factor is None:
        raise ValueError(
            f"{text!r} is not a size: write for example 512MiB, 1GiB, 1.5GB or 1048576"
        )
    size_bytes = int(float(match[1]) * factor) if "." in match[1] else int(match[1]) * factor
    if size_bytes <= 0:
        raise ValueError(f"{text!r} is no memory at all: write for example 512MiB")
    return size_bytes


def parse_duration_ms(text: str) -> int:
    """Milliseconds of ``30s``, ``250ms``, ``1h30m`` or a plain number of seconds."""
    compact = text.strip().replace(" ", "")
    parts = _DURATION.findall(compact)
    if parts and "".join(number + unit for number, unit in parts) == compact:
        return round(sum(float(number) * _MILLISECONDS[unit] for number, unit in parts))
    if re.fullmatch(r"\d+(\.\d+)?", compact):
        return round(float(compact) * 1000)
    raise ValueError(f"{text!r} is not a duration: write for example 30s, 250ms, 5m or 1h30m")


def format_size(size_bytes: int) -> str:
    """``1.5 GiB``: three significant digits at most."""
    value = float(size_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return f"{value:.3g} {unit}" if value < 1000 else f"{value:.0f} {unit}"
        value /= 1024
    return f"{value:.3g} TiB"


def format_progress(done_bytes: int, total_bytes: int | None) -> str:
    """``120 MiB of 512 MiB (23 %)``."""
    if total_bytes is None:
        return f"{format_size(done_bytes)} of an unknown size"
    share = f" ({100 * done_bytes // total_bytes} %)" if total_bytes else ""
    return f"{format_size(done_bytes)} of {format_size(total_bytes)}{share}"


def format_age(age_ms: int) -> str:
    """``5s``, ``12m``, ``3h``, ``2d``: as kubectl shows ages."""
    seconds = max(0, age_ms) // 1000
    if seconds < 120:
        return f"{seconds}s"
    if seconds < 120 * 60:
        return f"{seconds // 60}m"
    if seconds < 48 * 3600:
        return f"{seconds // 3600}h"
    return f"{seconds // 86400}d"
