"""What a process holds after a model was loaded and unloaded many times."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
ROUNDS = 50

# Settles the heap, so that what is counted is held and not merely not given back yet.
_SCRIPT = """
import ctypes, gc, json, sys
from pathlib import Path
import numpy as np
from mesh.runtimes.api import ModelSpec
from mesh.runtimes.registry import RuntimeRegistry, RuntimeSettings

model_type, path, array, rounds = sys.argv[1:]
runtime = RuntimeRegistry(RuntimeSettings(allow_pickle=True, allow_python=True)).runtime_for("")
inputs = np.load(array)

def once():
    model = runtime.load(ModelSpec("m", model_type, Path(path)))
    specs = model.metadata.inputs
    model.infer({specs[0].name if specs else "x": inputs}, (), {})
    model.unload()

def resident_bytes():
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) * 1024

for _ in range(3):  # the framework's import, and what it makes once
    once()
before = resident_bytes()
for _ in range(int(rounds)):
    once()
json.dump({"before": before, "after": resident_bytes()}, sys.stdout)
"""


def growth_of(model_type: str, path: Path, inputs: np.ndarray, tmp_path: Path) -> float:
    """Resident memory after 50 loads, inferences and unloads, over that after the first."""
    array = tmp_path / "inputs.npy"
    np.save(array, inputs)
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT, model_type, str(path), str(array), str(ROUNDS)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"},
    )
    assert done.returncode == 0, done.stderr[-2_000:]
    found = json.loads(done.stdout)
    return found["after"] / found["before"]
