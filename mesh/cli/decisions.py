"""`mesh explain --decisions`: what routers and instances decided lately, and why."""

from __future__ import annotations

import json
import sys
import time

from mesh.admin_views import DecisionList, decode
from mesh.cli import output
from mesh.cli.exits import CommandError
from mesh.cli.formats import DetailFormat
from mesh.cli.session import Session, note, out
from mesh.core.errors import MeshError


def show(
    session: Session,
    name: str,
    *,
    limit: int,
    since_s: float | None,
    format_: DetailFormat,
    timeout_s: float,
) -> None:
    now_ms = time.time_ns() // 1_000_000
    since_ms = now_ms - round(since_s * 1_000) if since_s is not None else 0
    text = session.connect().decisions(name, limit=limit, since_ms=since_ms, timeout_s=timeout_s)
    if format_ is DetailFormat.json:
        out(output.as_json(json.loads(text)))
        return
    if format_ is DetailFormat.yaml:
        out(output.as_yaml(json.loads(text)))
        return
    try:
        view = decode(DecisionList, text)
    except MeshError as error:
        raise CommandError(
            f"the mesh answered what this version cannot read: {error.message}; try -o json"
        ) from error
    if view.rows:
        columns = output.decision_columns(now_ms)
        out(output.table(view.rows, columns, wide=True, colour=sys.stdout.isatty()))
    else:
        about = f" about {name}" if name else ""
        note(f"no decisions{about} are remembered by the {view.asked} processes that were asked")
    for who, reason in sorted(view.unreachable.items()):
        note(f"warning: {who} was not heard: {reason}")
