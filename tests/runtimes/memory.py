"""What a process holds after a model was loaded and unloaded many times.

``memory_after(...)`` runs in a process of its own: the framework's import and the first model, then
50 times load, infer, unload. A test that asserts ``growth < 1.1`` says something only where 50
leaked models would show: see that ``Memory.would_show`` is true, or take a larger model.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
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
    return model.size_bytes

def resident_bytes():
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) * 1024

for _ in range(3):  # the framework's import, and what it makes once
    size_bytes = once()
before = resident_bytes()
for _ in range(int(rounds)):
    once()
found = {"before_bytes": before, "after_bytes": resident_bytes(), "model_bytes": size_bytes}
json.dump(found, sys.stdout)
"""


@dataclass(frozen=True, slots=True)
class Memory:
    """Resident bytes after the first models and after 50 more; what one model says it takes."""

    before_bytes: int
    after_bytes: int
    model_bytes: int

    @property
    def growth(self) -> float:
        return self.after_bytes / self.before_bytes

    @property
    def would_show(self) -> bool:
        """Whether a leak of half of each model would be more than the 10 % that is allowed."""
        return ROUNDS * self.model_bytes / 2 > 0.1 * self.before_bytes


def growth_of(model_type: str, path: Path, inputs: np.ndarray, tmp_path: Path) -> float:
    """Resident memory after 50 loads, inferences and unloads, over that after the first."""
    return memory_after(model_type, path, inputs, tmp_path).growth


def memory_after(model_type: str, path: Path, inputs: np.ndarray, tmp_path: Path) -> Memory:
    """``inputs`` go in under the model's first input's name, or any where it has none."""
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
    return Memory(**json.loads(done.stdout))
