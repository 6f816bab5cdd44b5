"""`mesh policy` and `mesh type-constraints`: live settings, by way of a router.

They stand in etcd and hold for every process of the mesh within moments. A router judges them; a
file is only read here.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from mesh.cli.exits import CommandError, Exit
from mesh.cli.formats import DetailFormat, ListFormat
from mesh.cli.options import DetailOption, ListOption, TimeoutOption
from mesh.cli.session import Session, note, out

POLICY_HELP = (
    "Thresholds of the mesh: what they are, where from, and changing them while it runs. "
    "`-o wide` shows the reasons."
)
CONSTRAINTS_HELP = "Which labels an instance must (should) have to run models of a type."

policy_app = typer.Typer(help=POLICY_HELP, invoke_without_command=True)
constraints_app = typer.Typer(help=CONSTRAINTS_HELP, invoke_without_command=True)


def add_to(app: typer.Typer) -> None:
    app.add_typer(policy_app, name="policy")
    app.add_typer(constraints_app, name="type-constraints")


# ---- the policy ----------------------------------------------------------------------------------


@policy_app.callback()
def policy(
    ctx: typer.Context, output: ListOption = ListFormat.table, timeout: TimeoutOption = "30s"
) -> None:
    if ctx.invoked_subcommand is None:
        _show_policy(ctx.obj, (), output, timeout)


@policy_app.command("get")
def get_policy(
    ctx: typer.Context,
    names: Annotated[list[str] | None, typer.Argument(metavar="[NAME]...")] = None,
    output: ListOption = ListFormat.table,
    timeout: TimeoutOption = "30s",
) -> None:
    """List all thresholds, or some."""
    _show_policy(ctx.obj, names or (), output, timeout)


@policy_app.command("set")
def set_policy(
    ctx: typer.Context,
    values: Annotated[list[str], typer.Argument(metavar="NAME=VALUE...")],
    timeout: TimeoutOption = "30s",
) -> None:
    """Override thresholds for the whole mesh, now: `idle_unload_ms=30m`, `load_slots=4`."""
    from mesh.cli.thresholds import parse_overrides

    overrides = parse_overrides(values)
    if not overrides:
        raise CommandError("write NAME=VALUE; `mesh policy` lists the names", Exit.USAGE)
    _change(ctx.obj, overrides, (), timeout)


@policy_app.command("unset")
def unset_policy(
    ctx: typer.Context,
    names: Annotated[list[str] | None, typer.Argument(metavar="[NAME]...")] = None,
    everything: Annotated[bool, typer.Option("--all", help="All overrides.")] = False,
    timeout: TimeoutOption = "30s",
) -> None:
    """Take overrides away: each process goes by how it was started again."""
    if bool(names) == everything:
        raise CommandError("name the thresholds, or write --all", Exit.USAGE)
    _change(ctx.obj, {}, names or (), timeout, reset=everything)


def _change(
    session: Session,
    overrides: dict[str, object],
    unset: Sequence[str],
    timeout_s: float,
    *,
    reset: bool = False,
) -> None:
    view = json.loads(
        session.connect().set_policy(json.dumps(overrides), unset, reset=reset, timeout_s=timeout_s)
    )
    _warn(view)
    changed = {*overrides, *unset}
    rows = [row for row in view["rows"] if row["name"] in changed]
    for row in rows:
        out(f"{row['name']} = {row['value']} ({row['source']})\n")
    if reset:
        out("no overrides are left\n")


def _warn(view: dict[str, Any]) -> None:
    for warning in view.get("warnings", ()):
        note(f"warning: {warning}")


def _show_policy(
    session: Session, names: Sequence[str], format_: ListFormat, timeout_s: float
) -> None:
    from mesh.admin_views import PolicyRow, decode_list
    from mesh.cli import output

    view: dict[str, Any] = json.loads(session.connect().get_policy(timeout_s=timeout_s))
    rows: list[dict[str, Any]] = view["rows"]
    missing = sorted(set(names) - {row["name"] for row in rows})
    if names:
        rows = [row for row in rows if row["name"] in names]
    match format_:
        case ListFormat.json:
            out(output.as_json(rows))
        case ListFormat.yaml:
            out(output.as_yaml(rows))
        case ListFormat.name:
            out("".join(f"{row['name']}\n" for row in rows))
        case ListFormat.table | ListFormat.wide:
            shown = decode_list(PolicyRow, json.dumps(rows))
            wide, colour = format_ is ListFormat.wide, sys.stdout.isatty()
            if shown:
                out(output.table(shown, output.policy_columns(), wide=wide, colour=colour))
    _warn(view)
    if view.get("refused"):
        note(
            f"warning: what stands in config/policy is not acted on: {view['refused']}; "
            "`mesh policy unset` takes it away"
        )
    if missing:
        raise CommandError(f"there is no threshold {', '.join(missing)}; see `mesh policy`")


# ---- constraints of formats ----------------------------------------------------------------------


@constraints_app.callback()
def constraints(
    ctx: typer.Context, output: DetailOption = DetailFormat.text, timeout: TimeoutOption = "30s"
) -> None:
    if ctx.invoked_subcommand is None:
        _show_constraints(ctx.obj, output, timeout)


@constraints_app.command("get")
def get_constraints(
    ctx: typer.Context, output: DetailOption = DetailFormat.text, timeout: TimeoutOption = "30s"
) -> None:
    """Show them."""
    _show_constraints(ctx.obj, output, timeout)


@constraints_app.command("set")
def set_constraints(
    ctx: typer.Context,
    file: Annotated[
        str,
        typer.Option(
            "--file", "-f", metavar="FILE|-",
            help='YAML or JSON in ModelMesh\'s form: {TYPE: {"required": [LABEL], "preferred": '
            "[LABEL]}}; the type _default stands for all others, {} takes all away.",
        ),
    ],
    timeout: TimeoutOption = "30s",
) -> None:  # fmt: skip
    """Replace all of them."""
    wanted = _read_object(file)
    ctx.obj.connect().set_type_constraints(json.dumps(wanted), timeout_s=timeout)
    out(f"type constraints of {len(wanted)} types set\n")


def _read_object(file: str) -> dict[str, Any]:
    import yaml

    try:
        text = sys.stdin.read() if file == "-" else Path(file).read_text("utf-8")
        found = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise CommandError(f"-f {file}: cannot be read: {error}", Exit.USAGE) from error
    if not isinstance(found, dict):
        raise CommandError(f"-f {file}: expected an object of types", Exit.USAGE)
    return found


def _show_constraints(session: Session, format_: DetailFormat, timeout_s: float) -> None:
    from mesh.cli import output

    found: dict[str, Any] = json.loads(session.connect().get_type_constraints(timeout_s=timeout_s))
    match format_:
        case DetailFormat.json:
            out(output.as_json(found))
        case DetailFormat.yaml:
            out(output.as_yaml(found))
        case DetailFormat.text if found:
            columns = output.constraint_columns()
            out(output.table(sorted(found.items()), columns, wide=True, colour=False))
        case DetailFormat.text:
            note("no type constraints: every instance that knows a format may run it")
