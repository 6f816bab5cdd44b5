"""Which etcd a server uses: the endpoints of --etcd, or what the file of --etcd-connection says.

The file is ModelMesh's etcd_connection, which alone can say TLS, a user and a password: these never
stand on a command line or in a variable. Only one of the two may be given; where one is a flag and
the other a variable of the environment, the flag counts.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from mesh.cli.exits import CommandError, Exit
from mesh.cli.server_options import variable
from mesh.core.errors import InvalidArgument

if TYPE_CHECKING:
    from mesh.store.etcd_options import EtcdOptions

DEFAULT_ETCD: Final = "127.0.0.1:2379"

EtcdConnectionOption = Annotated[
    Path | None,
    typer.Option(
        "--etcd-connection",
        envvar=variable("ETCD_CONNECTION"),
        metavar="FILE",
        help="In place of --etcd: ModelMesh's etcd_connection, JSON with endpoints, TLS, user, "
        "password and root_prefix (which counts over --prefix).",
    ),
]


@dataclass(frozen=True, slots=True)
class ChosenEtcd:
    """``file`` is where ``options`` come from, absolute; None: from --etcd."""

    options: EtcdOptions
    prefix: str
    file: Path | None = None
    warnings: tuple[str, ...] = ()

    def log_warnings(self) -> None:
        for warning in self.warnings:
            logging.getLogger(__name__).warning("%s: %s", self.file, warning)


def choose_etcd(
    context: typer.Context, etcd: list[str] | None, file: Path | None, prefix: str
) -> ChosenEtcd:
    """From the command's parameters ``etcd`` and ``etcd_connection``. Raises CommandError."""
    from mesh.store.etcd_connection import load_etcd_connection
    from mesh.store.etcd_options import EtcdOptions

    if etcd and file is not None:
        flag, other = (_is_flag(context, name) for name in ("etcd", "etcd_connection"))
        if flag == other:
            raise CommandError("--etcd and --etcd-connection exclude each other", Exit.USAGE)
        if flag:
            file = None
    if file is None:
        return ChosenEtcd(EtcdOptions(endpoints(etcd or [DEFAULT_ETCD])), prefix)
    try:
        found = load_etcd_connection(file)
    except InvalidArgument as error:
        raise CommandError(f"--etcd-connection {error.message}", Exit.USAGE) from error
    return ChosenEtcd(found.options, found.prefix or prefix, file.absolute(), found.warnings)


def _is_flag(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def endpoints(texts: list[str]) -> tuple[str, ...]:
    """``HOST:PORT`` of each, from repeated and comma-separated values. Raises CommandError."""
    found: list[str] = []
    for text in filter(None, (part.strip() for value in texts for part in value.split(","))):
        if "@" in text or text.startswith("https://"):
            said = "TLS, users and passwords are for the file of --etcd-connection"
            raise CommandError(f"--etcd: {said}", Exit.USAGE)
        endpoint = text.removeprefix("http://").rstrip("/")
        host, _, port = endpoint.rpartition(":")
        if not host or not port.isdigit() or not 0 < int(port) < 65_536:
            raise CommandError(f"--etcd {text}: write HOST:PORT[,HOST:PORT...]", Exit.USAGE)
        found.append(endpoint)
    if not found:
        raise CommandError("--etcd: write HOST:PORT[,HOST:PORT...]", Exit.USAGE)
    return tuple(found)
