"""`mesh pull URI DIR`: an artifact into a folder, for an init container or a script.

Everything is pulled, checked and unpacked in a work folder first; then it appears in DIR in one
step: a rename, or an exchange of both folders where there is one already. A mount point takes
neither: there the work folder is inside and what it holds moves out entry by entry, and what was
not finished is taken away by the next run. DIR then has a small hidden file, put there last and
taken away first, that says what is in it, so that an init container that runs again has nothing to
do. A work folder stays behind when the store went away or the process was killed, and the next run
goes on from it; Ctrl-C leaves none.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from mesh.artifacts import Artifact, ArtifactRequest
from mesh.cli.exits import CommandError, Exit
from mesh.cli.progress import Bytes
from mesh.cli.quantities import format_size
from mesh.cli.server_options import (
    FileRootOption,
    LogLevel,
    LogLevelOption,
    PullRateOption,
    StorageConfigOption,
    variable,
)
from mesh.cli.servers import check_folders, set_up_logging
from mesh.cli.session import out
from mesh.core.errors import Code, LoadFailed

if TYPE_CHECKING:
    from puller.settings import PullerSettings

RECORD: Final = ".mesh-pull.json"
WORK: Final = ".mesh-pull"  # in a mount point; else ".NAME.mesh-pull" beside the folder

_AT_FDCWD: Final = -100  # of Linux's renameat2, as is the next
_EXCHANGE: Final = 2


def pull(
    uri: Annotated[
        str, typer.Argument(metavar="URI", help="Or a path in the storage of --storage-key.")
    ],
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="New or empty, or pulled into.")],
    storage_config: StorageConfigOption = None,
    storage_key: Annotated[
        str,
        typer.Option(
            "--storage-key",
            envvar=variable("STORAGE_KEY"),
            metavar="NAME",
            help="The entry of --storage-config; the default one for the URI's type unless told.",
        ),
    ] = "",
    storage_param: Annotated[
        list[str] | None,
        typer.Option(
            "--storage-param",
            metavar="NAME=VALUE",
            help="What a model may set beside its key, such as bucket; repeatable.",
        ),
    ] = None,
    pull_rate: PullRateOption = None,
    file_root: FileRootOption = None,
    log_level: LogLevelOption = LogLevel.warning,
) -> None:
    """Bring a model's artifact into a folder: whole, or not at all."""
    from puller.settings import PullerSettings, store_variables

    check_folders(file_root, storage_config, None)
    set_up_logging(log_level)
    key = _key(storage_key, storage_param or ())
    target = Target.of(directory)
    target.recover()
    settings = PullerSettings(
        cache_dir=target.work,
        cache_capacity_bytes=1 << 62,  # the disk is the bound
        # Whoever may run this may read what they like; the roots guard the servers' clients.
        file_roots=tuple(root.resolve() for root in file_root or ()) or (Path("/"),),
        storage_config_dir=storage_config,
        store_env=store_variables(os.environ),
        rate_bytes_per_s=pull_rate or 0,
        fsync=False,  # done before it is put into its place
    )
    request = ArtifactRequest(model_id=uri, path=uri, key=key, model_type="")
    try:
        done = asyncio.run(_pull(request, target, settings))
    except LoadFailed as error:
        code = Exit.UNREACHABLE if error.code is Code.UNAVAILABLE else Exit.REFUSED
        kept = f"; what came is in {target.work}, to go on from" if target.has_partial() else ""
        raise CommandError(error.message + kept, code) from None
    except OSError as error:
        raise CommandError(f"{directory}: {error.strerror or error}") from None
    except KeyboardInterrupt:
        target.forget_partial()
        raise
    finally:
        target.tidy()
    out(f"{done}\n")


@dataclass(frozen=True, slots=True)
class Target:
    """The folder that is filled, and where that is prepared (on the same file system)."""

    directory: Path
    work: Path
    inside: bool

    @classmethod
    def of(cls, directory: Path) -> Target:
        directory = directory.absolute()
        if directory.is_symlink() or (directory.exists() and not directory.is_dir()):
            raise CommandError(f"{directory} is not a folder", Exit.USAGE)
        parent = directory.parent
        if not parent.is_dir():
            raise CommandError(f"{parent}: no such folder", Exit.USAGE)
        # A mount point cannot be replaced, and a parent that is not ours takes no new folder.
        inside = directory.is_dir() and (
            directory.stat().st_dev != parent.stat().st_dev
            or os.path.ismount(directory)
            or not os.access(parent, os.W_OK)
        )
        work = directory / WORK if inside else parent / f".{directory.name}.mesh-pull"
        return cls(directory, work, inside)

    def record(self) -> dict[str, Any]:
        """What an earlier run put here; empty when there was none."""
        with contextlib.suppress(OSError, ValueError):
            found = json.loads((self.directory / RECORD).read_text("utf-8"))
            if isinstance(found, dict):
                return found
        return {}

    def check(self) -> None:
        """Nobody else's files are mixed with ours, or lost."""
        if not self.directory.is_dir() or self.record():
            return
        others = [path.name for path in self.directory.iterdir() if path.name != WORK]
        if others and not (self.work / "moving").exists():
            raise CommandError(
                f"{self.directory} is not empty ({sorted(others)[0]!r} is in it), and was not "
                "filled by `mesh pull`; name another folder"
            )

    def holds(self, record: dict[str, Any]) -> bool:
        """It was pulled before, the same version, and all of it is still there."""
        found = self.record()
        if not record["version"] or {**found, "files": None} != {**record, "files": None}:
            return False
        files = found.get("files") or {}
        return all(_size(self.directory / name) == size for name, size in files.items())

    def put(self, content: Path, record: dict[str, Any]) -> None:
        """``content``, a folder below ``work``, becomes what the target holds."""
        (content / RECORD).write_text(json.dumps(record, indent=1), "utf-8")
        if self.inside:
            self._move_in(content)
            return
        if not self.directory.is_dir():
            content.rename(self.directory)
        elif not exchange(content, self.directory):
            # For a moment there is no folder; whoever is killed then leaves that to ``recover``.
            self.directory.rename(self._replaced)
            try:
                content.rename(self.directory)
            except OSError:
                self._replaced.rename(self.directory)
                raise

    @property
    def _replaced(self) -> Path:
        return self.work / "replaced"

    def recover(self) -> None:
        """Put back what a run that was killed had taken out and not replaced."""
        if self._replaced.is_dir() and not self.directory.exists():
            self._replaced.rename(self.directory)

    def _move_in(self, content: Path) -> None:
        (self.work / "moving").touch()  # until all is moved, what is there is nobody's
        self._clear()
        # The record last: with it, the folder counts as filled.
        names = sorted(path.name for path in content.iterdir() if path.name != RECORD)
        try:
            for name in [*names, RECORD]:
                (content / name).rename(self.directory / name)
        except BaseException:
            self._clear()
            raise
        (self.work / "moving").unlink()

    def _clear(self) -> None:
        (self.directory / RECORD).unlink(missing_ok=True)  # first: it says that all is there
        for path in self.directory.iterdir():
            if path.name == WORK:
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()

    def tidy(self) -> None:
        """Leave the work folder only if a broken-off download is in it."""
        if (self.work / "moving").exists():
            if not self.record():  # with it the move was over
                self._clear()
            (self.work / "moving").unlink()
        if not self.has_partial():
            shutil.rmtree(self.work, ignore_errors=True)

    def forget_partial(self) -> None:
        shutil.rmtree(self.work / "partial", ignore_errors=True)

    def has_partial(self) -> bool:
        partial = self.work / "partial"
        return partial.is_dir() and any(partial.iterdir())


def exchange(one: Path, other: Path) -> bool:
    """Two folders of one file system change places in one step; False where that cannot be."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:  # a C library without it
        return False
    at_cwd = ctypes.c_int(_AT_FDCWD)
    if rename(at_cwd, os.fsencode(one), at_cwd, os.fsencode(other), ctypes.c_uint(_EXCHANGE)) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):  # this file system has none
        return False
    raise OSError(number, os.strerror(number), str(other))


async def _pull(request: ArtifactRequest, target: Target, settings: PullerSettings) -> str:
    from puller.puller import Puller

    puller = Puller(settings)
    try:
        await asyncio.to_thread(target.check)
        version = await puller.version(request)
        source = _shown(request.path)
        record = {"source": source, "key": request.key, "version": version, "files": {}}
        if await asyncio.to_thread(target.holds, record):
            return f"{target.directory} has {source} already"
        with Bytes("pulling") as bar:
            artifact = await puller.fetch(request, bar.update)
        size_bytes = artifact.size_bytes
        content = await asyncio.to_thread(_content, artifact, target.work)
        record["files"] = await asyncio.to_thread(_files, content)
        await asyncio.to_thread(target.put, content, record)
    finally:
        await puller.close()
    return f"{target.directory}: {len(record['files'])} files, {format_size(size_bytes)}"


def _content(artifact: Artifact, work: Path) -> Path:
    """A folder in ``work`` that has the artifact and nothing else. What is in the cache there is
    ours alone and is moved; what lies elsewhere is copied, links as what they lead to."""
    folder = work / "content"
    shutil.rmtree(folder, ignore_errors=True)
    place: Callable[..., Any]
    if artifact.path.is_relative_to(work):
        if artifact.path.is_dir():
            artifact.path.rename(folder)
            return folder
        place = shutil.move
    elif artifact.path.is_dir():
        work.mkdir(exist_ok=True)
        shutil.copytree(artifact.path, folder)
        return folder
    else:
        place = shutil.copyfile
    folder.mkdir(parents=True)
    place(artifact.path, folder / artifact.path.name)
    return folder


def _files(folder: Path) -> dict[str, int]:
    """Path → bytes; the disk has them for sure when this returns."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
            found[str(path.relative_to(folder))] = path.stat().st_size
    return found


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1


def _key(storage_key: str, params: tuple[str, ...] | list[str]) -> str:
    found: dict[str, str] = {}
    for text in params:
        name, sign, value = text.partition("=")
        if not sign or not name:
            raise CommandError(f"--storage-param {text}: write NAME=VALUE", Exit.USAGE)
        found[name] = value
    if not storage_key and not found:
        return ""
    return json.dumps({"storage_key": storage_key, "storage_params": found})


def _shown(uri: str) -> str:
    return uri.partition("?")[0]


def add_to(app: typer.Typer) -> None:
    app.command()(pull)
