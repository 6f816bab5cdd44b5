"""The sample models are real: they answer rightly through the runtimes, and are made once."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from mesh import samples
from mesh.oip import rest
from mesh.runtimes.api import LoadedModel, ModelSpec
from mesh.runtimes.registry import RuntimeRegistry

REGISTRY = RuntimeRegistry()
LEAST_ACCURACY = {"digits": 0.94, "iris": 0.85, "wine": 0.85, "breast-cancer": 0.9}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("samples")
    samples.make_samples(path, 10)
    return path


def load(folder: Path, sample: samples.Sample) -> LoadedModel:
    runtime = REGISTRY.runtime_for(sample.model_format)
    return runtime.load(ModelSpec(sample.name, sample.model_format, folder / sample.name))


def test_names_are_known_and_the_same_for_every_count() -> None:
    names = [name for name, *_ in samples.sample_names(300)]
    assert len(set(names)) == 300
    assert {"iris-skops", "digits-0001", "iris-0001", "wine-0001"} <= set(names[:10])
    assert names[:40] == [name for name, *_ in samples.sample_names(40)]
    for count in (0, samples.COUNT_MAX + 1):
        with pytest.raises(ValueError, match="between 1"):
            samples.sample_names(count)


def test_every_model_is_as_accurate_as_it_says(folder: Path) -> None:
    made = samples.make_samples(folder, 10)
    assert len(made) == 10
    for sample in made:
        assert sample.accuracy >= LEAST_ACCURACY[sample.data], sample
        split = samples.split_of(sample.data, int(sample.name[-4:]) if "00" in sample.name else 1)
        model = load(folder, sample)
        output = "label" if sample.model_format == "onnx" else "predict"
        (answer,) = model.infer({"input": split.test_x.astype(np.float32)}, (output,), {})
        accuracy = float((answer.data.reshape(-1) == split.test_y).mean())
        assert accuracy == pytest.approx(sample.accuracy, abs=0.01), sample


def test_probabilities_are_probabilities(folder: Path) -> None:
    made = {sample.name: sample for sample in samples.make_samples(folder, 10)}
    model = load(folder, made["digits-0001"])
    x = samples.split_of("digits", 1).test_x.astype(np.float32)
    proba, label = model.infer({"input": x}, ("probabilities", "label"), {})
    np.testing.assert_allclose(proba.data.sum(axis=1), 1, rtol=1e-4)
    np.testing.assert_array_equal(proba.data.argmax(axis=1), label.data)


def test_the_printed_requests_give_the_printed_answers(folder: Path) -> None:
    made = {sample.name: sample for sample in samples.make_samples(folder, 10)}
    examples = json.loads((folder / samples.EXAMPLES).read_text())
    assert examples
    for example in examples:
        model = load(folder, made[example["model"]])
        body = json.dumps(example["request"]).encode()
        if example["path"].startswith("/v1"):
            call = rest.decode_v1(body, model.metadata)
            reply = rest.encode_v1(model.infer(call.inputs, call.outputs, call.parameters))
        else:
            call = rest.decode_v2(body, None, model.metadata)
            tensors = model.infer(call.inputs, call.outputs, call.parameters)
            reply = rest.encode_v2(call, tensors, example["model"])
        assert json.loads(reply.body) == example["response"]


def test_what_is_there_is_kept_and_what_is_gone_is_made_the_same(folder: Path) -> None:
    kept, gone = folder / "iris-0001" / "model.onnx", folder / "wine-0001" / "model.onnx"
    content = gone.read_bytes()
    before = kept.stat()
    gone.unlink()
    samples.make_samples(folder, 10)
    assert gone.read_bytes() == content
    assert (kept.stat().st_mtime_ns, kept.stat().st_ino) == (before.st_mtime_ns, before.st_ino)
    assert not list(folder.glob(".unfinished*"))


def test_the_command_prints_requests_and_answers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert samples.main([str(tmp_path), "--count", "5", "--address", "host:1"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("5 models, ")
    assert "curl -s http://host:1/v2/models/iris-skops/infer -d '" in printed
    assert '{"predictions": [0, 2]}' in printed
