"""TensorFlow models answer as the library does, and what is wrong with them is said."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_iris

from mesh.core.errors import InvalidArgument, LoadFailed, Unavailable
from mesh.runtimes.api import ModelOptions, ModelSpec, TensorSpec
from mesh.runtimes.registry import RuntimeRegistry
from tests.worker.isolation import answers_of, isolation

X = load_iris().data.astype(np.float32)
REGISTRY = RuntimeRegistry()
RUNTIME = REGISTRY.format_runtime("tensorflow")


def spec(path: Path, **options: object) -> ModelSpec:
    return ModelSpec("m", "tensorflow", path, options=ModelOptions(**options))


@pytest.mark.parametrize("name", ["model.keras", "model.h5", "saved"])
def test_answers_equal_the_librarys_own(keras_models: Path, name: str) -> None:
    model = RUNTIME.load(spec(keras_models / name))
    (one,) = model.metadata.inputs
    assert (one.datatype, one.shape) == ("FP32", (-1, 4))
    (answer,) = model.infer({one.name: X}, (), {})
    np.testing.assert_allclose(answer.data, np.load(keras_models / "expected.npy"), atol=1e-6)
    assert model.size_bytes > 0


def test_text_goes_in_and_out_as_bytes(keras_models: Path) -> None:
    model = RUNTIME.load(spec(keras_models / "texts"))
    assert model.metadata.inputs == (TensorSpec("text", "BYTES", (-1,)),)
    assert {s.name: s.datatype for s in model.metadata.outputs} == {
        "length": "INT32",
        "upper": "BYTES",
    }
    (answer,) = model.infer({"text": np.array([b"abc", b"d"], dtype=object)}, ("upper",), {})
    assert answer.data.tolist() == [b"ABC", b"D"]


def test_text_of_any_bytes_goes_through(keras_models: Path) -> None:
    model = RUNTIME.load(spec(keras_models / "several", parameters={"signature": "pick"}))
    words = np.array([b"a\0b\0", b"\xff", b""], dtype=object)
    for places in (np.array([0, 1, 2], np.int32), np.array([], np.int32)):
        (answer,) = model.infer({"words": words, "places": places}, (), {})
        assert answer.datatype == "BYTES"
        assert answer.data.tolist() == words[places].tolist()


def test_what_the_content_of_a_request_breaks_is_the_clients_mistake(keras_models: Path) -> None:
    model = RUNTIME.load(spec(keras_models / "several", parameters={"signature": "pick"}))
    inputs = {"words": np.array([b"a"], object), "places": np.array([5], np.int32)}
    with pytest.raises(InvalidArgument, match=r"refused the input.*5 is not in \[0, 1\)"):
        model.infer(inputs, (), {})


def test_bfloat16_goes_in_and_out_as_its_bits(keras_models: Path) -> None:
    model = RUNTIME.load(spec(keras_models / "several", parameters={"signature": "half"}))
    assert model.metadata.inputs == (TensorSpec("x", "BF16", (2,)),)
    (answer,) = model.infer({"x": np.array([0x4000, 0xC000], np.uint16)}, (), {})  # 2, -2
    assert (answer.datatype, answer.data.tolist()) == ("BF16", [0x3F80, 0xBF80])


def test_a_keras_model_of_dicts_keeps_their_names(keras_models: Path) -> None:
    model = RUNTIME.load(spec(keras_models / "dicts.keras"))
    assert [one.name for one in model.metadata.inputs] == ["a", "b"]
    a, b = np.float32([[1, 2]]), np.float32([[10, 20]])
    found = {one.name: one.data.tolist() for one in model.infer({"b": b, "a": a}, (), {})}
    assert found == {"sum": [[11.0, 22.0]], "twice": [[2.0, 4.0]]}


def test_each_number_of_rows_is_answered_by_the_one_trace(keras_models: Path) -> None:
    model = RUNTIME.load(spec(keras_models / "model.keras"))
    expected = np.load(keras_models / "expected.npy")
    for rows in (1, 150, 7):
        (answer,) = model.infer({model.metadata.inputs[0].name: X[:rows]}, (), {})
        np.testing.assert_allclose(answer.data, expected[:rows], atol=1e-6)


@pytest.mark.parametrize("name", ["lambda.keras", "lambda.h5"])
def test_a_layer_that_is_code_is_refused(keras_models: Path, name: str) -> None:
    with pytest.raises(LoadFailed, match=rf"cannot load {name}: .*Lambda"):
        RUNTIME.load(spec(keras_models / name))


def test_a_class_that_is_not_keras_own_is_named(keras_models: Path) -> None:
    with pytest.raises(LoadFailed, match=r"cannot load unknown.keras: .*'Subclassed'"):
        RUNTIME.load(spec(keras_models / "unknown.keras"))


def test_a_model_answers_when_another_is_gone_and_is_unavailable_when_it_is(
    keras_models: Path,
) -> None:
    gone, stays = (RUNTIME.load(spec(keras_models / "model.keras")) for _ in range(2))
    gone.unload()
    name = stays.metadata.inputs[0].name
    (answer,) = stays.infer({name: X}, (), {})
    np.testing.assert_allclose(answer.data, np.load(keras_models / "expected.npy"), atol=1e-6)
    with pytest.raises(Unavailable, match="unloaded"):
        gone.infer({name: X}, (), {})


def test_size_is_predicted_from_the_files_alone(keras_models: Path) -> None:
    for name in ("model.keras", "model.h5", "saved"):
        predicted = RUNTIME.predict_size_bytes(spec(keras_models / name))
        assert 0 < RUNTIME.load(spec(keras_models / name)).size_bytes <= 2 * predicted


def test_messages_do_not_tell_where_the_files_lie(tmp_path: Path) -> None:
    (tmp_path / "model.keras").write_bytes(b"no model")
    with pytest.raises(LoadFailed) as caught:
        RUNTIME.load(spec(tmp_path))
    assert str(tmp_path) not in caught.value.message


def test_a_signature_that_is_not_there_is_named(keras_models: Path) -> None:
    with pytest.raises(LoadFailed, match=r"no signature 'other'; it has \['serv"):
        RUNTIME.load(spec(keras_models / "saved", parameters={"signature": "other"}))


def test_what_the_model_refuses_is_the_clients_mistake(keras_models: Path) -> None:
    model = RUNTIME.load(spec(keras_models / "saved"))
    name = model.metadata.inputs[0].name
    with pytest.raises(InvalidArgument, match="TensorFlow refused the input"):
        model.infer({name: np.ones((2, 5), np.float32)}, (), {})


def test_what_is_cut_off_or_something_else_is_refused(keras_models: Path, tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    shutil.copytree(keras_models / "saved", folder)
    graph = folder / "saved_model.pb"
    graph.write_bytes(graph.read_bytes()[:1_000])
    (tmp_path / "model.keras").write_bytes(b"no model")
    (tmp_path / "empty").mkdir()
    two = tmp_path / "two"
    two.mkdir()
    for name in ("a", "b"):
        shutil.copy(keras_models / "model.keras", two / f"{name}.keras")
    for path, words in (
        (folder, "cannot load saved"),
        (tmp_path / "model.keras", r"cannot load model.keras"),
        (tmp_path / "empty", r"found none; nor is there a saved_model.pb"),
        (two, r"found a.keras, b.keras"),
        (tmp_path / "nowhere", "no file or folder"),
    ):
        with pytest.raises(LoadFailed, match=words):
            RUNTIME.load(spec(path))


def test_it_runs_isolated_unless_told_otherwise(keras_models: Path) -> None:
    # In its own process its memory would not come back.
    assert REGISTRY.runs_isolated("tensorflow", keras_models / "saved")


async def test_a_worker_answers_as_the_library_does(keras_models: Path, tmp_path: Path) -> None:
    async with isolation(tmp_path, worker_memory_bytes=1 << 30) as workers:
        for name in ("saved", "model.keras"):  # of one fork server: it takes seconds to import
            model = await workers.load(name, path=keras_models / name, kind="tensorflow")
            found = await answers_of(model, X)
            np.testing.assert_allclose(found, np.load(keras_models / "expected.npy"), atol=1e-6)
