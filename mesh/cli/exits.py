"""The exit codes of the `mesh` command, and the one error that carries them.

Every command ends with one of these; ``mesh --help`` and the README list them.
"""

from __future__ import annotations

from enum import IntEnum


class Exit(IntEnum):
    OK = 0
    REFUSED = 1  # the mesh (or the machine, for `mesh up`) said no
    USAGE = 2  # the command line, or a file that it names, is wrong
    UNREACHABLE = 3  # nothing answers at the address
    TIMED_OUT = 4  # the wait was longer than --timeout
    INTERRUPTED = 130  # Ctrl-C


HELP = (
    "Exit codes: 0 done; 1 the mesh said no; 2 wrong usage or a file that cannot be read; "
    "3 the mesh cannot be reached; 4 waited longer than --timeout; 130 interrupted."
)


class CommandError(Exception):
    """Ends a command: one line for stderr (what, where, what to do) and the exit code."""

    def __init__(self, message: str, exit_code: Exit = Exit.REFUSED) -> None:
        super().__init__(message)
        self.message = message
        self.exit_code = exit_code
