"""Streams of requests in virtual time: which model when, how large it is, what its load costs.

One frozen ``Workload`` a stream, deterministic by seed, in chunks of numpy arrays, so that a
million requests cost no memory worth mentioning. Shared by the cluster's simulator and
``one_cache``. Holds no policy and runs nothing. Models are numbers here; ``model_name`` gives the
id.

What a stream is for:

* ``zipf``: independent requests; popularity never changes. The best any order can do without
  knowing the future is to keep the most used.
* ``bursts``: a model is asked for many times at once, then not for long; recency is all.
* ``diurnal``: three parts of the world take turns over a day, and the rate follows the sun.
* ``scan``: Zipf, and now and then somebody asks for every model once (a health check, a backup).
* ``drift``: Zipf whose popular models are replaced one by one by others: the past misleads.
* ``turnover``: the same at once: from time to time the whole order of popularity is drawn anew.
* ``trace``: a file; the sample was written by ``bench/sim/traces/write_sample.py``.
"""

from __future__ import annotations

import csv
import gzip
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

DAY_MS: Final = 86_400_000
SAMPLE_TRACE: Final = Path(__file__).parent / "traces" / "sample.csv.gz"
CHUNK: Final = 8_192
MIB: Final = 1 << 20


class Chunk(NamedTuple):
    """Requests in order of time: virtual milliseconds from the start, and numbers of models."""

    at_ms: Ints
    model: Ints


Draw = Callable[[np.random.Generator], Iterator[Chunk]]


@dataclass(frozen=True)
class Workload:
    """``size_bytes[m]`` and ``load_ms[m]`` are model ``m``'s; ``requests(seed)`` is the stream."""

    name: str
    text: str  # one line for the reader of a table
    size_bytes: Ints
    load_ms: Ints
    request_count: int
    draw: Draw

    @property
    def model_count(self) -> int:
        return len(self.size_bytes)

    def requests(self, seed: int) -> Iterator[Chunk]:
        return self.draw(np.random.default_rng(seed))

    def all_requests(self, seed: int) -> Chunk:
        """The whole stream at once: what clairvoyant bounds need."""
        chunks = list(self.requests(seed))
        return Chunk(
            np.concatenate([chunk.at_ms for chunk in chunks]),
            np.concatenate([chunk.model for chunk in chunks]),
        )


def model_name(model: int) -> str:
    return f"model-{model}"


@dataclass(frozen=True)
class Shape:
    """What all made streams need. ``mixed`` draws sizes and load times, log-normal and correlated
    as artifacts are; else every model is one MiB and loads in one second."""

    models: int = 10_000
    requests: int = 200_000
    per_s: float = 50.0
    mixed: bool = False

    def sizes(self) -> tuple[Ints, Ints]:
        """Of the models, not of the stream: the same for every seed of it."""
        if not self.mixed:
            ones = np.ones(self.models, np.int64)
            return ones * MIB, ones * 1_000
        rng = np.random.default_rng(4711)
        # Median 8 MiB, 5 % above 110 MiB: adapters beside language models. A load has a part that
        # goes with the bytes (100 MB/s) and one that does not (building a session).
        mib = np.clip(rng.lognormal(np.log(8.0), 1.6, self.models), 0.1, 400.0)
        size_bytes = (mib * MIB).astype(np.int64)
        session_ms = rng.lognormal(np.log(150.0), 1.0, self.models)
        return size_bytes, (size_bytes / 1e5 + session_ms).astype(np.int64) + 1


def _workload(shape: Shape, name: str, text: str, draw: Draw) -> Workload:
    size_bytes, load_ms = shape.sizes()
    if shape.mixed:
        name, text = f"{name}-mixed", f"{text}; sizes and load times differ"
    return Workload(name, text, size_bytes, load_ms, shape.requests, draw)


class _Zipf:
    """Ranks drawn with probability proportional to ``1 / (rank + 1) ** exponent``."""

    def __init__(self, models: int, exponent: float) -> None:
        weights: Floats = 1.0 / np.arange(1, models + 1, dtype=np.float64) ** exponent
        self._cumulative: Floats = np.cumsum(weights) / weights.sum()

    def ranks(self, rng: np.random.Generator, count: int) -> Ints:
        drawn = np.searchsorted(self._cumulative, rng.random(count))
        return np.minimum(drawn, len(self._cumulative) - 1).astype(np.int64)


def _poisson(rng: np.random.Generator, start_ms: float, count: int, per_s: float) -> Floats:
    at_ms: Floats = start_ms + np.cumsum(rng.exponential(1_000.0 / per_s, count))
    return at_ms


def _steps(total: int, step: int = CHUNK) -> Iterator[int]:
    while total > 0:
        yield min(step, total)
        total -= step


def zipf(shape: Shape, exponent: float) -> Workload:
    def draw(rng: np.random.Generator) -> Iterator[Chunk]:
        law = _Zipf(shape.models, exponent)
        who = rng.permutation(shape.models)
        now_ms = 0.0
        for count in _steps(shape.requests):
            at_ms = _poisson(rng, now_ms, count, shape.per_s)
            now_ms = float(at_ms[-1])
            yield Chunk(at_ms.astype(np.int64), who[law.ranks(rng, count)])

    return _workload(shape, f"zipf-{exponent:g}", f"independent, Zipf {exponent:g}", draw)


def drift(shape: Shape, exponent: float = 0.9, life_requests: int = 50_000) -> Workload:
    """Each popular model (of the upper tenth of ranks) keeps its rank for ``life_requests`` of all
    requests on average, then any other model takes it."""

    def draw(rng: np.random.Generator) -> Iterator[Chunk]:
        law = _Zipf(shape.models, exponent)
        who = rng.permutation(shape.models)
        popular = max(1, shape.models // 10)
        now_ms = 0.0
        for count in _steps(shape.requests, min(CHUNK, max(1, life_requests // 100))):
            for rank in rng.integers(0, popular, rng.poisson(popular * count / life_requests)):
                other = rng.integers(0, shape.models)
                who[rank], who[other] = who[other], who[rank]
            at_ms = _poisson(rng, now_ms, count, shape.per_s)
            now_ms = float(at_ms[-1])
            yield Chunk(at_ms.astype(np.int64), who[law.ranks(rng, count)])

    text = f"Zipf {exponent:g}, a popular model is one for {life_requests} requests"
    return _workload(shape, f"drift-{life_requests // 1_000}k", text, draw)


def turnover(shape: Shape, exponent: float = 0.9, every_requests: int = 50_000) -> Workload:
    def draw(rng: np.random.Generator) -> Iterator[Chunk]:
        law = _Zipf(shape.models, exponent)
        now_ms = 0.0
        for era in _steps(shape.requests, every_requests):
            who = rng.permutation(shape.models)
            for count in _steps(era):
                at_ms = _poisson(rng, now_ms, count, shape.per_s)
                now_ms = float(at_ms[-1])
                yield Chunk(at_ms.astype(np.int64), who[law.ranks(rng, count)])

    text = f"Zipf {exponent:g}, popularity drawn anew every {every_requests} requests"
    return _workload(shape, f"turnover-{every_requests // 1_000}k", text, draw)


def bursts(
    shape: Shape, exponent: float = 0.7, burst_share: float = 0.6, burst_requests: int = 20
) -> Workload:
    """``burst_share`` of the requests come in bursts: about ``burst_requests`` for one model within
    a minute or so, the model any; the rest is Zipf."""

    def draw(rng: np.random.Generator) -> Iterator[Chunk]:
        law = _Zipf(shape.models, exponent)
        who = rng.permutation(shape.models)
        now_ms, left = 0.0, shape.requests
        carried: list[tuple[Floats, Ints]] = []  # of bursts that reach into the next chunk
        while left > 0:
            count = min(CHUNK, left)
            span_ms = count * 1_000.0 / shape.per_s
            starts = rng.poisson(count * burst_share / burst_requests)
            lengths = rng.poisson(burst_requests - 1, starts) + 1
            begin = np.repeat(now_ms + rng.random(starts) * span_ms, lengths)
            burst_at = begin + rng.exponential(30_000.0, len(begin))
            burst_model = np.repeat(rng.integers(0, shape.models, starts), lengths)
            calm = rng.poisson(count * (1.0 - burst_share))
            calm_at = now_ms + rng.random(calm) * span_ms
            carried += [(burst_at, burst_model), (calm_at, who[law.ranks(rng, calm)])]
            at_ms = np.concatenate([at for at, _ in carried])
            model = np.concatenate([which for _, which in carried])
            now_ms += span_ms
            due = at_ms < now_ms
            carried = [(at_ms[~due], model[~due])]
            order = np.argsort(at_ms[due], kind="stable")[:left]
            left -= len(order)
            yield Chunk(at_ms[due][order].astype(np.int64), model[due][order])

    text = f"{burst_share:.0%} in bursts of about {burst_requests} for one model, else Zipf"
    return _workload(shape, "bursts", text, draw)


def diurnal(shape: Shape, exponent: float = 0.9, days: float = 4.0) -> Workload:
    """Three parts of the world with models of their own, eight hours apart; a tenth of the traffic
    of each is there at night. ``shape.per_s`` is ignored: the requests fill ``days``."""

    def draw(rng: np.random.Generator) -> Iterator[Chunk]:
        parts = 3
        owned = shape.models // parts
        law = _Zipf(owned, exponent)
        who = rng.permutation(shape.models)
        slot_ms = DAY_MS // 96
        slots = max(1, int(days * 96))
        phase = 2 * np.pi * (np.arange(slots)[:, None] / 96 + np.arange(parts)[None, :] / parts)
        weight = np.maximum(0.05, (1.0 + np.sin(phase)) / 2) ** 2
        shares = (weight / weight.sum()).ravel()
        counts = rng.multinomial(shape.requests, shares).reshape(slots, parts)
        for slot in range(slots):
            total = int(counts[slot].sum())
            at_ms = np.sort(rng.random(total)) * slot_ms + slot * slot_ms
            part = np.repeat(np.arange(parts), counts[slot])
            rng.shuffle(part)
            model = who[law.ranks(rng, total) * parts + part]
            yield Chunk(at_ms.astype(np.int64), model)

    return _workload(shape, "diurnal", "three regions take turns over a day", draw)


def scan(shape: Shape, exponent: float = 0.9, every_requests: int = 40_000) -> Workload:
    """A scan asks for every model once, in order, as one request in three meanwhile."""

    def draw(rng: np.random.Generator) -> Iterator[Chunk]:
        law = _Zipf(shape.models, exponent)
        who = rng.permutation(shape.models)
        now_ms, made, scanned = 0.0, 0, shape.models
        for count in _steps(shape.requests):
            model = who[law.ranks(rng, count)]
            for at in range(count):
                if (made + at + 1) % every_requests == 0:
                    scanned = 0
                if scanned < shape.models and at % 3 == 0:
                    model[at] = scanned
                    scanned += 1
            made += count
            at_ms = _poisson(rng, now_ms, count, shape.per_s)
            now_ms = float(at_ms[-1])
            yield Chunk(at_ms.astype(np.int64), model)

    text = f"Zipf {exponent:g}, every {every_requests} requests a scan over all models"
    return _workload(shape, "scan", text, draw)


def trace(path: Path = SAMPLE_TRACE) -> Workload:
    """A recorded stream: CSV, gzip or plain, with the columns ``at_ms,model_id,size_bytes,load_ms``
    in order of time. ``size_bytes`` and ``load_ms`` stand where a model comes first, and may be
    empty after that. Raises ValueError that names the line."""
    content = path.read_bytes()
    if path.suffix == ".gz":
        content = gzip.decompress(content)
    text = io.StringIO(content.decode("utf-8"))
    at_ms, model, size_bytes, load_ms = _read_trace(text, path.name)

    def draw(rng: np.random.Generator) -> Iterator[Chunk]:
        for start in range(0, len(at_ms), CHUNK):
            yield Chunk(at_ms[start : start + CHUNK], model[start : start + CHUNK])

    name = path.name.removesuffix(".gz").removesuffix(".csv")
    return Workload(f"trace-{name}", f"{path.name}", size_bytes, load_ms, len(at_ms), draw)


def _read_trace(file: io.StringIO, name: str) -> tuple[Ints, Ints, Ints, Ints]:
    rows = csv.reader(file)
    head = next(rows, [])
    if head != ["at_ms", "model_id", "size_bytes", "load_ms"]:
        raise ValueError(f"{name}: the first line must be at_ms,model_id,size_bytes,load_ms")
    numbers: dict[str, int] = {}
    at_ms: list[int] = []
    model: list[int] = []
    sizes: list[int] = []
    loads: list[int] = []
    for row in rows:
        try:
            at, model_id, size, load = row
            number = numbers.get(model_id)
            if number is None:
                number = numbers[model_id] = len(numbers)
                sizes.append(int(size))
                loads.append(int(load))
            at_ms.append(int(at))
            model.append(number)
        except ValueError as error:
            raise ValueError(f"{name}, line {rows.line_num}: {error}: {row}") from error
        if len(at_ms) > 1 and at_ms[-1] < at_ms[-2]:
            raise ValueError(f"{name}, line {rows.line_num}: goes back in time")
    return (
        np.array(at_ms, np.int64),
        np.array(model, np.int64),
        np.array(sizes, np.int64),
        np.array(loads, np.int64),
    )
