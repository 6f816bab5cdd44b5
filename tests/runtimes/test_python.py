"""Custom models: a folder with a model.py."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from mesh.core.errors import (
    Code,
    Internal,
    InvalidArgument,
    LoadFailed,
    ResourceExhausted,
    Unavailable,
)
from mesh.runtimes.api import LoadedModel, ModelOptions, ModelSpec, TensorSpec
from mesh.runtimes.native_memory import NativeHeap
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
        (predicts("pass") + "    inputs = [('x', 'FP32', [-2])]\n", "inputs of model.py must be"),
        (predicts("pass") + "    outputs = [('y', 'FP32', [1])] * 2\n", "outputs of model.py must"),
        (predicts("pass") + "    inputs = property(lambda s: 1 / 0)\n", "inputs of model.py must"),
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
        ("return None", Internal, "must return a dict .* returned a NoneType"),
        ("return {1: inputs['x']}", Internal, "must return a dict"),
        ("return {'y': [[1], [1, 2]]}", Internal, "'y' is a list that makes no array"),
        ("return {'y': ['a', None]}", Internal, "element 1 is a NoneType, neither str nor bytes"),
        ("raise SystemExit(3)", Internal, r"SystemExit: 3 \(model.py:3\)"),
        ("raise MemoryError()", ResourceExhausted, "out of memory in predict"),
        ("return self.predict(inputs)", Internal, "RecursionError"),
    ],
)
def test_what_goes_wrong_in_it_is_told(body: str, kind, words: str, tmp_path: Path) -> None:
    with pytest.raises(kind, match=words):
        load(write(tmp_path, predicts(body))).infer({"x": np.ones(1)}, (), {})


def test_text_comes_back_as_bytes(tmp_path: Path) -> None:
    model = load(write(tmp_path, predicts("return {'y': ['a', 'b']}")))
    (answer,) = model.infer({"x": np.ones(1)}, (), {})
    assert (answer.datatype, answer.data.tolist()) == ("BYTES", [b"a", b"b"])


def test_bytes_come_back_whole(tmp_path: Path) -> None:
    model = load(write(tmp_path, predicts("return {'y': [[b'a' + bytes(1)], [b'']]}")))
    (answer,) = model.infer({"x": np.ones(1)}, (), {})
    assert (answer.datatype, answer.data.tolist()) == ("BYTES", [[b"a\0"], [b""]])


@pytest.mark.parametrize(
    ("declared", "returned", "answered"),
    [
        ("FP32", "[0.5, 2.0]", ("FP32", [0.5, 2.0])),
        ("INT32", "[1, 2]", ("INT32", [1, 2])),
        ("FP64", "[1, 2]", ("FP64", [1.0, 2.0])),
        ("BF16", "np.float32([1.0, -2.5])", ("BF16", [0x3F80, 0xC020])),
        ("BF16", "np.uint16([1, 2])", ("BF16", [1, 2])),
        ("INT32", "[0.5]", "'y' is declared as INT32; predict returned FP64"),
        ("FP32", "['a']", "'y' is declared as FP32; predict returned BYTES"),
        ("BYTES", "[1]", "'y' is declared as BYTES; predict returned INT64"),
        ("BF16", "[1]", "'y' is declared as BF16; predict returned INT64"),
    ],
)
def test_an_answer_becomes_what_is_declared_where_nothing_is_lost(
    declared: str, returned: str, answered: object, tmp_path: Path
) -> None:
    code = "import numpy as np\n" + predicts(f"return {{'y': {returned}}}")
    model = load(write(tmp_path, f"{code}    outputs = [('y', '{declared}', [-1])]\n"))
    if isinstance(answered, str):
        with pytest.raises(Internal, match=answered):
            model.infer({"x": np.ones(1)}, (), {})
    else:
        (answer,) = model.infer({"x": np.ones(1)}, (), {})
        assert (answer.datatype, answer.data.tolist()) == answered


def test_named_outputs_come_alone_and_a_missing_one_is_told(tmp_path: Path) -> None:
    model = load(write(tmp_path, predicts("return {'a': [1], 'b': [2]}")))
    assert [one.name for one in model.infer({"x": np.ones(1)}, ("b",), {})] == ["b"]
    with pytest.raises(Internal, match=r"returned no output 'c'; it returned \['a', 'b'\]"):
        model.infer({"x": np.ones(1)}, ("c",), {})


def test_parameters_of_the_request_reach_a_predict_that_takes_them(tmp_path: Path) -> None:
    code = "class Model:\n    def predict(self, inputs, parameters):\n"
    model = load(write(tmp_path, code + "        return {'y': [parameters['times']]}\n"))
    assert model.infer({"x": np.ones(1)}, (), {"times": 7})[0].data.tolist() == [7]


def test_what_is_declared_in_the_description_file_counts_first(tmp_path: Path) -> None:
    stated = (TensorSpec("z", "INT64", (-1,)),)
    model = load(write(tmp_path, DOUBLES), inputs=stated)
    assert model.metadata.inputs == stated
    assert not model.metadata.accepts_any_input
    assert load(write(tmp_path / "other", predicts("pass"))).metadata.accepts_any_input


def test_files_of_its_own_are_said_how_to_import(tmp_path: Path) -> None:
    code = "import other\n" + predicts("pass")
    with pytest.raises(LoadFailed, match=r"model.py:1\); .* 'from .other import"):
        load(write(tmp_path, code, other="K = 1\n"))


def test_an_own_file_imported_while_predicting_is_found(tmp_path: Path) -> None:
    code = predicts("from .other import K; return {'y': [K]}")
    model = load(write(tmp_path, code, other="K = 4\n"))
    assert model.infer({"x": np.ones(1)}, (), {})[0].data.tolist() == [4]


def test_a_failed_load_leaves_no_modules(tmp_path: Path) -> None:
    before = set(sys.modules)
    with pytest.raises(LoadFailed):
        load(write(tmp_path, "from .other import K\n1 / 0\n", other="K = 1\n"))
    assert not set(sys.modules) - before


def test_nothing_is_written_beside_its_files(tmp_path: Path) -> None:
    code = "from .other import K\n" + predicts("return {'y': [K]}")
    load(write(tmp_path, code, other="K = 1\n")).unload()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["model.py", "other.py"]


def test_a_file_that_was_replaced_is_run_as_it_is_now(tmp_path: Path) -> None:
    for number in (1, 2):
        model = load(write(tmp_path, predicts(f"return {{'y': [{number}]}}")))
        assert model.infer({"x": np.ones(1)}, (), {})[0].data.tolist() == [number]
        model.unload()


def test_unload_is_told_and_may_fail(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    code = predicts("pass") + "    def unload(self):\n        raise SystemExit('no')\n"
    model = load(write(tmp_path, code))
    model.unload()
    assert "unload of model.py failed: SystemExit: no (model.py:5)" in caplog.text
    with pytest.raises(Unavailable, match="unloaded"):
        model.infer({"x": np.ones(1)}, (), {})


def test_its_size_is_measured_and_comes_back(tmp_path: Path) -> None:
    heap = NativeHeap(trim_after_bytes=1)
    if heap.allocated_bytes() is None:
        pytest.skip("this C library does not say what is allocated")
    # In a global of its module, which a function of the module refers to: a cycle.
    code = "import numpy as np\nW = np.ones(2_000_000)\n" + predicts("return {'y': W[:1]}")
    path = write(tmp_path, code)
    load(path).unload()
    before = heap.allocated_bytes()
    model = load(path)
    assert model.size_bytes > 16_000_000
    model.unload()
    assert heap.allocated_bytes() - before < 1_000_000


def test_a_folder_without_the_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LoadFailed, match=r"no model.py"):
        load(tmp_path)


def test_its_memory_comes_back(tmp_path: Path) -> None:
    path = write(tmp_path / "m", DOUBLES)
    assert growth_of("python", path, np.ones((1, 2), np.float32), tmp_path) < 1.1
