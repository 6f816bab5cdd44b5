"""The Secret ``storage-config`` of `mesh apply`: written into the folder that the instances of this
machine read, and sent to nobody. A fetch reads the folder afresh, so a new secret counts at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from mesh.cli.exits import CommandError, Exit
from mesh.core.errors import InvalidArgument
from mesh.storage_folder import NAME, applied_secret, write_folder
from mesh.up.layout import DataDir, read_state

# Where `mesh up` keeps its data unless told.
DATA_DIR: Final = Path(".mesh")
_LOOPBACK: Final = frozenset({"localhost", "127.0.0.1", "::1"})


def apply_secret(resource: Mapping[str, Any], given: Path | None, address: str) -> str:
    """What became of it: created, configured or unchanged. ``given``: the folder that was named;
    ``address``: the mesh that it is for. Raises CommandError."""
    try:
        data = applied_secret(resource)
    except InvalidArgument as error:
        raise CommandError(error.message) from error
    folder = given if given is not None else _folder_of(address)
    if not folder.is_dir():
        raise CommandError(f"--storage-config {folder}: no such folder", Exit.USAGE)
    try:
        return write_folder(folder, data)
    except OSError as error:
        raise CommandError(f"{folder}: cannot be written: {error.strerror or error}") from error


def _folder_of(address: str) -> Path:
    """The one that the mesh of the working folder's ``.mesh`` reads, if that is the mesh."""
    state = read_state(DataDir(DATA_DIR).state)
    folder, grpc = state.get("storage_config"), state.get("grpc")
    why = f"there is no mesh in {DATA_DIR} of this folder"
    if isinstance(folder, str) and isinstance(grpc, str):
        if _is_same(address, grpc):
            return Path(folder)
        why = f"the mesh in {DATA_DIR} of this folder is another one, at {grpc}"
    raise CommandError(
        f"a secret is written into the folder that the mesh's instances read, and {why}: name it "
        f"with --storage-config DIR (`mesh up` has DATA_DIR/{NAME}, or its own --storage-config)",
        Exit.USAGE,
    )


def _is_same(one: str, other: str) -> bool:
    return _spelled(one) == _spelled(other)


def _spelled(address: str) -> tuple[str, str]:
    host, _, port = address.rpartition(":")
    host = host.strip("[]").lower()
    return ("127.0.0.1" if host in _LOOPBACK else host), port
