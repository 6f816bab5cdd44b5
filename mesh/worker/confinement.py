"""What a worker process gives up before it touches a model, and how it is tied to its parent.

Taken from it: the pod's environment (it never had it, see ``mesh.runtimes.isolated_fork_server``),
descriptors, signals' handlers, new privileges; its files go to a folder of its own. Not taken: it
runs as the pod's user, so it reads and writes every file that the pod can (``/proc`` of the pod
included) and reaches the network. Who must not do that runs in a container of its own.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
from pathlib import Path
from typing import Final

_PR_SET_PDEATHSIG: Final = 1
_PR_SET_CHILD_SUBREAPER: Final = 36
_PR_SET_NO_NEW_PRIVS: Final = 38

_libc = ctypes.CDLL(None, use_errno=True)


def _prctl(option: int, value: int) -> None:
    """What a kernel refuses is left out: the socket pair to the pod ends everything as well."""
    _libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0)


def die_with_parent(parent_pid: int, death_signal: signal.Signals) -> None:
    _prctl(_PR_SET_PDEATHSIG, death_signal)
    if os.getppid() != parent_pid:  # it died before the line above took effect
        os._exit(1)


def adopt_orphans() -> None:
    """What a descendant leaves behind becomes ours, so that it can be found and ended."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def confine(folder: Path, keep_fd: int, parent_pid: int) -> None:
    """In a worker that was just forked. ``keep_fd`` is the one descriptor beside 0, 1 and 2."""
    die_with_parent(parent_pid, signal.SIGKILL)
    os.setsid()
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    os.closerange(3, keep_fd)
    os.closerange(keep_fd + 1, _highest_fd() + 1)
    adopt_orphans()
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    os.umask(0o077)
    os.chdir(folder)
    os.environ["TMPDIR"] = os.environ["HOME"] = str(folder)


def _highest_fd() -> int:
    with contextlib.suppress(OSError):
        return max(int(name) for name in os.listdir("/proc/self/fd"))  # noqa: PTH208
    return 4_096


def stray_children(known: set[int]) -> list[int]:
    """Children of this process beside ``known``: what dead workers have left behind."""
    pid = os.getpid()
    with contextlib.suppress(OSError):
        text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
        return [child for child in map(int, text.split()) if child not in known]
    return []
