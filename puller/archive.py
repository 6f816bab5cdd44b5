"""Unpacks a .zip, .tar, .tar.gz or .tgz that somebody else made.

Only files and folders come out, by names that ``puller.safe_path`` passes, each once, each with
plain permissions; links, devices and sparse files are refused. What an archive says of itself
decides nothing: bytes are counted as they are written, members as they are met, and a header is
read only up to a bound. An archive that is cut off or does not match its own checksums fails, also
where its library would stop quietly. ``unpack`` blocks; it fails with ``LoadFailed``
(FAILED_PRECONDITION) or with an ``OSError`` of the disk, and leaves the folder to its caller.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import lzma
import os
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final

from mesh.core.errors import LoadFailed
from puller.disk import Disk
from puller.safe_path import UnsafePathError, safe_relative_path

SUFFIXES: Final = (".zip", ".tar", ".tar.gz", ".tgz")
_ALWAYS_BYTES: Final = 64 << 20  # may be unpacked whatever the ratio
_CHUNK_BYTES: Final = 1 << 20
_HEADER_MAX_BYTES: Final = 1 << 20  # of one read that the tar library does for its own use
_BLOCK: Final = 512  # of a tar
_DAMAGED: Final = (tarfile.TarError, zipfile.BadZipFile, EOFError, zlib.error, lzma.LZMAError)


def is_archive(name: str) -> bool:
    return name.lower().endswith(SUFFIXES)


@dataclass(frozen=True, slots=True)
class Bounds:
    max_bytes: int
    max_files: int
    max_ratio: int


class _Refused(Exception):
    """What is wrong with the archive; ``unpack`` says which archive it is."""


def unpack(
    archive: Path, into: Path, uri: str, *, bounds: Bounds, disk: Disk, cover: Callable[[int], None]
) -> dict[str, int]:
    """Path → bytes of the files that came out. ``cover(bytes)`` is asked for room before each
    write. One folder that is alone at the top is taken off, unless its name is a number (then it
    is a version)."""
    try:
        with archive.open("rb") as file:
            out = _Out(into, archive.stat().st_size, bounds, disk, cover)
            if archive.name.lower().endswith(".zip"):
                _unzip(file, out)
            else:
                _untar(file, archive.name.lower().endswith((".gz", ".tgz")), out)
        if not out.files:
            raise _Refused("there is no file in it")
        return _without_top(into, out.files)
    except (_Refused, UnsafePathError) as error:
        raise LoadFailed(f"{uri} refused: {error}") from None
    except gzip.BadGzipFile as error:
        raise LoadFailed(f"{uri} is damaged or no gzip file: {error}") from None
    except _DAMAGED as error:
        raise LoadFailed(
            f"{uri} is cut off, damaged or not what its name says: {error or 'its end is missing'}"
        ) from None
    except (NotImplementedError, RuntimeError) as error:  # how zipfile says what it cannot do
        raise LoadFailed(f"{uri} cannot be unpacked: {error}") from None


class _Out:
    """Where members go; keeps the bounds."""

    def __init__(
        self,
        into: Path,
        archive_bytes: int,
        bounds: Bounds,
        disk: Disk,
        cover: Callable[[int], None],
    ) -> None:
        self._into = into
        self._archive_bytes = archive_bytes
        self._bounds = bounds
        self._disk = disk
        self._cover = cover
        self._unpacked_bytes = 0
        self._members = 0
        self.files: dict[str, int] = {}

    def member(self) -> None:
        self._members += 1
        if self._members > self._bounds.max_files:
            raise _Refused(f"more than {self._bounds.max_files} files and folders are in it")

    def count(self, unpacked_bytes: int) -> None:
        """``unpacked_bytes`` in all so far, also of what is not kept."""
        if unpacked_bytes > self._bounds.max_bytes:
            raise _Refused(
                f"it unpacks to more than the {self._bounds.max_bytes} bytes that an artifact "
                "may have"
            )
        ratio_bytes = max(_ALWAYS_BYTES, self._archive_bytes * self._bounds.max_ratio)
        if unpacked_bytes > ratio_bytes:
            raise _Refused(
                f"it unpacks to more than {self._bounds.max_ratio} times its size: "
                "that is no model but a bomb"
            )

    def folder(self, name: str) -> None:
        path = self._into / safe_relative_path(name)
        with self._placed(name):
            path.mkdir(parents=True, exist_ok=True)

    def file(self, name: str, content: IO[bytes]) -> None:
        relative = safe_relative_path(name)
        with self._placed(name):
            descriptor = self._disk.create(self._into / relative)
        size_bytes = 0
        try:
            while chunk := content.read(_CHUNK_BYTES):
                self._unpacked_bytes += len(chunk)
                self.count(self._unpacked_bytes)
                self._cover(self._archive_bytes + self._unpacked_bytes)
                self._disk.write(descriptor, chunk, size_bytes)
                size_bytes += len(chunk)
        finally:
            self._disk.close(descriptor)
        self.files[str(relative)] = size_bytes

    @contextlib.contextmanager
    def _placed(self, name: str) -> Iterator[None]:
        try:
            yield
        except (FileExistsError, NotADirectoryError, IsADirectoryError):
            raise _Refused(f"{name[:200]!r} is in it more than once") from None


def _unzip(file: IO[bytes], out: _Out) -> None:
    with zipfile.ZipFile(file) as archive:
        for member in archive.infolist():
            out.member()
            kind = stat.S_IFMT(member.external_attr >> 16)
            if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise _Refused(f"{member.filename[:200]!r} is a link or a device")
            if member.flag_bits & 0x1:
                raise _Refused("it is encrypted")
            if member.is_dir():
                out.folder(member.filename.rstrip("/"))
                continue
            with archive.open(member) as content:
                out.file(member.filename, content)


def _untar(file: IO[bytes], packed: bool, out: _Out) -> None:
    with contextlib.ExitStack() as stack:
        plain: IO[bytes] | gzip.GzipFile = file
        if packed:
            plain = stack.enter_context(gzip.GzipFile(fileobj=file, mode="rb"))
        bounded = _Bounded(plain, out)
        archive = stack.enter_context(tarfile.TarFile.open(fileobj=bounded, mode="r:"))
        for member in archive:
            out.member()
            name = member.name.removeprefix("./").rstrip("/")
            if member.isdir():
                if name not in ("", "."):  # "./" is the folder that was packed
                    out.folder(name)
            elif member.isreg() and not member.issparse():
                content = archive.extractfile(member)
                assert content is not None
                out.file(name, content)
                if out.files[str(safe_relative_path(name))] != member.size:
                    raise _Refused(f"it ends within {name[:200]!r}")
            else:
                raise _Refused(
                    f"{member.name[:200]!r} is a link, a device or a sparse file: only files and "
                    "folders are unpacked"
                )
        bounded.check_end()


class _Bounded(io.RawIOBase):
    """What the tar library reads from: forwards only, counted, no large reads for headers."""

    def __init__(self, inner: IO[bytes] | gzip.GzipFile, out: _Out) -> None:
        super().__init__()
        self._inner = inner
        self._out = out
        self._at = 0
        self._last = b""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def read(self, size: int = -1) -> bytes:
        if size < 0 or size > _HEADER_MAX_BYTES:
            raise _Refused("one of its headers is larger than any name can be")
        data = self._inner.read(size)
        self._at += len(data)
        self._out.count(self._at)
        self._last = data
        return data

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        target = offset if whence == os.SEEK_SET else self._at + offset
        if whence == os.SEEK_END or target < self._at:
            if target == 0 and whence == os.SEEK_SET and self._at <= _BLOCK:
                self._inner.seek(0)  # the library looks at the first block, and begins anew
                self._at = 0
                return 0
            raise _Refused("it can only be read backwards")
        while self._at < target:
            if not self.read(min(_HEADER_MAX_BYTES, target - self._at)):
                raise EOFError
        return self._at

    def check_end(self) -> None:
        """A tar ends with a block of zeros: one that was cut between two members has none. What
        follows is read, too, so that a gzip's own checksum is looked at."""
        if self._last != bytes(_BLOCK):
            raise EOFError
        while self.read(_HEADER_MAX_BYTES):
            pass


def _without_top(into: Path, files: dict[str, int]) -> dict[str, int]:
    tops = {path.partition("/")[0] for path in files} | {path.name for path in into.iterdir()}
    top = next(iter(tops))
    if len(tops) > 1 or top in files or top.isdecimal():
        return files
    aside = into.with_name(into.name + ".top")
    (into / top).rename(aside)
    into.rmdir()
    aside.rename(into)
    return {path.partition("/")[2]: size_bytes for path, size_bytes in files.items()}
