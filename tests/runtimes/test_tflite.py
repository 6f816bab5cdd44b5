"""LiteRT models answer as Keras does, and what is wrong with a file is said."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_iris

from mesh.core.errors import InvalidArgument, LoadFailed, Unavailable
from mesh.runtimes.api import LoadedModel, ModelOptions, ModelSpec, TensorSpec
from mesh.runtimes.registry import RuntimeRegistry

from .memory import growth_of

X = load_iris().data.astype(np.float32)
RUNTIME = RuntimeRegistry().format_runtime("tflite")


def load(path: Path, **parameters: str) -> LoadedModel:
    return RUNTIME.load(ModelSpec("m", "tflite", path, options=ModelOptions(parameters=parameters)))


def test_answers_equal_those_of_the_model_that_it_was_made_of(keras_models: Path) -> None:
    model = load(keras_models / "model.tflite")
    (one,) = model.metadata.inputs
    assert (one.datatype, one.shape) == ("FP32", (-1, 4))
    expected = np.load(keras_models / "expected.npy")
    for rows in (150, 1, 7):  # each resizes the input
        (answer,) = model.infer({one.name: X[:rows]}, (), {})
        np.testing.assert_allclose(answer.data, expected[:rows], atol=1e-6)


def test_threads_do_not_disturb_one_another(keras_models: Path) -> None:
    model = load(keras_models / "model.tflite")
    name, expected = model.metadata.inputs[0].name, np.load(keras_models / "expected.npy")

    def ask(row: int) -> np.ndarray:
        return model.infer({name: X[row : row + 3]}, (), {})[0].data

    with ThreadPoolExecutor(8) as pool:
        for row, answer in enumerate(pool.map(ask, range(100))):
            np.testing.assert_allclose(answer, expected[row : row + 3], atol=1e-6)


def test_a_file_that_is_cut_off_or_something_else_is_refused(
    keras_models: Path, tmp_path: Path
) -> None:
    whole = (keras_models / "model.tflite").read_bytes()
    path = tmp_path / "model.tflite"
    for content, words in (
        (whole[:100], "cannot load"),
        (b"this is no model", "no LiteRT model"),
        (b"", "is empty"),
    ):
        path.write_bytes(content)
        with pytest.raises(LoadFailed, match=words):
            load(tmp_path)


def test_a_quantised_model_takes_and_gives_the_integers_that_it_declares(
    keras_models: Path,
) -> None:
    model = load(keras_models / "int8.tflite")
    (one,), (out,) = model.metadata.inputs, model.metadata.outputs
    assert (one.datatype, out.datatype) == ("INT8", "INT8")
    # LiteRT's own interpreter on the same rows is the library's answer.
    from ai_edge_litert.interpreter import Interpreter

    own = Interpreter(model_path=str(keras_models / "int8.tflite"), num_threads=1)
    detail = own.get_input_details()[0]
    scale, zero = detail["quantization"]
    rows = np.clip(np.round(X[:5] / scale + zero), -128, 127).astype(np.int8)
    own.resize_tensor_input(detail["index"], rows.shape)
    own.allocate_tensors()
    own.set_tensor(detail["index"], rows)
    own.invoke()
    (answer,) = model.infer({one.name: rows}, (), {})
    wanted = own.get_tensor(own.get_output_details()[0]["index"])
    assert answer.data.dtype == np.int8
    np.testing.assert_array_equal(answer.data, wanted)


class TestSignatures:
    def test_the_description_file_chooses_one_and_it_gives_the_names(
        self, keras_models: Path
    ) -> None:
        model = load(keras_models / "several.tflite", signature="twice")
        assert model.metadata.inputs == (TensorSpec("x", "FP32", (-1,)),)
        (answer,) = model.infer({"x": np.ones(3, np.float32)}, (), {})
        assert (answer.name, answer.data.tolist()) == ("y", [2.0, 2.0, 2.0])

    @pytest.mark.parametrize("parameters", [{}, {"signature": "other"}])
    def test_one_that_is_not_there_is_named(
        self, parameters: dict[str, str], keras_models: Path
    ) -> None:
        with pytest.raises(LoadFailed, match=r"no signature '\w+'; it has \['pick', 'twice'\]"):
            load(keras_models / "several.tflite", **parameters)

    def test_text_goes_in_and_out_as_bytes(self, keras_models: Path) -> None:
        model = load(keras_models / "several.tflite", signature="pick")
        assert {s.name: s.datatype for s in model.metadata.inputs} == {
            "words": "BYTES",
            "places": "INT32",
        }
        words = np.array([b"a\0b", "é".encode(), b""], dtype=object)
        inputs = {"words": words, "places": np.array([2, 0, 1], np.int32)}
        (answer,) = model.infer(inputs, (), {})
        assert (answer.datatype, answer.data.tolist()) == ("BYTES", [b"", *words[:2].tolist()])
        with pytest.raises(InvalidArgument, match="ends in a zero byte"):
            model.infer({**inputs, "words": np.array([b"a\0"] * 3, object)}, (), {})

    def test_content_that_breaks_it_is_the_clients_mistake_and_breaks_nothing_else(
        self, keras_models: Path
    ) -> None:
        model = load(keras_models / "several.tflite", signature="pick")
        words = np.array([b"a"], object)
        with pytest.raises(InvalidArgument, match=r"LiteRT refused the input: .*gather index"):
            model.infer({"words": words, "places": np.array([7], np.int32)}, (), {})
        (answer,) = model.infer({"words": words, "places": np.array([0], np.int32)}, (), {})
        assert answer.data.tolist() == [b"a"]


def test_a_shape_that_the_graph_cannot_take_is_the_clients_mistake(keras_models: Path) -> None:
    model = load(keras_models / "model.tflite")
    name = model.metadata.inputs[0].name
    with pytest.raises(InvalidArgument, match="LiteRT refused the input"):
        model.infer({name: np.ones((2, 5), np.float32)}, (), {})
    (answer,) = model.infer({name: X[:2]}, (), {})
    np.testing.assert_allclose(answer.data, np.load(keras_models / "expected.npy")[:2], atol=1e-6)


def test_a_loaded_model_needs_its_file_no_more(keras_models: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.tflite"
    path.write_bytes((keras_models / "model.tflite").read_bytes())
    model = load(path)
    path.write_bytes(b"")
    path.unlink()
    name = model.metadata.inputs[0].name
    with ThreadPoolExecutor(4) as pool:  # more interpreters are made
        answers = list(pool.map(lambda n: model.infer({name: X[n : n + 1]}, (), {}), range(40)))
    assert len(answers) == 40


def test_after_unload_it_is_unavailable(keras_models: Path) -> None:
    model = load(keras_models / "model.tflite")
    model.unload()
    with pytest.raises(Unavailable, match="unloaded"):
        model.infer({model.metadata.inputs[0].name: X}, (), {})


def test_size_covers_the_file_and_is_predicted(keras_models: Path) -> None:
    path = keras_models / "model.tflite"
    size_bytes = load(path).size_bytes
    predicted = RUNTIME.predict_size_bytes(ModelSpec("m", "tflite", path))
    assert path.stat().st_size < size_bytes <= 1.1 * predicted


def test_its_memory_comes_back(keras_models: Path, tmp_path: Path) -> None:
    assert growth_of("tflite", keras_models / "model.tflite", X[:4], tmp_path) < 1.1
