"""Runs a command that dies when its parent dies: ``tether.py SIGNAL PARENT_PID COMMAND...``.

A small program of its own instead of a ``preexec_fn``, because code between fork and exec is not
safe in a process with threads. The kernel keeps the parent-death signal over exec. It is told of
the death of the *thread* that started it, so the supervisor starts children from its main thread
only.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main() -> None:
    death_signal, parent_pid, command = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, death_signal, 0, 0, 0) != 0:
        sys.stderr.write("tether: the kernel refused PR_SET_PDEATHSIG; continuing without it\n")
    if os.getppid() != parent_pid:  # it died before the line above took effect
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        os.execvp(command[0], command)
    except OSError as error:
        sys.stderr.write(f"cannot start {command[0]}: {error.strerror}\n")
        raise SystemExit(127) from error


if __name__ == "__main__":
    main()
