"""One cache on its own: which eviction order leaves least on the table.

The production ``Cache.handle`` and its orders, driven by ``bench.sim.workloads`` with a pod that
obeys at once, beside baselines and the clairvoyant bound. Everything is judged after the first
quarter of the stream, when the caches are warm. Two measures: the share of requests that find a
copy, and the share of load time saved, which is what counts where models differ.

    python -m bench.sim.one_cache [--quick] [--json FILE]

Bounds. Models of one size: Belady's order (the copy whose next use is furthest goes, the one just
asked for stays), exact. Models that differ: the flow relaxation of Berger et al. (PFOO-L, 2018):
every interval between two uses of a model saves its load time and takes its bytes for its length;
the best of them are taken until the memory of the whole time is used up. No order can save more.
"""

from __future__ import annotations

import argparse
import heapq
import json
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from bench.report import machine, table
from bench.sim import workloads
from bench.sim.workloads import Chunk, Shape, Workload, model_name
from mesh.core.cache import Cache
from mesh.core.cache_check import validate
from mesh.core.cache_events import (
    LoadFinished,
    LoadWanted,
    SizePredicted,
    StartUnload,
    UnloadFinished,
)
from mesh.core.cache_table import CacheConfig, Copy
from mesh.core.eviction import ORDERS
from mesh.core.policy import Policy

WARM_SHARE: Final = 0.25
ROOM_SHARE: Final = 0.05  # of all models' bytes: 500 of 10,000
VALIDATE_EVERY: Final = 20_000
START_MS: Final = 1_700_000_000_000
SHIPPED: Final = Policy().eviction_order


@dataclass(frozen=True, slots=True)
class Result:
    """``hit_ratio`` of requests, ``saved`` of load time; both of the warm part."""

    hit_ratio: float
    saved: float
    loads: int
    seconds: float = 0.0


class Score:
    """Counts what the warm part costs."""

    def __init__(self, workload: Workload) -> None:
        self._load_ms = workload.load_ms.tolist()
        self._from = int(workload.request_count * WARM_SHARE)
        self._seen = self._requests = self._hits = 0
        self._cost_ms = self._all_ms = 0

    def count(self, model: int, hit: bool) -> None:
        self._seen += 1
        if self._seen <= self._from:
            return
        self._requests += 1
        self._hits += hit
        self._all_ms += self._load_ms[model]
        if not hit:
            self._cost_ms += self._load_ms[model]

    def result(self, seconds: float = 0.0) -> Result:
        requests = max(1, self._requests)
        return Result(
            hit_ratio=self._hits / requests,
            saved=1.0 - self._cost_ms / max(1, self._all_ms),
            loads=self._requests - self._hits,
            seconds=seconds,
        )


# ---- the production cache -----------------------------------------------------------------------


def production(workload: Workload, stream: Chunk, room_bytes: int, order: str) -> Result:
    """Loads and unloads take no time here: an order is judged, not the queue in front of it."""
    policy = Policy(eviction_order=order, load_slots=1, first_use_grace_ms=0)
    config = CacheConfig.from_policy(policy, room_bytes)
    cache = Cache(CacheConfig(**{**_fields(config), "unload_buffer_bytes": 0}))
    score = Score(workload)
    size_bytes, load_ms = workload.size_bytes.tolist(), workload.load_ms.tolist()
    started = time.perf_counter()
    models, instants = stream.model.tolist(), (stream.at_ms + START_MS).tolist()
    for number, (model, now_ms) in enumerate(zip(models, instants, strict=True)):
        name = model_name(model)
        copy = cache.get(name)
        score.count(model, copy is not None)
        if copy is None:
            if size_bytes[model] > room_bytes:
                continue
            copy = _load(cache, name, size_bytes[model], load_ms[model], now_ms)
        copy.use.last_used_at_ms = now_ms
        copy.use.uses += 1
        if number % VALIDATE_EVERY == 0:
            validate(cache)
    validate(cache)
    return score.result(time.perf_counter() - started)


def _fields(config: CacheConfig) -> dict[str, Any]:
    return asdict(config)


def _load(cache: Cache, name: str, size_bytes: int, load_ms: int, now_ms: int) -> Copy:
    out = cache.handle(LoadWanted(name, size_bytes, 60_000, now_ms), now_ms)
    while any(isinstance(instruction, StartUnload) for instruction in out):
        out = tuple(
            after
            for instruction in out
            if isinstance(instruction, StartUnload)
            for after in cache.handle(UnloadFinished(instruction.model_id), now_ms)
        )
    cache.handle(SizePredicted(name, size_bytes), now_ms)
    cache.handle(LoadFinished(name, size_bytes, load_ms), now_ms)
    copy = cache.get(name)
    assert copy is not None
    return copy


# ---- baselines ----------------------------------------------------------------------------------

Victim = Callable[[list[int], int], int]  # (models inside, the one asked for) -> who goes


def at_random(workload: Workload, stream: Chunk, room_bytes: int) -> Result:
    rng = np.random.default_rng(1)
    size_bytes = workload.size_bytes.tolist()
    place: dict[int, int] = {}
    inside: list[int] = []
    used, score = 0, Score(workload)
    for model in stream.model.tolist():
        score.count(model, model in place)
        if model in place or size_bytes[model] > room_bytes:
            continue
        used += size_bytes[model]
        while used > room_bytes:
            at = int(rng.integers(len(inside)))
            used -= size_bytes[inside[at]]
            last = inside.pop()
            gone = last if at == len(inside) else inside[at]
            if gone is not last:
                inside[at], place[last] = last, at
            del place[gone]
        place[model] = len(inside)
        inside.append(model)
    return score.result()


def plain_lfu(workload: Workload, stream: Chunk, room_bytes: int) -> Result:
    """All uses count for ever, of those evicted too; the fewest go first."""
    size_bytes = workload.size_bytes.tolist()
    uses = [0] * workload.model_count
    heap: list[tuple[int, int]] = []
    inside: set[int] = set()
    used, score = 0, Score(workload)
    for model in stream.model.tolist():
        score.count(model, model in inside)
        uses[model] += 1
        if model in inside or size_bytes[model] > room_bytes:
            continue
        used += size_bytes[model]
        while used > room_bytes:
            counted, oldest = heapq.heappop(heap)
            if counted != uses[oldest]:
                heapq.heappush(heap, (uses[oldest], oldest))
                continue
            inside.discard(oldest)
            used -= size_bytes[oldest]
        inside.add(model)
        heapq.heappush(heap, (uses[model], model))
    return score.result()


def best_fixed_set(workload: Workload, stream: Chunk, room_bytes: int) -> Result:
    """The set that saves most in the warm part, chosen with hindsight (greedily by load time saved
    per byte) and never changed."""
    warm = stream.model[int(len(stream.model) * WARM_SHARE) :]
    uses = np.bincount(warm, minlength=workload.model_count)
    worth = uses * workload.load_ms / workload.size_bytes
    order = np.argsort(-worth, kind="stable")
    inside = order[np.cumsum(workload.size_bytes[order]) <= room_bytes]
    hits = uses[inside].sum()
    saved = (uses * workload.load_ms)[inside].sum() / (uses * workload.load_ms).sum()
    return Result(float(hits / uses.sum()), float(saved), int(uses.sum() - hits))


def clairvoyant(workload: Workload, stream: Chunk, room_bytes: int) -> Result:
    if (workload.size_bytes == workload.size_bytes[0]).all():
        return _belady(workload, stream, room_bytes // int(workload.size_bytes[0]))
    return _flow_bound(workload, stream, room_bytes)


def _next_use(models: np.ndarray[Any, np.dtype[np.int64]], model_count: int) -> list[int]:
    after = [len(models)] * model_count
    following = [0] * len(models)
    for at in range(len(models) - 1, -1, -1):
        model = int(models[at])
        following[at] = after[model]
        after[model] = at
    return following


def _belady(workload: Workload, stream: Chunk, room: int) -> Result:
    following = _next_use(stream.model, workload.model_count)
    due: dict[int, int] = {}  # of the models inside
    heap: list[tuple[int, int]] = []
    score = Score(workload)
    for at, model in enumerate(stream.model.tolist()):
        hit = model in due
        score.count(model, hit)
        while not hit and len(due) >= room:
            when, furthest = heapq.heappop(heap)
            if due.get(furthest) == -when:
                del due[furthest]
        due[model] = following[at]
        heapq.heappush(heap, (-following[at], model))
    return score.result()


def _flow_bound(workload: Workload, stream: Chunk, room_bytes: int) -> Result:
    """An upper bound on what can be saved; its hit ratio is that of the choice, for orientation."""
    count = len(stream.model)
    first = int(count * WARM_SHARE)
    following = np.array(_next_use(stream.model, workload.model_count), np.int64)
    start = np.arange(count)
    warm = (following < count) & (following >= first)
    model = stream.model[warm]
    # Of an interval that begins before the warm part only what lies in it takes memory of it.
    length = following[warm] - np.maximum(start[warm], first)
    takes = workload.size_bytes[model].astype(np.float64) * length
    saves = workload.load_ms[model].astype(np.float64)
    order = np.argsort(-saves / np.maximum(takes, 1.0), kind="stable")
    budget = float(room_bytes) * (count - first)
    used = np.cumsum(takes[order])
    full = int(np.searchsorted(used, budget, side="right"))
    saved = float(saves[order][:full].sum())
    if full < len(order):
        before = float(used[full - 1]) if full else 0.0
        saved += float(saves[order][full] * (budget - before) / takes[order][full])
    everything = float(workload.load_ms[stream.model[first:]].sum())
    return Result(full / (count - first), saved / everything, count - first - full)


# ---- tables -------------------------------------------------------------------------------------


def usual(requests: int = 200_000) -> list[Workload]:
    same = Shape(requests=requests)
    mixed = Shape(requests=requests, mixed=True)
    return [
        workloads.zipf(same, 0.7),
        workloads.zipf(same, 0.9),
        workloads.zipf(same, 1.1),
        workloads.drift(same),
        workloads.drift(same, life_requests=10_000),
        workloads.turnover(same),
        workloads.bursts(same),
        workloads.diurnal(same),
        workloads.scan(same),
        workloads.zipf(mixed, 0.7),
        workloads.zipf(mixed, 0.9),
        workloads.zipf(mixed, 1.1),
        workloads.drift(mixed),
        workloads.bursts(mixed),
        workloads.diurnal(mixed),
        workloads.scan(mixed),
        workloads.trace(),
    ]


def measure(workload: Workload, seed: int) -> dict[str, Result]:
    stream = workload.all_requests(seed)
    room_bytes = int(workload.size_bytes.sum() * ROOM_SHARE)
    found = {
        "random": at_random(workload, stream, room_bytes),
        "plain LFU": plain_lfu(workload, stream, room_bytes),
        "best fixed set": best_fixed_set(workload, stream, room_bytes),
    }
    for order in ORDERS:
        found[order] = production(workload, stream, room_bytes, order)
    found["clairvoyant bound"] = clairvoyant(workload, stream, room_bytes)
    return found


def differs(workload: Workload) -> bool:
    return bool((workload.size_bytes != workload.size_bytes[0]).any())


def gap_closed(found: dict[str, Result], order: str) -> float:
    """Share of the way from LRU to the bound, in load time saved (hits, where models are equal)."""
    lru, bound = found["lru"].saved, found["clairvoyant bound"].saved
    return (found[order].saved - lru) / (bound - lru) if bound > lru else 0.0


def rows(found: dict[str, Result]) -> list[dict[str, Any]]:
    return [
        {
            "order": f"{name} (shipped)" if name == SHIPPED else name,
            "hit_ratio": round(result.hit_ratio, 4),
            "load_time_saved": round(result.saved, 4),
            "gap_closed": round(gap_closed(found, name), 3),
            "loads": result.loads,
        }
        for name, result in found.items()
    ]


def text(workload: Workload, found: dict[str, Result]) -> str:
    lines = [
        [
            row["order"],
            f"{row['hit_ratio']:.3f}",
            f"{row['load_time_saved']:.3f}",
            f"{row['gap_closed']:+.0%}",
            f"{row['loads']:,}",
        ]
        for row in rows(found)
    ]
    heads = ["order", "hits", "load time saved", "LRU to bound", "loads"]
    title = f"{workload.name}: {workload.text}; {workload.request_count:,} requests"
    return f"{title}\n{table(heads, lines)}\n"


@dataclass(frozen=True, slots=True)
class Claim:
    """What the shipped order must do on one workload, and what it did."""

    workload: str
    claim: str
    value: float
    target: float

    @property
    def reached(self) -> bool:
        return self.value >= self.target


def claims(workload: Workload, found: dict[str, Result]) -> Iterable[Claim]:
    shipped, lru, name = found[SHIPPED], found["lru"], workload.name
    if differs(workload):
        yield Claim(name, "load time saved beyond LRU's", shipped.saved - lru.saved, 0.0)
    elif name.startswith("zipf"):
        yield Claim(name, "gap from LRU to the bound closed", gap_closed(found, SHIPPED), 0.5)
    else:
        yield Claim(name, "hit ratio beyond LRU's", shipped.hit_ratio - lru.hit_ratio, -0.01)


def _measure_numbered(job: tuple[int, int, int]) -> dict[str, Result]:
    number, requests, seed = job
    return measure(usual(requests)[number], seed)


def measure_all(requests: int, seed: int) -> dict[str, Any]:
    """Prints a table a workload; returns what goes into the JSON."""
    made = usual(requests)
    started = time.perf_counter()
    found_claims: list[Claim] = []
    sections: list[dict[str, Any]] = []
    with ProcessPoolExecutor(max_workers=2) as pool:
        jobs = [(number, requests, seed) for number in range(len(made))]
        for workload, found in zip(made, pool.map(_measure_numbered, jobs), strict=True):
            print(text(workload, found), flush=True)
            found_claims += claims(workload, found)
            sections.append(
                {"workload": workload.name, "text": workload.text, "orders": rows(found)}
            )
    lines = [
        [
            claim.workload,
            claim.claim,
            f"{claim.value:+.3f}",
            f"{claim.target:+.2f}",
            "yes" if claim.reached else "NO",
        ]
        for claim in found_claims
    ]
    print(table(["workload", f"{SHIPPED} against LRU", "value", "at least", "reached"], lines))
    return {
        "benchmark": "sim-eviction",
        "machine": {**machine(), "command": "python -m bench.sim.one_cache"},
        "room_share": ROOM_SHARE,
        "warm_share": WARM_SHARE,
        "requests": requests,
        "seed": seed,
        "shipped": SHIPPED,
        "workloads": sections,
        "claims": [{**asdict(claim), "reached": claim.reached} for claim in found_claims],
        "took_s": round(time.perf_counter() - started, 1),
    }


def main() -> None:
    options = argparse.ArgumentParser(prog="python -m bench.sim.one_cache", description=__doc__)
    options.formatter_class = argparse.RawDescriptionHelpFormatter
    options.add_argument("--quick", action="store_true", help="a fifth of the requests")
    options.add_argument("--seed", type=int, default=1)
    options.add_argument("--json", type=Path, help="write the figures there")
    chosen = options.parse_args()
    content = measure_all(40_000 if chosen.quick else 200_000, chosen.seed)
    if chosen.json:
        chosen.json.write_text(json.dumps(content, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
