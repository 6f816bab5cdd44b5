"""How the command line shows what the mesh answered: tables, JSON, YAML, names.

Pure formatting into text; writing it is the command's. The shapes are those of
``mesh.admin_views``. Tables are plain columns, as kubectl's, so that they can be cut and sorted;
colour only on a terminal.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final, Generic, TypeVar

from mesh.admin_views import (
    ConcreteModel,
    CopyView,
    DecisionRow,
    Explanation,
    InstanceRow,
    ModelDescription,
    ModelRow,
    PolicyRow,
)
from mesh.cli.quantities import format_age, format_progress, format_size

Row = TypeVar("Row")

# What an instance says of a copy that stands in the lines above it, or belongs to the instance.
_SAID_BEFORE: Final = frozenset(
    {
        *("model_id", "instance_id", "state", "size_bytes"),
        *("in_flight", "model_type", "loaded_at_ms", "instance", "load"),
    }
)


@dataclass(frozen=True, slots=True)
class Column(Generic[Row]):
    title: str
    value: Callable[[Row], str]
    wide: bool = False  # only shown with -o wide


_STATE_COLOURS: Final[dict[str, str]] = {
    "LOADED": "green",
    "READY": "green",
    "LOADING": "yellow",
    "STARTING": "yellow",
    "DRAINING": "yellow",
    "LOADING_FAILED": "red",
    "NOT_FOUND": "red",
}


def model_columns(now_ms: int) -> tuple[Column[ModelRow], ...]:
    return (
        Column("NAME", lambda row: row.name),
        Column("STATE", _model_state),
        Column("TYPE", lambda row: row.model_type or "-"),
        Column("COPIES", _copies),
        Column("SIZE", lambda row: format_size(row.size_bytes) if row.size_bytes else "-"),
        Column("LAST USED", lambda row: _age(row.last_used_at_ms, now_ms)),
        Column("AGE", lambda row: _age(row.created_at_ms, now_ms)),
        Column("MODEL ID", lambda row: row.model_id, wide=True),
        Column("MIN", lambda row: "pinned" if row.pinned else str(row.min_copies), wide=True),
        Column("LACKS", _lacks, wide=True),
        Column("IDLE UNLOAD", lambda row: _idle_unload(row.idle_unload_ms), wide=True),
        Column("LABELS", lambda row: _labels(row.required_labels, row.preferred_labels), wide=True),
        Column("PATH", lambda row: row.path or "-", wide=True),
        Column("INSTANCES", lambda row: ",".join(row.instance_ids) or "-", wide=True),
        Column("FAILURE", lambda row: row.target_failure or row.failure or "-", wide=True),
    )


def instance_columns(now_ms: int) -> tuple[Column[InstanceRow], ...]:
    return (
        Column("NAME", lambda row: row.instance_id),
        Column("STATE", lambda row: row.state + (" (passed over)" if row.passed_over else "")),
        Column("MODELS", lambda row: str(row.model_count)),
        Column("LOADING", lambda row: f"{row.loading_count}/{row.load_slots}"),
        Column("USED", lambda row: format_size(row.used_bytes)),
        Column("CAPACITY", lambda row: format_size(row.capacity_bytes)),
        Column("RPM", lambda row: str(row.requests_per_minute)),
        Column("AGE", lambda row: _age(row.started_at_ms, now_ms)),
        Column("ADDRESS", lambda row: row.address, wide=True),
        Column("METRICS", lambda row: row.metrics_address or "-", wide=True),
        Column("OLDEST USE", lambda row: _age(row.lru_at_ms, now_ms), wide=True),
        Column("TYPES", lambda row: ",".join(row.model_types) or "-", wide=True),
        Column("ZONE", lambda row: row.zone or "-", wide=True),
        Column("LABELS", lambda row: ",".join(row.labels) or "-", wide=True),
        Column("GROUP", _group, wide=True),
        Column(
            "VICTIM SCORE",
            lambda row: f"{row.victim_score:.3g}" if row.victim_score else "-",
            wide=True,
        ),
        Column("VERSION", lambda row: row.software_version or "-", wide=True),
    )


def decision_columns(now_ms: int) -> tuple[Column[DecisionRow], ...]:
    return (
        Column("AGE", lambda row: _age(row.at_ms, now_ms)),
        Column("KIND", lambda row: row.kind),
        Column("MODEL", lambda row: row.model_id or "-"),
        Column("INSTANCE", lambda row: row.instance_id or "-"),
        Column("REASON", lambda row: row.reason or "-"),
        Column("RUNNER-UP", lambda row: row.runner_up or "-"),
        Column("DETAIL", lambda row: row.detail or "-"),
        Column("WHO", lambda row: row.who or "-"),
    )


def policy_columns() -> tuple[Column[PolicyRow], ...]:
    return (
        Column("NAME", lambda row: row.name),
        Column("VALUE", lambda row: str(row.value)),
        Column("DEFAULT", lambda row: str(row.default)),
        Column("FROM", lambda row: row.source),
        Column("UNIT", lambda row: row.unit or "-", wide=True),
        Column("EXPECTED", lambda row: row.expected, wide=True),
        Column("REASON", lambda row: row.reason, wide=True),
    )


def constraint_columns() -> tuple[Column[tuple[str, dict[str, list[str]]]], ...]:
    return (
        Column("TYPE", lambda row: row[0]),
        Column("REQUIRED", lambda row: ",".join(row[1].get("required", ())) or "-"),
        Column("PREFERRED", lambda row: ",".join(row[1].get("preferred", ())) or "-"),
    )


def table(rows: Iterable[Row], columns: Sequence[Column[Row]], *, wide: bool, colour: bool) -> str:
    """Columns of text, two spaces apart; never wrapped, never cut."""
    shown = [column for column in columns if wide or not column.wide]
    lines = [[column.title for column in shown]]
    lines += [[_one_line(column.value(row)) for column in shown] for row in rows]
    widths = [max(len(line[at]) for line in lines) for at in range(len(shown))]
    out = io.StringIO()
    for number, line in enumerate(lines):
        cells = [cell.ljust(width) for cell, width in zip(line, widths, strict=True)]
        if colour:
            cells = [_coloured(cell, header=number == 0) for cell in cells]
        out.write("  ".join(cells).rstrip() + "\n")
    return out.getvalue()


def as_json(value: object) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def as_yaml(value: object) -> str:
    import yaml  # only when asked for

    text: str = yaml.safe_dump(value, sort_keys=False, allow_unicode=True)
    return text


def describe_model(view: ModelDescription, now_ms: int) -> str:
    """The text of ``mesh describe model``."""
    row = view.row
    lines = [
        f"Name:       {row.name}",
        f"Kind:       {'alias' if row.alias else 'model'}",
        f"State:      {_model_state(row)}",
    ]
    if row.shortfall:
        lines.append(f"Lacks:      {_lacks(row)}")
    if row.failure:
        lines.append(f"Failure:    {row.failure}")
    if row.target_failure:
        lines.append(f"Not switched to {row.target_model_id}: {row.target_failure}")
    if view.updated_at_ms:
        lines.append(f"Updated:    {_instant(view.updated_at_ms, now_ms)}")
    if view.status:
        from mesh.cli.kserve_output import status_lines

        lines += ["", *status_lines(view.status, now_ms)]
    if view.active is not None:
        lines += ["", "Model that answers:", *_concrete(view.active, now_ms)]
    if view.target is not None:
        lines += ["", "Model that is to answer next:", *_concrete(view.target, now_ms)]
    for instance_id, reason in view.unreachable.items():
        lines.append(f"Did not answer: {instance_id}: {reason}")
    return "\n".join(lines) + "\n"


def explain_model(view: Explanation) -> str:
    """The text of ``mesh explain``."""
    where = f" {view.instance_id}" if view.instance_id else ""
    lines = [f"{view.name} -> {view.model_id or 'no model'}: {view.action}{where}"]
    if view.reason:
        lines.append(f"Why:        {view.reason}")
    if view.runner_up:
        lines.append(f"Runner-up:  {view.runner_up}")
    if view.candidates:
        lines.append("Candidates:")
        for one in view.candidates:
            rank = "->" if one.chosen else f"{one.rank}." if one.rank else "no"
            zone = f" in {one.zone}" if one.zone else ""
            lines.append(f"  {rank:<3} {one.instance_id}{zone}  {one.reason}".rstrip())
    if view.shortfall:
        lines.append(f"Lacks:      {view.shortfall}")
    if view.text:
        lines += ["", view.text.rstrip()]
    return "\n".join(lines) + "\n"


def _concrete(model: ConcreteModel, now_ms: int) -> list[str]:
    stated = f"{format_size(model.size_bytes_stated)} stated" if model.size_bytes_stated else ""
    measured = (
        f"{format_size(model.size_bytes_measured)} measured" if model.size_bytes_measured else ""
    )
    lines = [
        f"  Model id:     {model.model_id}",
        f"  State:        {model.state}",
        f"  Type:         {model.model_type or '-'}",
        f"  Path:         {model.path or '-'}",
        f"  Size:         {', '.join(filter(None, (measured, stated))) or 'not known yet'}",
        f"  Min copies:   {model.min_copies}{', one pinned' if model.pinned else ''}",
        f"  Idle unload:  {_idle_unload(model.idle_unload_ms)}",
        f"  Wants labels: {_labels(model.required_labels, model.preferred_labels)}",
        f"  Created:      {_instant(model.created_at_ms, now_ms)}",
        f"  Last used:    {_instant(model.last_used_at_ms, now_ms)}",
    ]
    if model.labels:
        lines.append(f"  Labels:       {_pairs(model.labels)}")
    lines.append(f"  Copies:       {len(model.copies) or 'none'}")
    for copy in model.copies:
        lines += _copy(copy, now_ms)
    if model.failures:
        lines.append("  Failures:")
    for failure in model.failures:
        again = "may be tried again" if failure.expired else "not tried there again before"
        until = "" if failure.expired else f" {_clock(failure.expires_at_ms)}"
        lines.append(
            f"    {failure.instance_id}: {failure.code}: {failure.message} "
            f"({_age(failure.failed_at_ms, now_ms)} ago; {again}{until})"
        )
    return lines


def _copy(copy: CopyView, now_ms: int) -> list[str]:
    since = copy.loaded_at_ms or copy.claimed_at_ms
    lines = [
        f"    {copy.instance_id} at {copy.address or '?'}: {copy.state} "
        f"for {_age(since, now_ms)}, {format_size(copy.size_bytes)}, {copy.inflight} in flight"
        + (", pinned" if copy.pinned else "")
    ]
    load = copy.details.get("load")
    if isinstance(load, dict):
        lines.append(f"      {_load(load)}")
    details = {k: v for k, v in copy.details.items() if v and k not in _SAID_BEFORE}
    if details:
        lines.append(f"      {_pairs(details)}")
    return lines


def _load(load: Mapping[str, Any]) -> str:
    """How far a load is: what it waits for, or how much has come."""
    phase = str(load.get("phase") or "loading")
    if phase != "fetching":
        return phase
    return f"fetching: {format_progress(load.get('fetched_bytes') or 0, load.get('total_bytes'))}"


def _pairs(values: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{key}={value if isinstance(value, (str, int, float)) else json.dumps(value)}"
        for key, value in values.items()
    )


def _model_state(row: ModelRow) -> str:
    if row.target_failure:
        return f"{row.state} (new spec failed)"
    if row.target_model_id and row.target_model_id != row.model_id:
        return f"{row.state} (switching)"
    return row.state


def _copies(row: ModelRow) -> str:
    return f"{row.copies_loaded}" + (f"+{row.copies_loading}" if row.copies_loading else "")


def _lacks(row: ModelRow) -> str:
    """How many copies of those that are wanted there are, and why not more."""
    if not row.copies_wanted or (row.copies_loaded >= row.copies_wanted and not row.shortfall):
        return "-"
    told = f"{row.copies_loaded} of {row.copies_wanted}"
    return f"{told}: {row.shortfall}" if row.shortfall else told


def _idle_unload(idle_unload_ms: int | None) -> str:
    match idle_unload_ms:
        case None:
            return "as the policy has it"
        case 0:
            return "never"
        case _:
            return format_age(idle_unload_ms)


def _labels(required: Sequence[str], preferred: Sequence[str]) -> str:
    return ", ".join([*required, *(f"{label} (preferred)" for label in preferred)]) or "-"


def _group(row: InstanceRow) -> str:
    return "/".join(filter(None, (row.group, row.replica_set))) or "-"


def _age(at_ms: int, now_ms: int) -> str:
    return format_age(now_ms - at_ms) if at_ms else "-"


def _instant(at_ms: int, now_ms: int) -> str:
    return f"{_clock(at_ms)} ({_age(at_ms, now_ms)} ago)" if at_ms else "never"


def _clock(at_ms: int) -> str:
    return datetime.fromtimestamp(at_ms / 1000, UTC).strftime("%Y-%m-%d %H:%M:%SZ")


def _one_line(text: str) -> str:
    return " ".join(text.split()) if any(ch in text for ch in "\n\t\r") else text


def _coloured(cell: str, *, header: bool) -> str:
    if header:
        return f"\x1b[1m{cell}\x1b[0m"
    colour = _STATE_COLOURS.get(cell.split(" ")[0])
    code = {"green": 32, "yellow": 33, "red": 31}.get(colour or "")
    return f"\x1b[{code}m{cell}\x1b[0m" if code else cell
