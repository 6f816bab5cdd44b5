"""Locks that processes share by name, all on one file: one byte of it for each name.

Linux's open-file-description locks: the kernel drops them when a process dies, however it dies, so
that no lock can be left over; shared and exclusive convert atomically; one descriptor serves any
number of names (a lock file each would cost a descriptor per held artifact). A name's byte is its
hash, so two names collide with a chance of 2**-62, and would then only wait for each other.

Two locks taken through one ``RangeLocks`` never conflict: what is inside a process, the process
keeps in order by itself. Never blocks; an unexpected ``OSError`` (a file system without locks) is
passed on.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import struct
from pathlib import Path
from typing import Final

# struct flock of 64-bit Linux: type, whence, start, length, pid (0 for this kind of lock)
_FLOCK: Final = struct.Struct("@hhqqi4x")
_OFFSET_MASK: Final = (1 << 62) - 1


class RangeLocks:
    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)

    def try_shared(self, name: str) -> bool:
        """Take, or turn into, a shared lock; False when another process has it exclusively."""
        return self._try(name, fcntl.F_RDLCK)

    def try_exclusive(self, name: str) -> bool:
        """Take, or turn into, an exclusive lock; False (and no change) when another has it."""
        return self._try(name, fcntl.F_WRLCK)

    def release(self, name: str) -> None:
        """Nothing happens when it was not held."""
        self._try(name, fcntl.F_UNLCK)

    def close(self) -> None:
        """Drops every lock."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _try(self, name: str, kind: int) -> bool:
        digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
        offset = int.from_bytes(digest, "little") & _OFFSET_MASK
        try:
            request = _FLOCK.pack(kind, os.SEEK_SET, offset, 1, 0)
            fcntl.fcntl(self._descriptor, fcntl.F_OFD_SETLK, request)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                return False
            raise
        return True
