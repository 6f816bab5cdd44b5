"""`mesh apply`, `get`, `describe`, `delete` and `explain`: resources, by way of a router.

What a resource means is the router's business; here a file is read, sent, and the answer shown.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from mesh.admin_views import (
    Explanation,
    InstanceRow,
    ModelDescription,
    ModelRow,
    decode,
    decode_list,
)
from mesh.cli import output
from mesh.cli.exits import CommandError, Exit
from mesh.cli.formats import DetailFormat, ListFormat
from mesh.cli.output import INFERENCE_SERVICE
from mesh.cli.session import Session, note, out
from mesh.core.errors import MeshError
from mesh.manifest_files import Document, files_in, read_file, read_files, read_text

if TYPE_CHECKING:
    from mesh.cli.connection import Connection

KINDS: Final[dict[str, str]] = {
    "models": "models",
    "model": "models",
    "isvc": "models",
    "inferenceservices": "models",
    "inferenceservice": "models",
    "instances": "instances",
    "instance": "instances",
    "pods": "instances",
}
# A model that nothing loads yet gets this long to begin before it counts as "registered only".
_LOAD_BEGINS_WITHIN_S: Final = 2.0
_POLL_FIRST_S: Final = 0.1
_POLL_MAX_S: Final = 2.0


def resource_kind(text: str) -> str:
    kind = KINDS.get(text.lower())
    if kind is None:
        raise CommandError(f"there is no kind {text!r}: write models or instances", Exit.USAGE)
    return kind


def model_kind(text: str, verb: str) -> None:
    """Raise CommandError unless the kind is that of models."""
    if resource_kind(text) != "models":
        raise CommandError(f"only models can be {verb}: write `model NAME`", Exit.USAGE)


def documents_of(file: str) -> list[Document]:
    """What ``-f`` names. Raises CommandError when there is nothing to read at all."""
    if file == "-":
        documents = list(read_text(sys.stdin.read(), "stdin"))
    else:
        path = Path(file)
        if not path.exists():
            raise CommandError(f"-f {file}: no such file or folder", Exit.USAGE)
        documents = list(read_files(files_in(path)) if path.is_dir() else read_file(path))
    if not documents:
        raise CommandError(f"-f {file}: holds no resource (*.yaml, *.yml, *.json)", Exit.USAGE)
    return documents


def apply(
    session: Session,
    file: str,
    *,
    wait: bool,
    load_now: bool,
    timeout_s: float,
    format_: ListFormat,
) -> None:
    documents = documents_of(file)
    connection = session.connect()
    applied: list[dict[str, Any]] = []
    failed = 0
    for document in documents:
        if document.fault:
            note(f"error: {document.source}: {document.fault}")
            failed += 1
            continue
        try:
            reply = connection.apply(document.as_json(), load_now=load_now, timeout_s=timeout_s)
        except CommandError as error:
            if error.exit_code is Exit.UNREACHABLE:
                raise
            note(f"error: {document.source}: {document.label}: {error.message}")
            failed += 1
            continue
        for warning in reply.warnings:
            note(f"warning: {document.source}: {document.label}: {warning}")
        applied.append({"name": reply.name, "model_id": reply.model_id, "action": reply.action})
        _say_applied(document, reply.action, format_)
    if format_ is ListFormat.json:
        out(output.as_json(applied))
    elif format_ is ListFormat.yaml:
        out(output.as_yaml(applied))
    if wait and applied:
        names = frozenset(item["name"] for item in applied)
        failed += _wait_until_settled(connection, names, timeout_s)
    if failed:
        raise CommandError(f"{failed} of {len(documents)} resources failed; see above")


def _say_applied(document: Document, action: str, format_: ListFormat) -> None:
    if format_ is ListFormat.name:
        out(f"{document.label}\n")
    elif format_ in (ListFormat.table, ListFormat.wide):
        out(f"{document.label} {action}\n")


@dataclass(frozen=True, slots=True)
class Settled:
    """How the applied names stand: ``pending`` ones are still to come to rest."""

    loaded: frozenset[str]
    failed: dict[str, str]
    idle: frozenset[str]
    pending: frozenset[str]


def settle(rows: Sequence[ModelRow], names: frozenset[str], *, begun: bool) -> Settled:
    """Sort the names by what became of them.

    ``begun``: loads that were to begin have had the time to; what is not loading then is idle
    (registered, loads at its first request).
    """
    loaded, idle, pending = set(), set(), set(names)
    failed: dict[str, str] = {}
    for row in rows:
        if row.name not in names:
            continue
        switching = bool(row.target_model_id) and row.target_model_id != row.model_id
        if row.target_failure or row.state == "LOADING_FAILED":
            failed[row.name] = row.target_failure or row.failure or "no cause was given"
        elif row.state == "LOADED" and not switching:
            loaded.add(row.name)
        elif row.state == "NOT_LOADED" and not switching and begun:
            idle.add(row.name)
    pending -= loaded | idle | failed.keys()
    return Settled(frozenset(loaded), failed, frozenset(idle), frozenset(pending))


def _wait_until_settled(connection: Connection, names: frozenset[str], timeout_s: float) -> int:
    """Show a bar until every name has come to rest; the number of failures."""
    from mesh.cli.progress import Bar

    start_s, pause_s = time.monotonic(), _POLL_FIRST_S
    with Bar("loading", len(names)) as bar:
        while True:
            rows = decode_list(ModelRow, connection.list("models", timeout_s=timeout_s))
            waited_s = time.monotonic() - start_s
            state = settle(rows, names, begun=waited_s >= _LOAD_BEGINS_WITHIN_S)
            bar.update(len(names) - len(state.pending))
            if not state.pending:
                break
            if waited_s >= timeout_s:
                some = ", ".join(sorted(state.pending)[:3])
                raise CommandError(
                    f"{len(state.pending)} of {len(names)} models are not loaded after "
                    f"{timeout_s:g} s ({some}, ...); they go on loading: see `mesh get models`",
                    Exit.TIMED_OUT,
                )
            time.sleep(pause_s)
            pause_s = min(_POLL_MAX_S, pause_s * 1.5)
    for name, cause in sorted(state.failed.items()):
        note(f"error: {name}: did not load: {cause}")
    idle = f", {len(state.idle)} registered (they load at their first request)"
    note(f"{len(state.loaded)} loaded{idle if state.idle else ''}")
    return len(state.failed)


def get(
    session: Session, kind_text: str, names: Sequence[str], format_: ListFormat, timeout_s: float
) -> None:
    kind = resource_kind(kind_text)
    text = session.connect().list(kind, timeout_s=timeout_s)
    raw: list[dict[str, Any]] = json.loads(text)
    key = "name" if kind == "models" else "instance_id"
    missing = sorted(set(names) - {str(item.get(key)) for item in raw})
    if names:
        raw = [item for item in raw if item.get(key) in names]
    match format_:
        case ListFormat.json:
            out(output.as_json(raw[0] if len(names) == 1 and raw else raw))
        case ListFormat.yaml:
            out(output.as_yaml(raw[0] if len(names) == 1 and raw else raw))
        case ListFormat.name:
            prefix = INFERENCE_SERVICE if kind == "models" else "instance"
            out("".join(f"{prefix}/{item.get(key)}\n" for item in raw))
        case ListFormat.table | ListFormat.wide:
            _print_table(kind, json.dumps(raw), wide=format_ is ListFormat.wide)
    if missing:
        raise CommandError(f"not found: {', '.join(missing)}; see `mesh get {kind}`")


def _print_table(kind: str, text: str, *, wide: bool) -> None:
    now_ms, colour = time.time_ns() // 1_000_000, sys.stdout.isatty()
    shown: str
    if kind == "models":
        models = sorted(decode_list(ModelRow, text), key=lambda row: row.name)
        shown = output.table(models, output.model_columns(now_ms), wide=wide, colour=colour)
        empty = not models
    else:
        instances = sorted(decode_list(InstanceRow, text), key=lambda row: row.instance_id)
        shown = output.table(instances, output.instance_columns(now_ms), wide=wide, colour=colour)
        empty = not instances
    if empty:
        note(f"no {kind}")
    else:
        out(shown)


def describe(session: Session, name: str, format_: DetailFormat, timeout_s: float) -> None:
    text = session.connect().describe(name, timeout_s=timeout_s)
    if not _structured(text, format_):
        now_ms = time.time_ns() // 1_000_000
        out(output.describe_model(_decoded(ModelDescription, text), now_ms))


def explain(session: Session, name: str, format_: DetailFormat, timeout_s: float) -> None:
    text = session.connect().explain(name, timeout_s=timeout_s)
    if _structured(text, format_):
        known = bool(json.loads(text).get("model_id"))
    else:
        view = _decoded(Explanation, text)
        out(output.explain_model(view))
        known = bool(view.model_id)
    if not known:
        raise CommandError(f"not found: {name}; see `mesh get models`")


def delete(
    session: Session, names: Sequence[str], *, ignore_not_found: bool, timeout_s: float
) -> None:
    connection = session.connect()
    missing: list[str] = []
    for name in names:
        if connection.delete(name, timeout_s=timeout_s):
            out(f"{INFERENCE_SERVICE}/{name} deleted\n")
        else:
            missing.append(name)
    if missing and not ignore_not_found:
        raise CommandError(f"not found: {', '.join(missing)}; see `mesh get models`")


def _structured(text: str, format_: DetailFormat) -> bool:
    if format_ is DetailFormat.json:
        out(output.as_json(json.loads(text)))
    elif format_ is DetailFormat.yaml:
        out(output.as_yaml(json.loads(text)))
    return format_ is not DetailFormat.text


def _decoded(cls: type[Any], text: str) -> Any:
    try:
        return decode(cls, text)
    except MeshError as error:
        raise CommandError(
            f"the mesh answered what this version cannot read: {error.message}; try -o json"
        ) from error
