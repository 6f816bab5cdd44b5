"""The disk cache: complete artifacts, bounded by bytes, evicted by last use, shared by processes.

Layout below ``cache_dir`` (one file system, so that a rename publishes)::

    locks                                        one byte per name, see puller.range_locks
    entries/<location>-<version>-<bytes>/        a complete artifact, never changed
    staging/<process>/<location>-<version>-<bytes>/   a download under way: a reservation, too
    staging/<process>/more-<bytes>-<random>/     what it turned out to need beyond that
    staging/<process>/trash-<random>/            an evicted entry that is being removed
    partial/<location>-<version>-<bytes>/        a download that broke off, to go on from

An entry's size is in its name and its last use is its folder's modification time, so one scan of
the folder is the whole index, and there is nothing that could disagree with the disk. A process
that holds an entry has a shared lock on its location and version, one that makes or removes it an
exclusive one; the kernel drops the locks of a process that dies. Of what a dead process left in
``staging``, downloads with a journal move to ``partial`` at the next start and the rest is removed.
What is in ``partial`` counts as taken, goes before any entry when room is needed, and after a day.

All methods block and may be called from several threads. They fail with ``LoadFailed``:
FAILED_PRECONDITION for an artifact that can never fit, UNAVAILABLE when there is no room now or
the disk fails.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Final

from mesh.core.errors import Code, LoadFailed
from puller.disk import Disk
from puller.journal import JOURNAL
from puller.range_locks import RangeLocks

_NAME: Final = re.compile(r"([0-9a-f]{32})-([0-9a-f]{16})-(\d{1,18})")
_CACHE_LOCK: Final = "cache"  # who changes what the cache holds has this, for milliseconds
_CACHE_LOCK_TIMEOUT_MS: Final = 30_000
_CACHE_LOCK_POLL_MS: Final = 5
_MORE: Final = re.compile(r"more-(\d{1,18})-[0-9a-f]{12}")
_MORE_STEP_BYTES: Final = 64 << 20  # of room, when it is not known how much will be needed
_PARTIAL_KEPT_S: Final = 24 * 3600


@dataclass(frozen=True, slots=True)
class EntryName:
    """Which artifact (``location``), in which state of its source (``version``), how large."""

    location: str  # 32 hex digits
    version: str  # 16 hex digits
    size_bytes: int

    def __str__(self) -> str:
        return f"{self.location}-{self.version}-{self.size_bytes}"

    @property
    def lock(self) -> str:
        """Without the size, which is not always known when the making begins."""
        return f"{self.location}-{self.version}"

    @classmethod
    def parse(cls, text: str) -> EntryName | None:
        match = _NAME.fullmatch(text)
        return cls(match[1], match[2], int(match[3])) if match else None


class Begun(Enum):
    """What ``begin`` found."""

    STAGING = "STAGING"  # ours to make: fill the staging folder, then publish or abandon
    PRESENT = "PRESENT"  # it is complete and now held
    BUSY = "BUSY"  # another process makes or removes it: look again in a moment


class DiskCache:
    def __init__(self, directory: Path, capacity_bytes: int, disk: Disk) -> None:
        directory = directory.absolute()  # paths handed out must outlive a change of folder
        self._directory = directory
        self._capacity_bytes = capacity_bytes
        self._disk = disk
        self._entries = directory / "entries"
        self._partial = directory / "partial"
        self._process = f"{os.getpid()}-{secrets.token_hex(6)}"
        self._staging = directory / "staging" / self._process
        self._mutex = threading.Lock()  # guards _holds and what may not interleave with a hold
        self._holds: dict[str, int] = {}
        self._more: dict[str, list[Path]] = {}  # by lock: room reserved beyond the name's size
        self._changes = threading.Lock()  # the cache-wide lock, inside this process
        self._locks: RangeLocks | None = None

    def start(self) -> None:
        """Make the folders, remove what dead processes left, shrink to the capacity."""
        with self._reported("prepare"):
            self._entries.mkdir(parents=True, exist_ok=True)
            (self._directory / "staging").mkdir(exist_ok=True)
            self._partial.mkdir(exist_ok=True)
            self._locks = RangeLocks(self._directory / "locks")
            # Lock first: a folder in staging that nobody has locked is a dead process's.
            self._locks.try_exclusive(self._staging_lock(self._process))
            self._staging.mkdir()
            with self._changing():
                self._sort_out_dead_staging()
                self._remove_partials(lambda used_at_s, _: used_at_s < _stale_s())
                self._evict_down_to(self._capacity_bytes - self._reserved_bytes(), 0)

    def close(self) -> None:
        """Let go of everything; complete entries stay for the next start."""
        if self._locks is None:
            return
        shutil.rmtree(self._staging, ignore_errors=True)
        self._locks.close()
        self._locks = None
        self._holds.clear()

    def content(self, name: EntryName) -> Path:
        return self._entries / str(name)

    def staging(self, name: EntryName) -> Path:
        return self._staging / str(name)

    def try_hold(self, name: EntryName) -> bool:
        """Hold the entry if it is there and complete. One ``release`` for each hold."""
        with self._reported("look into"), self._mutex:
            return self._hold_locked(name)

    def begin(self, name: EntryName) -> Begun:
        """Take the making of an entry on: its room is reserved, its staging folder is there."""
        if name.size_bytes > self._capacity_bytes:
            raise self._too_large(name.size_bytes)
        with self._reported("write to"), self._changing():
            with self._mutex:
                if self._hold_locked(name):
                    return Begun.PRESENT
                if not self._lock_table.try_exclusive(name.lock):
                    return Begun.BUSY
            try:
                self._reserve(name)
            except BaseException:
                self.abandon(name)
                raise
            return Begun.STAGING

    def cover(self, name: EntryName, total_bytes: int) -> None:
        """Reserve more for a download under way, so that it may take ``total_bytes`` in all."""
        with self._mutex:
            more = [_more_bytes(path.name) for path in self._more.get(name.lock, ())]
        reserved_bytes = name.size_bytes + sum(more)
        if total_bytes <= reserved_bytes:
            return
        if total_bytes > self._capacity_bytes:
            raise self._too_large(total_bytes)
        with self._reported("write to"), self._changing():
            # At least what is lacking; in steps, as long as there is room for whole ones.
            for step_bytes in (_MORE_STEP_BYTES, 0):
                wanted_bytes = max(total_bytes - reserved_bytes, step_bytes)
                room_bytes = self._capacity_bytes - self._reserved_bytes() - wanted_bytes
                if self._evict_down_to(room_bytes, wanted_bytes):
                    break
            else:
                raise self._no_room(wanted_bytes)
            path = self._staging / f"more-{wanted_bytes}-{secrets.token_hex(6)}"
            path.mkdir()
            with self._mutex:
                self._more.setdefault(name.lock, []).append(path)

    def publish(self, name: EntryName, final: EntryName | None = None) -> None:
        """Make the filled staging folder an entry, in one step, and hold it. ``final``: the same
        with the size that it came to have."""
        final = final or name
        with self._reported("write to"), self._mutex:
            os.utime(self.staging(name))
            self.staging(name).rename(self._entries / str(final))
            self._drop_more(name)
            self._lock_table.try_shared(name.lock)
            self._holds[str(final)] = 1

    def abandon(self, name: EntryName) -> None:
        """Leave nothing of a download that has failed. Nothing happens without one."""
        shutil.rmtree(self.staging(name), ignore_errors=True)
        self._end_making(name)

    def set_aside(self, name: EntryName) -> None:
        """Keep what was downloaded, for the next ``begin`` of the same entry to go on from."""
        if not (self.staging(name) / JOURNAL).is_file():
            self.abandon(name)
            return
        with contextlib.suppress(OSError):
            os.utime(self.staging(name))
            self.staging(name).rename(self._partial / str(name))
        self.abandon(name)

    def _end_making(self, name: EntryName) -> None:
        with self._mutex:
            self._drop_more(name)
            held = any(text.startswith(f"{name.lock}-") for text in self._holds)
            if not held and self._locks is not None:
                self._locks.release(name.lock)

    def _drop_more(self, name: EntryName) -> None:
        for path in self._more.pop(name.lock, ()):
            with contextlib.suppress(OSError):
                path.rmdir()

    def hold_again(self, name: EntryName) -> None:
        """One more hold of an entry that is held already. Does not block."""
        with self._mutex:
            self._holds[str(name)] += 1

    def release(self, name: EntryName) -> None:
        """One hold less; without holds the entry may be evicted. Does not block."""
        with self._mutex:
            count = self._holds.get(str(name), 0)
            if count > 1:
                self._holds[str(name)] = count - 1
            elif count == 1:
                del self._holds[str(name)]
                with contextlib.suppress(OSError):
                    os.utime(self._entries / str(name))
                if self._locks is not None:
                    self._locks.release(name.lock)

    def versions(self, location: str) -> list[EntryName]:
        """Complete entries of one location, the one used last first."""
        with self._reported("look into"):
            found = [entry for entry in self._scan(self._entries) if entry[1].location == location]
        return [name for _, name in sorted(found, key=lambda entry: -entry[0])]

    def discard(self, name: EntryName) -> bool:
        """Remove an entry unless somebody holds it; True when it is gone."""
        with self._reported("clean"), self._changing():
            return self._evict(name)

    @property
    def _lock_table(self) -> RangeLocks:
        if self._locks is None:
            raise LoadFailed("the artifact cache is closed", code=Code.UNAVAILABLE)
        return self._locks

    @staticmethod
    def _staging_lock(process: str) -> str:
        return f"staging/{process}"

    def _hold_locked(self, name: EntryName) -> bool:
        text = str(name)
        count = self._holds.get(text, 0)
        if count == 0:
            if not self._lock_table.try_shared(name.lock):
                return False
            if not (self._entries / text).is_dir():
                self._lock_table.release(name.lock)
                return False
        self._holds[text] = count + 1
        os.utime(self._entries / text)
        return True

    def _reserve(self, name: EntryName) -> None:
        self._remove_partials(
            lambda used_at_s, other: (
                used_at_s < _stale_s() or (other.location == name.location and other != name)
            )
        )
        room_bytes = self._capacity_bytes - self._reserved_bytes() - name.size_bytes
        if not self._evict_down_to(room_bytes, name.size_bytes, going_on=name):
            raise self._no_room(name.size_bytes)
        try:
            (self._partial / str(name)).rename(self.staging(name))
        except FileNotFoundError:
            self.staging(name).mkdir()

    def _no_room(self, size_bytes: int) -> LoadFailed:
        free_bytes = self._disk.free_bytes(self._directory)
        if free_bytes < size_bytes:
            return disk_full(self._directory, size_bytes, free_bytes)
        return LoadFailed(
            f"no room for {size_bytes} bytes in the artifact cache "
            f"({self._capacity_bytes} bytes in {self._directory}): the rest is in use",
            code=Code.UNAVAILABLE,
        )

    def _too_large(self, size_bytes: int) -> LoadFailed:
        return LoadFailed(
            f"the artifact has {size_bytes} bytes, more than the whole artifact cache "
            f"({self._capacity_bytes} bytes in {self._directory}); make the cache larger "
            "(--cache-size, MESH_CACHE_SIZE)"
        )

    def _evict_down_to(
        self, entries_bytes: int, disk_bytes: int, going_on: EntryName | None = None
    ) -> bool:
        """Make room until what lies here takes at most ``entries_bytes`` and the disk has
        ``disk_bytes`` free: broken-off downloads go first (not ``going_on``), then entries, least
        recently used first. False when that cannot be had."""
        partials = [name for _, name in self._scan(self._partial) if name != going_on]
        if going_on is not None and (self._partial / str(going_on)).is_dir():
            disk_bytes = 0  # a part is here already; what is missing shows when it is written
        by_last_use = sorted(self._scan(self._entries), key=lambda entry: (entry[0], str(entry[1])))
        used_bytes = sum(name.size_bytes for name in partials)
        used_bytes += sum(name.size_bytes for _, name in by_last_use)
        for partial in partials:
            if used_bytes <= entries_bytes and self._disk_has(disk_bytes):
                return True
            shutil.rmtree(self._partial / str(partial), ignore_errors=True)
            used_bytes -= partial.size_bytes
        for _, name in by_last_use:
            if used_bytes <= entries_bytes and self._disk_has(disk_bytes):
                return True
            if self._evict(name):
                used_bytes -= name.size_bytes
        return used_bytes <= entries_bytes and self._disk_has(disk_bytes)

    def _remove_partials(self, unwanted: Callable[[float, EntryName], bool]) -> None:
        for used_at_ns, name in list(self._scan(self._partial)):
            if unwanted(used_at_ns / 1e9, name):
                shutil.rmtree(self._partial / str(name), ignore_errors=True)

    def _disk_has(self, size_bytes: int) -> bool:
        return size_bytes == 0 or self._disk.free_bytes(self._directory) >= size_bytes

    def _evict(self, name: EntryName) -> bool:
        trash = self._staging / f"trash-{secrets.token_hex(6)}"
        with self._mutex:
            if str(name) in self._holds or not self._lock_table.try_exclusive(name.lock):
                return False
            try:
                (self._entries / str(name)).rename(trash)
            except FileNotFoundError:
                return True
            finally:
                self._lock_table.release(name.lock)
        shutil.rmtree(trash, ignore_errors=True)
        return True

    @staticmethod
    def _scan(folder: Path) -> Iterator[tuple[int, EntryName]]:
        """(last use in ns, name) of every complete entry, or of every partial one."""
        with os.scandir(folder) as entries:
            for entry in entries:
                name = EntryName.parse(entry.name)
                if name is not None:
                    with contextlib.suppress(FileNotFoundError):
                        yield entry.stat(follow_symlinks=False).st_mtime_ns, name

    def _reserved_bytes(self) -> int:
        """What the downloads under way of all processes will take."""
        total_bytes = 0
        for process in (self._directory / "staging").iterdir():
            with contextlib.suppress(FileNotFoundError):  # it is just closing
                for path in process.iterdir():
                    name = EntryName.parse(path.name)
                    more_bytes = _more_bytes(path.name)
                    total_bytes += name.size_bytes if name is not None else more_bytes
        return total_bytes

    def _sort_out_dead_staging(self) -> None:
        for folder in (self._directory / "staging").iterdir():
            lock = self._staging_lock(folder.name)
            if folder.name != self._process and self._lock_table.try_exclusive(lock):
                for path in folder.iterdir():
                    if EntryName.parse(path.name) and (path / JOURNAL).is_file():
                        with contextlib.suppress(OSError):  # there is one: it goes with the rest
                            path.rename(self._partial / path.name)
                shutil.rmtree(folder, ignore_errors=True)
                self._lock_table.release(lock)

    @contextlib.contextmanager
    def _changing(self) -> Iterator[None]:
        """One at a time over all processes and threads."""
        with self._changes:
            deadline = time.monotonic() + _CACHE_LOCK_TIMEOUT_MS / 1000
            while not self._lock_table.try_exclusive(_CACHE_LOCK):
                if time.monotonic() > deadline:
                    raise LoadFailed(
                        f"the artifact cache in {self._directory} has been locked by another "
                        f"process for {_CACHE_LOCK_TIMEOUT_MS} ms",
                        code=Code.UNAVAILABLE,
                    )
                time.sleep(_CACHE_LOCK_POLL_MS / 1000)
            try:
                yield
            finally:
                self._lock_table.release(_CACHE_LOCK)

    @contextlib.contextmanager
    def _reported(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise LoadFailed(
                f"cannot {what} the artifact cache in {self._directory}: {error.strerror or error}",
                code=Code.UNAVAILABLE,
            ) from error


def _more_bytes(name: str) -> int:
    match = _MORE.fullmatch(name)
    return int(match[1]) if match else 0


def _stale_s() -> float:
    return time.time() - _PARTIAL_KEPT_S


def disk_full(directory: Path, needed_bytes: int, free_bytes: int) -> LoadFailed:
    return LoadFailed(
        f"disk full: the artifact needs {needed_bytes} bytes in {directory}, "
        f"{free_bytes} are free; make room there",
        code=Code.UNAVAILABLE,
    )
