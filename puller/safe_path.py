"""Names that come from outside, and the one way in which they may become paths on this disk.

Object names, archive members (zip-slip) and paths in requests are all text that somebody else
chose. ``safe_relative_path`` decides about the text alone and is pure; ``resolve_below`` follows
symbolic links on the disk and refuses what ends outside its root. Nothing else in ``puller`` joins
a foreign name to a path. Both fail with ``UnsafePathError``, which says what is wrong with the
name; the caller knows what to call it in its own error.
"""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath
from typing import Final

# Linux's own bounds: a longer name cannot be created anyway, but would fail half-way through.
NAME_MAX_BYTES: Final = 255
PATH_MAX_BYTES: Final = 2048  # of the relative path; leaves room for the root below PATH_MAX (4096)
DEPTH_MAX: Final = 64


class UnsafePathError(ValueError):
    """A name that would leave its root, or that no file may have."""


def safe_relative_path(name: str) -> PurePosixPath:
    """``name`` as a relative path of plain segments, or ``UnsafePathError``.

    Refused: empty, absolute, ``.`` and ``..`` and empty segments, backslashes (a separator on the
    systems where many archives are made), control characters with NUL, names that are not valid
    Unicode, and what is longer or deeper than a file system takes.
    """
    shown = repr(name if len(name) <= 200 else name[:200] + "…")
    if not name:
        raise UnsafePathError("the name is empty")
    if name.startswith("/"):
        raise UnsafePathError(f"{shown} is an absolute path")
    if "\\" in name:
        raise UnsafePathError(f"{shown} contains a backslash")
    if any(ord(char) < 0x20 or ord(char) == 0x7F for char in name):
        raise UnsafePathError(f"{shown} contains a control character")
    try:
        size_bytes = len(name.encode("utf-8"))
    except UnicodeEncodeError:
        raise UnsafePathError(f"{shown} is not valid Unicode") from None
    if size_bytes > PATH_MAX_BYTES:
        raise UnsafePathError(f"{shown} is longer than {PATH_MAX_BYTES} bytes")
    segments = name.split("/")
    if len(segments) > DEPTH_MAX:
        raise UnsafePathError(f"{shown} is deeper than {DEPTH_MAX} folders")
    for segment in segments:
        if not segment:
            raise UnsafePathError(f"{shown} contains an empty segment")
        if segment in (".", ".."):
            raise UnsafePathError(f"{shown} contains the segment {segment!r}")
        if len(segment.encode("utf-8")) > NAME_MAX_BYTES:
            raise UnsafePathError(f"{shown} contains a segment over {NAME_MAX_BYTES} bytes")
    return PurePosixPath(*segments)


def resolve_below(root: Path, path: Path) -> Path:
    """``path`` with every link followed, if that lies in ``root``; else ``UnsafePathError``.

    ``root`` may itself be reached through links. Raises ``FileNotFoundError`` when either does
    not exist, and other ``OSError`` (no permission) as they come.
    """
    try:
        real_root = root.resolve(strict=True)
        real = path.resolve(strict=True)
    except RuntimeError:  # what Python before 3.13 makes of a loop of links
        raise UnsafePathError(f"{os.fspath(path)!r} is a loop of links") from None
    if not is_below(real, real_root):
        raise UnsafePathError(f"{os.fspath(path)!r} leads out of {os.fspath(root)!r}")
    return real


def is_below(path: Path, root: Path) -> bool:
    """Whether ``path`` is ``root`` or lies in it; both absolute, by text alone."""
    return path == root or root in path.parents
