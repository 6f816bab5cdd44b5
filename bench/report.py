"""What a benchmark found: a table for people, JSON for machines, targets with yes or no."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from bench.stats import Spread

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True, slots=True)
class Figure:
    """One number that has a target. ``sense``: the value must be at least or at most that."""

    name: str
    value: Spread
    target: float
    sense: Literal["at least", "at most"]
    unit: str = "×"

    @property
    def reached(self) -> bool:
        if self.sense == "at least":
            return self.value.median >= self.target
        return self.value.median <= self.target


@dataclass(slots=True)
class Report:
    """Collected while a benchmark runs. ``rows`` are shown as one table per ``section``."""

    benchmark: str
    rows: list[dict[str, Any]] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def row(self, section: str, **cells: Any) -> None:
        self.rows.append({"section": section, **cells})

    def note(self, text: str) -> None:
        self.notes.append(text)

    def figure(
        self,
        name: str,
        value: Spread,
        sense: Literal["at least", "at most"],
        target: float,
        unit: str = "×",
    ) -> None:
        self.figures.append(Figure(name, value, target, sense, unit))

    def text(self) -> str:
        parts = [f"== {self.benchmark} =="]
        sections = dict.fromkeys(row["section"] for row in self.rows)
        for section in sections:
            mine = [
                {key: value for key, value in row.items() if key != "section"}
                for row in self.rows
                if row["section"] == section
            ]
            heads = list(dict.fromkeys(key for row in mine for key in row))
            lines = [[_cell(row.get(head, "")) for head in heads] for row in mine]
            parts += ["", section, table(heads, lines)]
        if self.figures:
            lines = [
                [
                    figure.name,
                    f"{figure.value.text()} {figure.unit}".strip(),
                    f"{figure.sense} {figure.target:g} {figure.unit}".strip(),
                    "yes" if figure.reached else "NO",
                ]
                for figure in self.figures
            ]
            parts += ["", table(["figure", "median (min..max)", "target", "reached"], lines)]
        parts += [f"note: {note}" for note in self.notes]
        return "\n".join(parts)

    def write(self, folder: Path, machine: dict[str, Any]) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.benchmark}.json"
        content = {
            "benchmark": self.benchmark,
            "machine": machine,
            "rows": [{key: _plain(value) for key, value in row.items()} for row in self.rows],
            "figures": [{**asdict(f), "reached": f.reached} for f in self.figures],
            "notes": self.notes,
        }
        path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", "utf-8")
        return path


def table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    widths = [max(len(line[column]) for line in [heads, *lines]) for column in range(len(heads))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in [list(heads), ["-" * width for width in widths], *lines]
    )


def machine() -> dict[str, Any]:
    """Where and from what this was measured. Nothing that names a person or a host."""
    model = "unknown"
    for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    commit = _git("rev-parse", "HEAD") or "unknown"
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load_average_1m": round(os.getloadavg()[0], 2),
        "commit": commit,
        "changed_files": len(_git("status", "--porcelain").splitlines()),
        "measured_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": " ".join(["python -m bench", *sys.argv[1:]]),
    }


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _cell(value: Any) -> str:
    if isinstance(value, Spread):
        return value.text()
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1_000 else f"{value:.3g}"
    return str(value)


def _plain(value: Any) -> Any:
    return asdict(value) if isinstance(value, Spread) else value
