"""The few calls by which artifacts get onto the disk; a port, so that tests can fill the disk.

All of them block. They fail with the ``OSError`` of the system call; ``is_full`` tells those that
mean that there is no room.
"""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Protocol

Chunk = bytes | bytearray | memoryview


class Disk(Protocol):
    def free_bytes(self, directory: Path) -> int: ...

    def create(self, path: Path) -> int:
        """A descriptor of a new file; parent folders are made. Fails if the file exists."""
        ...

    def reopen(self, path: Path) -> int:
        """A descriptor of a file that is there, to go on writing."""
        ...

    def write(self, descriptor: int, data: Chunk, offset: int) -> None:
        """All of ``data`` at ``offset``."""
        ...

    def sync(self, descriptor: int) -> None:
        """Returns when what was written outlives a power cut."""
        ...

    def close(self, descriptor: int) -> None: ...


class RealDisk:
    def free_bytes(self, directory: Path) -> int:
        return shutil.disk_usage(directory).free

    def create(self, path: Path) -> int:
        path.parent.mkdir(parents=True, exist_ok=True)
        # O_NOFOLLOW and O_EXCL: the folder is ours alone, and stays so if somebody put a link in.
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        return os.open(path, flags, 0o644)

    def reopen(self, path: Path) -> int:
        return os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)

    def write(self, descriptor: int, data: Chunk, offset: int) -> None:
        view = memoryview(data)
        while view:
            written = os.pwrite(descriptor, view, offset)
            view = view[written:]
            offset += written

    def sync(self, descriptor: int) -> None:
        os.fdatasync(descriptor)

    def close(self, descriptor: int) -> None:
        os.close(descriptor)


def is_full(error: OSError) -> bool:
    return error.errno in (errno.ENOSPC, errno.EDQUOT)
