"""Decides what an artifact consists of, from the listing of its objects. Pure.

An artifact is one object (a file of that name) or all objects below a prefix (a folder). Every
name is checked before anything is downloaded; zero-byte objects that only stand for a folder are
left out. Also here: the cut of an object into parts, and what a checksum file says. Fails with
``LoadFailed`` (FAILED_PRECONDITION), naming the object.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from mesh.core.errors import LoadFailed
from puller.safe_path import UnsafePathError, safe_relative_path

SHA256SUMS: Final = "SHA256SUMS"  # in the artifact's folder, as `sha256sum` writes it
_SHA256_LINE: Final = re.compile(r"([0-9a-fA-F]{64}) [ *](.+)")
_MD5: Final = re.compile(r'"?([0-9a-fA-F]{32})"?')


@dataclass(frozen=True, slots=True)
class RemoteObject:
    key: str  # in its bucket
    size_bytes: int | None  # None: the server does not tell before the end
    etag: str | None  # as the server sent it, with its quotes; or what else tells versions apart
    ranges: bool = True  # a part of it can be read alone


@dataclass(frozen=True, slots=True)
class ManifestFile:
    path: str  # relative to the artifact, checked
    source: RemoteObject


@dataclass(frozen=True, slots=True)
class Manifest:
    files: tuple[ManifestFile, ...]  # by path
    single: bool  # the artifact is that one file, not a folder with it

    @property
    def size_bytes(self) -> int | None:
        """None when the server does not tell, which only happens to a single file."""
        total_bytes = 0
        for file in self.files:
            if file.source.size_bytes is None:
                return None
            total_bytes += file.source.size_bytes
        return total_bytes

    @property
    def version(self) -> str:
        """16 hex digits that change whenever an object does."""
        digest = hashlib.blake2b(digest_size=8)
        for file in self.files:
            fields = (file.path, str(file.source.size_bytes), file.source.etag or "")
            digest.update("\0".join(fields).encode() + b"\0\0")
        return digest.hexdigest()


def single_manifest(source: RemoteObject, uri: str) -> Manifest:
    name = source.key.rpartition("/")[2]
    return Manifest((ManifestFile(_checked(name, uri), source),), single=True)


def folder_manifest(prefix: str, objects: Iterable[RemoteObject], uri: str) -> Manifest | None:
    """The objects below ``prefix`` ("" is the whole bucket); None when there are none."""
    base = f"{prefix}/" if prefix else ""
    files: dict[str, ManifestFile] = {}
    for source in objects:
        if source.key == prefix:
            continue  # the marker of the folder itself
        if not source.key.startswith(base):
            raise LoadFailed(f"{uri}: the store listed {source.key!r}, which does not lie there")
        path = _checked(source.key[len(base) :], uri)
        files[path] = ManifestFile(path, source)
    folders = {folder for path in files for folder in _folders_above(path)}
    for folder in folders & files.keys():
        if files[folder].source.size_bytes != 0:
            raise LoadFailed(f"{uri}: {folder!r} is an object and a folder at once")
        del files[folder]  # a marker
    if not files:
        return None
    return Manifest(tuple(files[path] for path in sorted(files)), single=False)


def check_bounds(manifest: Manifest, uri: str, *, max_bytes: int) -> None:
    if (manifest.size_bytes or 0) > max_bytes:
        raise too_large(uri, manifest.size_bytes or 0, max_bytes)


def too_large(uri: str, size_bytes: int, max_bytes: int) -> LoadFailed:
    return LoadFailed(
        f"{uri} has {size_bytes} bytes, more than the {max_bytes} that an artifact may have"
    )


def plan_parts(size_bytes: int, part_bytes: int, start: int = 0) -> list[tuple[int, int]]:
    """(start, end) of each ranged read; nothing for nothing. Even parts, so that the last is not
    a crumb that costs a round trip."""
    count = -(-size_bytes // part_bytes)
    return [
        (start + size_bytes * i // count, start + size_bytes * (i + 1) // count)
        for i in range(count)
    ]


def md5_of(source: RemoteObject) -> str | None:
    """The MD5 that an ETag may be: of objects put in one piece (and not encrypted with KMS)."""
    match = _MD5.fullmatch(source.etag or "")
    return match[1].lower() if match else None


def parse_sha256sums(text: str, uri: str) -> Mapping[str, str]:
    """Path → lower-case digest."""
    sums: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        match = _SHA256_LINE.fullmatch(line.rstrip())
        if match is None:
            raise LoadFailed(f"{uri}: line {number} of {SHA256SUMS} is not 'DIGEST  NAME'")
        sums[_checked(match[2].removeprefix("./"), uri)] = match[1].lower()
    return sums


def _checked(name: str, uri: str) -> str:
    try:
        return str(safe_relative_path(name))
    except UnsafePathError as error:
        raise LoadFailed(
            f"{uri} refused: the name of one of its objects is unsafe: {error}"
        ) from None


def _folders_above(path: str) -> Iterator[str]:
    at = path.rfind("/")
    while at > 0:
        yield path[:at]
        at = path.rfind("/", 0, at)
