"""Artifacts that lie on this machine already: ``file://`` and ``pvc://``, used in place.

Nothing is copied, so nothing is held: that such an artifact stays unchanged while it is in use is
up to whoever writes there. Owned here: the proof that a path, links followed, stays below a root
that the operator named, that nothing inside a folder leads out of that root, and the size. All
functions block (they walk folders) and belong in a worker thread. They fail with ``LoadFailed``:
FAILED_PRECONDITION for a path that is refused or not there, UNAVAILABLE for an I/O error.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from mesh.core.errors import Code, LoadFailed
from puller.location import FileLocation, PvcLocation
from puller.safe_path import UnsafePathError, is_below, resolve_below


def locate_file(location: FileLocation, file_roots: tuple[Path, ...]) -> tuple[Path, Path]:
    """(real path, the root that it lies below), or a refusal that says what to set."""
    if not file_roots:
        raise LoadFailed(
            f"{location.uri} refused: file:// is off, because no folder is named that models may "
            "be read from; name one with --file-root DIR (MESH_FILE_ROOTS)"
        )
    wanted = Path(location.path)
    try:
        real = wanted.resolve()  # whether it exists is nobody's business outside the roots
    except (OSError, RuntimeError):  # a loop of links
        real = wanted
    for root in file_roots:
        try:
            real_root = root.resolve(strict=True)
        except OSError:
            continue  # a root that is not there cannot contain anything
        if is_below(real, real_root):
            return _resolve(root, real, location.uri), real_root
    by_link = any(is_below(wanted, root) for root in file_roots)
    raise LoadFailed(
        f"{location.uri} refused: it "
        + ("leads out of the folder" if by_link else "is not below a folder")
        + f" that models may be read from ({', '.join(map(str, file_roots))}); "
        "see --file-root (MESH_FILE_ROOTS)"
    )


def locate_pvc(location: PvcLocation, pvc_root: Path) -> tuple[Path, Path]:
    """(real path, the claim's folder)."""
    claim_root = pvc_root / location.claim
    try:
        real_root = claim_root.resolve(strict=True)
    except OSError:
        raise LoadFailed(
            f"{location.uri}: volume claim {location.claim!r} is not mounted at {claim_root}"
        ) from None
    return _resolve(claim_root, claim_root / location.path, location.uri), real_root


def measure(path: Path, root: Path, uri: str, *, max_files: int) -> int:
    """Bytes in a file or folder. Refuses links that lead out of ``root``, devices and sockets."""
    try:
        info = path.stat()
        if stat.S_ISREG(info.st_mode):
            return info.st_size
        if not stat.S_ISDIR(info.st_mode):
            raise LoadFailed(f"{uri} is neither a file nor a folder")
        return _measure_folder(path, root, uri, max_files)
    except UnsafePathError as error:
        raise LoadFailed(f"{uri} refused: {error}") from None
    except FileNotFoundError as error:
        raise LoadFailed(f"{uri}: {error.filename} does not exist") from None
    except OSError as error:
        raise _io_failure(uri, error) from error


def _measure_folder(folder: Path, root: Path, uri: str, max_files: int) -> int:
    total_bytes = 0
    files = 0
    visited: set[tuple[int, int]] = set()  # a link to a folder above would never end
    pending = [folder]
    while pending:
        current = pending.pop()
        info = current.stat()
        if (info.st_dev, info.st_ino) in visited:
            continue
        visited.add((info.st_dev, info.st_ino))
        with os.scandir(current) as entries:
            for entry in entries:
                path = Path(entry.path)
                if entry.is_symlink():
                    path = resolve_below(root, path)
                mode = path.stat().st_mode
                files += 1
                if files > max_files:
                    raise LoadFailed(f"{uri} has more than {max_files} files")
                if stat.S_ISDIR(mode):
                    pending.append(path)
                elif stat.S_ISREG(mode):
                    total_bytes += path.stat().st_size
                else:
                    raise LoadFailed(f"{uri}: {entry.name!r} is neither a file nor a folder")
    if files == 0:
        raise LoadFailed(f"{uri} is an empty folder")
    return total_bytes


def _resolve(root: Path, path: Path, uri: str) -> Path:
    try:
        return resolve_below(root, path)
    except UnsafePathError as error:
        raise LoadFailed(f"{uri} refused: {error}") from None
    except (FileNotFoundError, NotADirectoryError):
        raise LoadFailed(f"{uri} does not exist on this machine") from None
    except OSError as error:
        raise _io_failure(uri, error) from error


def _io_failure(uri: str, error: OSError) -> LoadFailed:
    code = Code.FAILED_PRECONDITION if isinstance(error, PermissionError) else Code.UNAVAILABLE
    return LoadFailed(f"{uri} cannot be read: {error.strerror or error}", code=code)
