"""Writes ``sample.csv.gz``: a real-shaped synthetic trace of three days. Not a recording.

What it takes from recordings of model servers: sessions (somebody works with a model for some
minutes and comes back), a daily cycle, a heavy tail of popularity, batch jobs that go over many
models at night, and new models that appear, are tried at once, and mostly forgotten.

    python -m bench.sim.traces.write_sample
"""

from __future__ import annotations

import csv
import gzip
import io
from pathlib import Path
from typing import Final

import numpy as np

MODELS: Final = 3_000
NEW_SHARE: Final = 0.25  # of the models appear while the trace runs
REQUESTS: Final = 45_000
DAY_MS: Final = 86_400_000
DAYS: Final = 3


def sample(seed: int = 20) -> list[tuple[int, int]]:
    """(at_ms, model) in order of time."""
    rng = np.random.default_rng(seed)
    popularity = rng.permutation(1.0 / np.arange(1, MODELS + 1) ** 0.95)
    born_ms = np.where(rng.random(MODELS) < NEW_SHARE, rng.random(MODELS) * DAYS * DAY_MS, 0.0)
    tried_ms = 6 * 3_600_000
    made: list[tuple[int, int]] = []
    while len(made) < REQUESTS:
        start_ms = rng.random() * DAYS * DAY_MS
        day_share = (start_ms % DAY_MS) / DAY_MS
        if rng.random() > 0.15 + 0.85 * np.sin(np.pi * day_share) ** 2:
            continue  # fewer people at night
        age_ms = start_ms - born_ms
        weight = np.where(age_ms >= 0, popularity, 0.0)
        weight[(born_ms > 0) & (age_ms >= 0) & (age_ms < tried_ms)] += 0.002  # everybody tries it
        model = int(rng.choice(MODELS, p=weight / weight.sum()))
        length = int(min(200, rng.pareto(1.3) * 2 + 1))
        at_ms = start_ms + np.cumsum(rng.exponential(20_000.0, length))
        made += [(int(at), model) for at in at_ms]
    for day in range(DAYS):  # the nightly batch: a third of what exists, once each
        start_ms = day * DAY_MS + 2 * 3_600_000
        exists = np.flatnonzero(born_ms <= start_ms)
        for step, model in enumerate(rng.permutation(exists)[: len(exists) // 3]):
            made.append((start_ms + step * 2_000, int(model)))
    return sorted(made)


def write(path: Path) -> None:
    rng = np.random.default_rng(21)
    mib = np.clip(rng.lognormal(np.log(20.0), 1.3, MODELS), 0.5, 400.0)
    size_bytes = (mib * 2**20).astype(int)
    load_ms = (size_bytes / 1e5 + rng.lognormal(np.log(150.0), 0.8, MODELS)).astype(int)
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["at_ms", "model_id", "size_bytes", "load_ms"])
    seen: set[int] = set()
    for at_ms, model in sample():
        first = model not in seen
        seen.add(model)
        terms = [int(size_bytes[model]), int(load_ms[model])] if first else ["", ""]
        rows.writerow([at_ms, f"m{model}", *terms])
    with path.open("wb") as raw, gzip.GzipFile("", "wb", 9, raw, mtime=0) as packed:
        packed.write(text.getvalue().encode())


if __name__ == "__main__":
    write(Path(__file__).parent / "sample.csv.gz")
