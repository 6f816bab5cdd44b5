"""`mesh apply`, `get`, `describe`, `delete` and `explain`: resources, by way of a router.

What a resource means is the router's business; here a file is read, sent, and the answer shown. A
secret alone is sent to nobody (``mesh.cli.storage_secret``).
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
from mesh.cli.kinds import Kind, kind_of
from mesh.cli.session import Session, note, out
from mesh.core.errors import MeshError
from mesh.manifest_files import Document, files_in, read_file, read_files, read_text
from mesh.storage_folder import is_secret

if TYPE_CHECKING:
    from mesh.cli.connection import Connection

# A model that nothing loads yet gets this long to begin before it counts as "registered only".
_LOAD_BEGINS_WITHIN_S: Final = 2.0
_POLL_FIRST_S: Final = 0.1
_POLL_MAX_S: Final = 2.0


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
    return sorted(documents, key=lambda document: document.turn)


def apply(
    session: Session,
    file: str,
    *,
    wait: bool,
    load_now: bool,
    timeout_s: float,
    format_: ListFormat,
    storage_config: Path | None = None,
) -> None:
    documents = documents_of(file)
    applied: list[dict[str, Any]] = []
    failed = 0
    for document in documents:
        if document.fault:
            note(f"error: {document.source}: {document.fault}")
            failed += 1
            continue
        try:
            if is_secret(document.resource or {}):
                done = _apply_secret(session, document, storage_config, timeout_s)
            else:
                done = _apply_document(session.connect(), document, load_now, timeout_s)
        except CommandError as error:
            if error.exit_code is Exit.UNREACHABLE:
                raise
            note(f"error: {document.source}: {document.label}: {error.message}")
            failed += 1
            continue
        applied.append(done)
        _say_applied(document, done["action"], format_)
    if format_ is ListFormat.json:
        out(output.as_json(applied))
    elif format_ is ListFormat.yaml:
        out(output.as_yaml(applied))
    names = frozenset(item["name"] for item in applied if item["model_id"])
    if wait and names:
        failed += _wait_until_settled(session.connect(), names, timeout_s)
    if failed:
        raise CommandError(f"{failed} of {len(documents)} resources failed; see above")


def _apply_document(
    connection: Connection, document: Document, load_now: bool, timeout_s: float
) -> dict[str, Any]:
    reply = connection.apply(document.as_json(), load_now=load_now, timeout_s=timeout_s)
    for warning in reply.warnings:
        note(f"warning: {document.source}: {document.label}: {warning}")
    return {"name": reply.name, "model_id": reply.model_id, "action": reply.action}


def _apply_secret(
    session: Session, document: Document, folder: Path | None, timeout_s: float
) -> dict[str, Any]:
    from mesh.cli.storage_secret import apply_secret

    action = apply_secret(document.resource or {}, folder, session.target.address)
    if action != "unchanged":
        try:  # it may be what they lacked
            session.connect().forget_failures(timeout_s=timeout_s)
        except CommandError as error:
            note(
                f"warning: {document.source}: {document.label}: models that failed are tried again "
                f"only when their failures expire: {error.message}"
            )
    return {"name": document.label.rpartition("/")[2], "model_id": "", "action": action}


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
    kind = kind_of(kind_text)
    text = session.connect().list(kind.listed, names, timeout_s=timeout_s)
    raw = [item for item in json.loads(text) if kind.resource in ("", item.get("kind"))]
    missing = sorted(set(names) - {_name_of(kind, item) for item in raw})
    if names:
        raw = [item for item in raw if _name_of(kind, item) in names]
    match format_:
        case ListFormat.json:
            out(output.as_json(_structure(kind, raw, names)))
        case ListFormat.yaml:
            out(output.as_yaml(_structure(kind, raw, names)))
        case ListFormat.name:
            labels = (
                kind.label_of(str(item["kind"])) if kind.form == "runtimes" else kind.label
                for item in raw
            )
            rows = zip(labels, raw, strict=True)
            out("".join(f"{label}/{_name_of(kind, item)}\n" for label, item in rows))
        case ListFormat.table | ListFormat.wide:
            _print_table(kind, raw, wide=format_ is ListFormat.wide)
    if missing:
        raise CommandError(f"not found: {', '.join(missing)}; see `mesh get {kind.plural}`")


def _name_of(kind: Kind, item: dict[str, Any]) -> str:
    match kind.form:
        case "models":
            return str(item.get("name"))
        case "instances":
            return str(item.get("instance_id"))
        case _:
            return str((item.get("metadata") or {}).get("name"))


def _structure(kind: Kind, raw: list[dict[str, Any]], names: Sequence[str]) -> object:
    if len(names) == 1 and len(raw) == 1:
        return raw[0]
    if kind.form in ("models", "instances"):
        return raw
    return {"apiVersion": "v1", "kind": "List", "items": raw}  # which can be applied


def _print_table(kind: Kind, raw: list[dict[str, Any]], *, wide: bool) -> None:
    if not raw:
        note(f"no {kind.plural}")
        return
    now_ms, colour, text = time.time_ns() // 1_000_000, sys.stdout.isatty(), json.dumps(raw)
    shown: str
    match kind.form:
        case "models":
            models = sorted(decode_list(ModelRow, text), key=lambda row: row.name)
            shown = output.table(models, output.model_columns(now_ms), wide=wide, colour=colour)
        case "instances":
            found = sorted(decode_list(InstanceRow, text), key=lambda row: row.instance_id)
            shown = output.table(found, output.instance_columns(now_ms), wide=wide, colour=colour)
        case _:
            from mesh.cli.kserve_output import columns_of

            ordered = sorted(raw, key=lambda item: _name_of(kind, item))
            columns = columns_of(kind.resource, now_ms)
            shown = output.table(ordered, columns, wide=wide, colour=colour)
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
    session: Session,
    kind_text: str,
    names: Sequence[str],
    *,
    ignore_not_found: bool,
    timeout_s: float,
) -> None:
    kind = kind_of(kind_text)
    if kind.form == "instances":
        raise CommandError("only models and runtimes can be deleted", Exit.USAGE)
    connection = session.connect()
    missing: list[str] = []
    for name in names:
        if kind.holds_models:
            existed = connection.delete(name, timeout_s=timeout_s)
        else:
            existed = connection.delete_runtime(name, kind.resource, timeout_s=timeout_s)
        if existed:
            out(f"{kind.label}/{name} deleted\n")
        else:
            missing.append(name)
    if missing and not ignore_not_found:
        shown = "models" if kind.holds_models else kind.plural
        raise CommandError(f"not found: {', '.join(missing)}; see `mesh get {shown}`")


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
