"""A framework's own call with 1 row and with many, in a loop: what rows at once gain.

``python -m bench.bare_rows KIND MODEL WIDTH SECONDS`` prints ``{"1": us, "64": us}``: CPU time of
one row. No protocol, no socket.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ROWS = (1, 64)


def _onnx(path: Path) -> Callable[[Any], Any]:
    from bench.bare_loop import open_session

    session = open_session(path.read_bytes())
    return lambda rows: session.run(None, {"x": rows})


def _sklearn(path: Path) -> Callable[[Any], Any]:
    import skops.io

    estimator = skops.io.load(path)
    answer: Callable[[Any], Any] = estimator.predict
    return answer


_OPENED = {"onnx": (_onnx, np.float32), "sklearn": (_sklearn, np.float64)}


def row_us(kind: str, path: Path, width: int, seconds: float) -> dict[int, float]:
    """Microseconds of processor time for one row, by rows in a call."""
    open_, dtype = _OPENED[kind]
    answer = open_(path)
    found = {}
    for rows in ROWS:
        batch = np.random.default_rng(rows).random((rows, width)).astype(dtype)
        answer(batch)
        calls, started_s = 0, time.process_time()
        until_s = time.perf_counter() + seconds / len(ROWS)
        while time.perf_counter() < until_s:
            answer(batch)
            calls += 1
        found[rows] = (time.process_time() - started_s) / calls / rows * 1e6
    return found


if __name__ == "__main__":
    model_kind, model_file, model_width, length = sys.argv[1:]
    json.dump(row_us(model_kind, Path(model_file), int(model_width), float(length)), sys.stdout)
