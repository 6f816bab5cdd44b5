"""Loading and unloading 50 times leaves the process as large as it was, within 10 %.

The models are large enough that leaking them would show; the framework's import and the first model
come before the count.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import lightgbm
import numpy as np
import pytest
import skops.io
import xgboost
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier

from mesh.runtimes.api import ModelSpec
from mesh.runtimes.registry import RuntimeRegistry

from .memory import memory_after
from .models import matmul

X, Y = load_digits(return_X_y=True)


def onnx_model(folder: Path) -> np.ndarray:
    matmul(folder / "model.onnx", 512, 1024)
    return np.ones((1, 512), np.float32)


def sklearn_model(folder: Path) -> np.ndarray:
    wide = np.vstack((X, X, X))  # as large as the data that it is made of
    neighbors = KNeighborsClassifier(algorithm="brute").fit(wide, np.hstack((Y, Y, Y)))
    skops.io.dump(neighbors, folder / "model.skops")
    return X[:4]


def xgboost_model(folder: Path) -> np.ndarray:
    parameters = {"objective": "multi:softprob", "num_class": 10, "nthread": 1}
    booster = xgboost.train(parameters, xgboost.DMatrix(X, Y), 20)
    booster.save_model(folder / "model.ubj")
    return X[:4]


def lightgbm_model(folder: Path) -> np.ndarray:
    parameters = {"objective": "multiclass", "num_class": 10, "verbosity": -1, "num_threads": 1}
    lightgbm.train(parameters, lightgbm.Dataset(X, Y), 20).save_model(folder / "model.txt")
    return X[:4]


MODELS = {
    "onnx": onnx_model,
    "sklearn": sklearn_model,
    "xgboost": xgboost_model,
    "lightgbm": lightgbm_model,
}


@pytest.mark.parametrize(("name", "make"), MODELS.items(), ids=MODELS)
def test_fifty_loads_and_unloads_leave_the_process_as_large_as_it_was(
    name: str, make: Callable[[Path], np.ndarray], tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    memory = memory_after(name, folder, make(folder), tmp_path)
    assert memory.would_show
    assert memory.growth < 1.1


@pytest.mark.parametrize(("name", "make"), MODELS.items(), ids=MODELS)
def test_sizes_are_at_least_the_content_and_not_absurd(
    name: str, make: Callable[[Path], np.ndarray], tmp_path: Path
) -> None:
    make(tmp_path)
    (file,) = tmp_path.iterdir()
    runtime = RuntimeRegistry().runtime_for(name)
    spec = ModelSpec("m", name, tmp_path)
    model = runtime.load(spec)
    on_disk = file.stat().st_size
    assert on_disk * 0.9 <= model.size_bytes <= 2 * runtime.predict_size_bytes(spec)
    assert on_disk <= runtime.predict_size_bytes(spec) <= 8 * on_disk + 1_000_000
    model.unload()
