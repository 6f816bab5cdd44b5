"""The `mesh` command: its commands and their options, and nothing else.

Each command imports what it needs when it runs, so that `mesh --help` and completion are quick. The
server commands (`up`, `router`, `instance`) are declared in ``mesh.cli.servers``, `policy` and
`type-constraints` in ``mesh.cli.live_settings``, `pull` in ``mesh.cli.pull``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mesh.cli import controller, live_settings, pull, servers
from mesh.cli.exits import HELP as EXIT_CODES
from mesh.cli.exits import CommandError, Exit
from mesh.cli.formats import DetailFormat, ListFormat
from mesh.cli.kinds import METAVAR as KINDS
from mesh.cli.options import DetailOption, ListOption, TimeoutOption, duration_s
from mesh.cli.session import MeshGroup, Session, out

DEFAULT_ADDRESS = "127.0.0.1:8033"

app = typer.Typer(
    name="mesh",
    cls=MeshGroup,
    help="One address, many models: serve very many models on few machines.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def complete_model(ctx: typer.Context, incomplete: str) -> list[str]:
    """Names of models for the shell's completion; none when the mesh does not answer at once."""
    import json

    from mesh.cli.connection import Connection, Target

    address = ctx.find_root().params.get("address") or DEFAULT_ADDRESS
    try:
        with Connection(Target(address), connect_timeout_s=0.5) as connection:
            rows = json.loads(connection.list("models", timeout_s=1.0))
    except (CommandError, ValueError):
        return []
    return [row["name"] for row in rows if str(row.get("name", "")).startswith(incomplete)]


ModelArgument = Annotated[str, typer.Argument(metavar="NAME", autocompletion=complete_model)]


@app.callback()
def root(
    ctx: typer.Context,
    address: Annotated[
        str,
        typer.Option(envvar="MESH_ADDRESS", metavar="HOST:PORT", help="The router's gRPC address."),
    ] = DEFAULT_ADDRESS,
    tls: Annotated[
        bool, typer.Option("--tls", help="Speak TLS, trusting the system's authorities.")
    ] = False,
    tls_ca: Annotated[
        Path | None,
        typer.Option(envvar="MESH_TLS_CA", metavar="FILE", help="Trust these; implies --tls."),
    ] = None,
    tls_cert: Annotated[
        Path | None,
        typer.Option(envvar="MESH_TLS_CERT", metavar="FILE", help="This client's certificate."),
    ] = None,
    tls_key: Annotated[
        Path | None, typer.Option(envvar="MESH_TLS_KEY", metavar="FILE", help="And its key.")
    ] = None,
    tls_server_name: Annotated[
        str, typer.Option(metavar="NAME", help="The name that the router's certificate is for.")
    ] = "",
) -> None:
    if ctx.invoked_subcommand in (*servers.COMMANDS, "controller", "pull", "version"):
        return
    from mesh.cli.connection import Target

    if (tls_cert is None) != (tls_key is None):
        raise CommandError("--tls-cert and --tls-key go together", Exit.USAGE)
    session = Session(
        Target(
            address=address,
            tls=tls or tls_ca is not None or tls_cert is not None,
            tls_ca=tls_ca,
            tls_cert=tls_cert,
            tls_key=tls_key,
            tls_server_name=tls_server_name,
        )
    )
    ctx.obj = session
    ctx.call_on_close(session.close)


@app.command()
def apply(
    ctx: typer.Context,
    file: Annotated[
        str, typer.Option("--file", "-f", metavar="FILE|DIR|-", help="Resources in YAML or JSON.")
    ],
    wait: Annotated[
        bool | None,
        typer.Option(
            "--wait/--no-wait",
            help="Wait until the models are loaded or have failed. Default: on a terminal.",
            show_default=False,
        ),
    ] = None,
    load: Annotated[
        bool, typer.Option("--load/--no-load", help="Load now where that evicts nothing.")
    ] = True,
    storage_config: Annotated[
        Path | None,
        typer.Option(
            envvar="MESH_STORAGE_CONFIG",
            metavar="DIR",
            help="Write the Secret storage-config into this folder, which the instances read. "
            "Default: that of the `mesh up` with its data in ./.mesh.",
            show_default=False,
        ),
    ] = None,
    timeout: TimeoutOption = "5m",
    output: ListOption = ListFormat.table,
) -> None:
    """Apply what a cluster takes: InferenceServices, Predictors, ServingRuntimes,
    ClusterServingRuntimes, the Secret storage-config, and Lists of them."""
    import sys

    from mesh.cli import resources

    resources.apply(
        ctx.obj,
        file,
        wait=sys.stderr.isatty() if wait is None else wait,
        load_now=load,
        timeout_s=timeout,
        format_=output,
        storage_config=storage_config,
    )


@app.command()
def get(
    ctx: typer.Context,
    kind: Annotated[str, typer.Argument(metavar=KINDS)],
    names: Annotated[list[str] | None, typer.Argument(metavar="[NAME]...")] = None,
    output: ListOption = ListFormat.table,
    timeout: TimeoutOption = "30s",
) -> None:
    """List models, instances or runtimes; InferenceServices with their status, as kubectl does."""
    from mesh.cli import resources

    resources.get(ctx.obj, kind, names or (), output, timeout)


@app.command()
def describe(
    ctx: typer.Context,
    kind: Annotated[str, typer.Argument(metavar="model|isvc|predictor")],
    name: ModelArgument,
    output: DetailOption = DetailFormat.text,
    timeout: TimeoutOption = "30s",
) -> None:
    """Everything that is known of one model: copies, sizes, failures and their causes."""
    from mesh.cli import resources
    from mesh.cli.kinds import model_kind

    model_kind(kind, "described")
    resources.describe(ctx.obj, name, output, timeout)


@app.command()
def delete(
    ctx: typer.Context,
    kind: Annotated[str, typer.Argument(metavar="model|isvc|predictor|runtime")],
    names: Annotated[list[str], typer.Argument(metavar="NAME...", autocompletion=complete_model)],
    ignore_not_found: Annotated[
        bool, typer.Option("--ignore-not-found", help="A name that is not there is no error.")
    ] = False,
    timeout: TimeoutOption = "30s",
) -> None:
    """Unregister models, or forget runtimes. Requests in flight are finished first."""
    from mesh.cli import resources

    resources.delete(ctx.obj, kind, names, ignore_not_found=ignore_not_found, timeout_s=timeout)


@app.command()
def infer(
    ctx: typer.Context,
    name: ModelArgument,
    json: Annotated[
        str | None,
        typer.Option("--json", metavar="FILE|-", help="A v2 inference request as JSON."),
    ] = None,
    npy: Annotated[
        list[str] | None,
        typer.Option("--npy", metavar="INPUT=FILE", help="One input from a .npy file; repeatable."),
    ] = None,
    timeout: TimeoutOption = "5m",
) -> None:
    """Ask a model; the answer is printed as v2 JSON."""
    from mesh.cli import infer as command

    command.infer(ctx.obj, name, json_file=json, npy=npy or (), timeout_s=timeout)


@app.command()
def explain(
    ctx: typer.Context,
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", autocompletion=complete_model)
    ] = None,
    decisions: Annotated[
        bool,
        typer.Option(
            "--decisions",
            help="What was decided lately by the router and the instances, and why: of one model "
            "or instance when it is named.",
        ),
    ] = False,
    limit: Annotated[
        int, typer.Option(min=1, max=10_000, help="Decisions at most; the latest come first.")
    ] = 50,
    since: Annotated[
        Any,
        typer.Option(parser=duration_s, metavar="DURATION", help="Decisions not older than that."),
    ] = None,
    output: DetailOption = DetailFormat.text,
    timeout: TimeoutOption = "30s",
) -> None:
    """Where a request for the model would go now, and why; or the last decisions."""
    if decisions:
        from mesh.cli import decisions as command

        command.show(
            ctx.obj, name or "", limit=limit, since_s=since, format_=output, timeout_s=timeout
        )
        return
    if not name:
        raise CommandError("give the name of a model, or --decisions", Exit.USAGE)
    from mesh.cli import resources

    resources.explain(ctx.obj, name, output, timeout)


@app.command()
def version() -> None:
    """The version of this program."""
    from importlib import metadata

    try:
        found = metadata.version("modelmesh-py")
    except metadata.PackageNotFoundError:
        found = "not installed (run from its sources)"
    out(f"mesh {found}\n")


live_settings.add_to(app)
servers.add_to(app)
controller.add_to(app)
pull.add_to(app)


if __name__ == "__main__":
    app()
