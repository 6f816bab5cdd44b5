"""``python -m bench.sim.page``: the simulator's results as a page for people.

Reads the JSON files in bench/results and writes SIMULATION.md beside them; measures nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, Final

from bench.report import ROOT

RESULTS: Final = ROOT / "bench/results"
PAGE: Final = "SIMULATION.md"

_HEAD: Final = """# What the simulator says

Made by `python -m bench.sim.page` from the JSON files beside it; do not edit. The objects are
those of production, the time is virtual; workloads and the clairvoyant bound are described in
`bench/sim/workloads.py` and `bench/sim/one_cache.py`.
"""
_ONE: Final = """
## One cache

`python -m bench.sim.one_cache`: 10,000 models, room for {room:.0%} of all bytes, {requests:,}
requests, seed {seed}, judged after the first quarter. "Saved" is the share of load time that hits
saved: the measure where sizes and load times differ (`mixed`). "Gap" is the share of the way from
LRU to the clairvoyant bound. The shipped default is `{shipped}`.
"""
_MESH: Final = """
## A mesh

`python -m bench sim`: 10 instances, 2,000 models, memory for a tenth of them, 20 requests a second
for 20 minutes (the trace: its own). "production" is what ships; "production, lru" the same with
that eviction order; the others replace only the choice of an instance. "Warm hits" leave out the
first quarter, as the bound does, which takes all memory as one cache. Imbalance is the largest
number of loads on an instance over the mean.
"""
_BIG: Final = """
## The large run

`python -m bench sim --big`: 100,000 models on 100 instances, one hour of virtual time, in
{cpu:.0f} s of CPU.
"""


def page(results: Path) -> str:
    """The whole page. Raises OSError or KeyError for results that are not there."""
    return "\n".join([_HEAD, *_one_cache(results), *_mesh(results), *_big(results)])


def _one_cache(results: Path) -> Iterable[str]:
    found = json.loads((results / "sim-eviction.json").read_text())
    yield _ONE.format(
        room=found["room_share"],
        requests=found["requests"],
        seed=found["seed"],
        shipped=found["shipped"],
    )
    rows = []
    for workload in found["workloads"]:
        orders = {one["order"].split(" (")[0]: one for one in workload["orders"]}
        lru, shipped = orders["lru"], orders[found["shipped"]]
        bound = next(one for name, one in orders.items() if "bound" in name)
        rows.append(
            {
                "workload": workload["workload"],
                "LRU hits": lru["hit_ratio"],
                "default hits": shipped["hit_ratio"],
                "bound hits": bound.get("hit_ratio"),
                "LRU saved": lru["load_time_saved"],
                "default saved": shipped["load_time_saved"],
                "bound saved": bound["load_time_saved"],
                "gap closed": f"{shipped['gap_closed']:.0%}",
            }
        )
    yield _table(rows)
    yield _made(found["machine"])


def _mesh(results: Path) -> Iterable[str]:
    found = json.loads((results / "sim.json").read_text())
    yield _MESH
    yield from _sections(found["rows"])
    yield _made(found["machine"])


def _big(results: Path) -> Iterable[str]:
    found = json.loads((results / "sim-big.json").read_text())
    yield _BIG.format(cpu=found["rows"][0]["CPU s"])
    yield from _sections(found["rows"])
    yield _made(found["machine"])


def _sections(rows: Sequence[Mapping[str, Any]]) -> Iterable[str]:
    for section, group in groupby(rows, key=lambda row: row["section"]):
        yield f"### {section[0].upper()}{section[1:]}\n"
        yield _table([{k: v for k, v in row.items() if k != "section"} for row in group])


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    for row in rows:
        lines.append(f"| {' | '.join(_cell(row.get(name)) for name in columns)} |")
    return "\n".join(lines) + "\n"


def _cell(value: object) -> str:
    match value:
        case None:
            return ""
        case float() if abs(value) < 10:
            return f"{value:.3f}"
        case float():
            return f"{value:,.1f}"
        case int():
            return f"{value:,}"
        case _:
            return str(value)


def _made(machine: Mapping[str, Any]) -> str:
    return (
        f"Commit {machine['commit'][:12]}, {machine['measured_at'][:10]}, {machine['cpu']}, "
        f"{machine['cores']} cores.\n"
    )


if __name__ == "__main__":
    (RESULTS / PAGE).write_text(page(RESULTS))
