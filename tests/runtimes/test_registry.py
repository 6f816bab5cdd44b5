"""A format's runtime is made when first needed, once, or the error says what to install."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import skops.io
from sklearn.linear_model import Ridge

from mesh.core.errors import Code, LoadFailed
from mesh.runtimes.registry import SOURCES, RuntimeRegistry, RuntimeSettings, RuntimeSource

from .models import matmul, spec


def test_each_format_has_one_runtime_that_answers_to_its_name() -> None:
    registry = RuntimeRegistry()
    for name in SOURCES:
        runtime = registry.format_runtime(name)
        assert name in runtime.model_types
        assert registry.format_runtime(name) is runtime


def test_other_names_of_formats_are_known_too() -> None:
    known = RuntimeRegistry().model_types
    assert {"onnx", "sklearn", "keras", "litert", "triton", "mlserver", "auto"} <= set(known)


def test_an_unknown_format_lists_the_known_ones() -> None:
    registry = RuntimeRegistry(sources={"onnx": SOURCES["onnx"], "sklearn": SOURCES["sklearn"]})
    with pytest.raises(LoadFailed, match=r"'pmml'; known are onnx, sklearn") as caught:
        registry.format_runtime("pmml")
    assert caught.value.code is Code.FAILED_PRECONDITION


def test_a_missing_framework_names_the_extra() -> None:
    source = RuntimeSource(lambda settings, heap: None, ("surely_not_here",), extra="surely")
    registry = RuntimeRegistry(sources={"f": source})
    with pytest.raises(LoadFailed, match=r"surely_not_here.*pip install 'modelmesh-py\[surely\]'"):
        registry.format_runtime("f")


def test_settings_reach_the_runtime(tmp_path: Path) -> None:
    (tmp_path / "model.joblib").write_bytes(b"garbage")
    allowed = RuntimeRegistry(RuntimeSettings(allow_pickle=True))
    with pytest.raises(LoadFailed, match="cannot be loaded"):
        allowed.runtime_for("sklearn").load(spec(tmp_path, "sklearn"))


def test_frameworks_are_imported_by_the_first_load_only(tmp_path: Path) -> None:
    path, skops_path = matmul(tmp_path / "model.onnx"), tmp_path / "model.skops"
    skops.io.dump(Ridge().fit([[0.0], [1.0]], [0.0, 1.0]), skops_path)
    code = f"""
import sys
from pathlib import Path
from mesh.runtimes.api import ModelSpec
from mesh.runtimes.registry import RuntimeRegistry
registry = RuntimeRegistry()
for model_type in registry.model_types:
    registry.runtime_for(model_type)
assert not {{"onnxruntime", "sklearn", "skops", "joblib"}} & set(sys.modules)
registry.runtime_for("onnx").load(ModelSpec("m", "onnx", Path({str(path)!r})))
assert "onnxruntime" in sys.modules and "sklearn" not in sys.modules
registry.runtime_for("sklearn").load(ModelSpec("s", "sklearn", Path({str(skops_path)!r})))
assert "skops.io" in sys.modules and "torch" not in sys.modules
"""
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
