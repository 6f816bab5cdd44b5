"""What every command that speaks to a mesh shares: the target, the console, the errors.

The group class below moves `--address` and its kin in front of the command, so that both `mesh
--address X get models` and `mesh get models --address X` work, and turns the errors that end a
command into one line on stderr and the documented exit code. No traceback reaches a person.
"""

from __future__ import annotations

import itertools
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, NoReturn

import typer
from typer.core import TyperGroup

from mesh.cli.exits import CommandError, Exit

if TYPE_CHECKING:
    from mesh.cli.connection import Connection, Target

_GLOBAL_FLAGS: Final = ("--address", "--tls-ca", "--tls-cert", "--tls-key", "--tls-server-name")
_GLOBAL_SWITCHES: Final = ("--tls",)
# These have listeners of their own, and flags of the same names for them.
_SERVERS: Final = ("up", "router", "instance")


@dataclass(slots=True)
class Session:
    """The context of one command line, made by the root callback."""

    target: Target
    _connection: Connection | None = field(default=None)

    def connect(self) -> Connection:
        """The connection of this command, opened at first use. Raises CommandError."""
        from mesh.cli.connection import Connection

        if self._connection is None:
            self._connection = Connection(self.target)
        return self._connection

    def close(self) -> None:
        if self._connection is not None:
            self._connection.__exit__(None, None, None)


def out(text: str) -> None:
    """To stdout, as it is."""
    sys.stdout.write(text)


def note(text: str) -> None:
    """One line to stderr."""
    sys.stderr.write(text.rstrip("\n") + "\n")


class MeshGroup(TyperGroup):
    """The root command."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, hoist_global_flags(args))

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except CommandError as error:
            fail(error)
        except KeyboardInterrupt:
            note("interrupted")
            raise typer.Exit(int(Exit.INTERRUPTED)) from None


def fail(error: CommandError) -> NoReturn:
    note(f"error: {error.message}")
    raise typer.Exit(int(error.exit_code))


def hoist_global_flags(args: list[str]) -> list[str]:
    """The same command line with the global flags first; unchanged for the server commands."""
    front: list[str] = []
    rest: list[str] = []
    pending = iter(args)
    for arg in pending:
        if arg == "--":
            rest += [arg, *pending]
        elif arg in _GLOBAL_FLAGS:
            front += [arg, *itertools.islice(pending, 1)]
        elif arg in _GLOBAL_SWITCHES or arg.partition("=")[0] in _GLOBAL_FLAGS:
            front.append(arg)
        else:
            rest.append(arg)
    command = next((arg for arg in rest if not arg.startswith("-")), "")
    return args if command in _SERVERS else front + rest
