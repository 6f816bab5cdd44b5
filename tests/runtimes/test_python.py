"""Custom models: a folder with a model.py."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from mesh.core.errors import Code, Internal, InvalidArgument, LoadFailed
from mesh.runtimes.api import LoadedModel, ModelOptions, ModelSpec, TensorSpec
from mesh.runtimes.registry import RuntimeRegistry, RuntimeSettings

from .memory import growth_of

ALLOWED = RuntimeRegistry(RuntimeSettings(allow_python=True)).format_runtime("python")
DOUBLES = """
class Model:
    inputs = [("x", "FP32", [-1, 2])]
    outputs = [("y", "FP32", [-1, 2])]

    def load(self, path, parameters):
        self.factor = float(parameters.get("factor", "2"))

    def predict(self, inputs, parameters):
        return {"y": inputs["x"] * self.factor}
"""


def write(folder: Path, code: str, **files: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.py").write_text(code)
    for name, content in files.items():
        (folder / f"{name}.py").write_text(content)
    return folder


def load(path: Path, **options: object) -> LoadedModel:
    return ALLOWED.load(ModelSpec("m", "python", path, options=ModelOptions(**options)))


def predicts(body: str) -> str:
    return f"class Model:\n    def predict(self, inputs):\n        {body}\n"


def test_it_loads_with_its_parameters_and_predicts(tmp_path: Path) -> None:
    model = load(write(tmp_path, DOUBLES), parameters={"factor": "3"})
    assert model.metadata.inputs == (TensorSpec("x", "FP32", (-1, 2)),)
    (answer,) = model.infer({"x": np.ones((1, 2), np.float32)}, (), {})
    assert (answer.name, answer.datatype, answer.data.tolist()) == ("y", "FP32", [[3.0, 3.0]])
    assert model.size_bytes > 0


def test_it_is_refused_unless_the_operator_allows_it(tmp_path: Path) -> None:
    runtime = RuntimeRegistry().runtime_for("python")
    with pytest.raises(LoadFailed, match=r"--allow-python .*ServingRuntime") as caught:
        runtime.load(ModelSpec("m", "python", write(tmp_path, "raise SystemExit(3)")))
    assert caught.value.code is Code.FAILED_PRECONDITION


def test_two_models_with_files_of_one_name_do_not_meet(tmp_path: Path) -> None:
    code = "from .other import K\n" + predicts("return {'y': inputs['x'] * K}")
    models = [
        load(write(tmp_path / str(factor), code, other=f"K = {factor}\n")) for factor in (2, 5)
    ]
    assert [m.infer({"x": np.ones(1)}, (), {})[0].data[0] for m in models] == [2.0, 5.0]


def test_its_modules_go_with_it(tmp_path: Path) -> None:
    before = set(sys.modules)
    model = load(write(tmp_path, DOUBLES))
    assert set(sys.modules) - before
    model.unload()
    assert not set(sys.modules) - before


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("def f(:\n", r"cannot be imported: SyntaxError.*model.py:1"),
        ("import surely_not_here\n", r"No module named 'surely_not_here' \(model.py:1\)"),
        ("raise SystemExit(3)\n", "cannot be imported: SystemExit"),
        ("x = 1\n", "found none"),
        ("class A: pass\nclass B: pass\n", "found A, B"),
        ("class A: pass\n", "has no method predict"),
        ("class Model:\n    def __init__(self):\n        1/0\n    predict = 1\n", "no method"),
        (predicts("pass") + "    def load(self, p):\n        1/0\n", r"division.*model.py:5"),
        (predicts("pass") + "    inputs = [('x', 'FLOAT', [1])]\n", "inputs of model.py must be"),
    ],
)
def test_what_is_wrong_with_its_code_is_said_with_its_line(
    code: str, words: str, tmp_path: Path
) -> None:
    with pytest.raises(LoadFailed, match=words):
        load(write(tmp_path, code))


@pytest.mark.parametrize(
    ("body", "kind", "words"),
    [
        ("raise ValueError('two rows at least')", InvalidArgument, "two rows at least"),
        ("raise KeyError('x')", Internal, r"KeyError.*model.py:3"),
        ("return [1, 2]", Internal, "must return a dict .* returned a list"),
        ("return {'y': 1j}", Internal, "array of complex128"),
    ],
)
def test_what_goes_wrong_in_it_is_told(body: str, kind, words: str, tmp_path: Path) -> None:
    with pytest.raises(kind, match=words):
        load(write(tmp_path, predicts(body))).infer({"x": np.ones(1)}, (), {})


def test_text_comes_back_as_bytes(tmp_path: Path) -> None:
    model = load(write(tmp_path, predicts("return {'y': ['a', 'b']}")))
    (answer,) = model.infer({"x": np.ones(1)}, (), {})
    assert (answer.datatype, answer.data.tolist()) == ("BYTES", [b"a", b"b"])


def test_a_folder_without_the_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LoadFailed, match=r"no model.py"):
        load(tmp_path)


def test_its_memory_comes_back(tmp_path: Path) -> None:
    path = write(tmp_path / "m", DOUBLES)
    assert growth_of("python", path, np.ones((1, 2), np.float32), tmp_path) < 1.1
