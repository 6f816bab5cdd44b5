"""The requests that a model asks for before it is ready, on real ONNX models."""

from __future__ import annotations

import resource
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto

from mesh.core.errors import Code, LoadFailed
from mesh.runtimes.api import Array, LoadedModel, ModelSpec, Tensor, TensorSpec, WarmUp
from mesh.runtimes.registry import RuntimeRegistry
from mesh.runtimes.warm_up import BYTES_MAX, REQUESTS_MAX, check_warm_ups, warm_up

from .models import identity, matmul


class Watched:
    """A real model, and what it was asked."""

    def __init__(self, inner: LoadedModel) -> None:
        self.metadata = inner.metadata
        self.size_bytes = inner.size_bytes
        self.unload = inner.unload
        self.asked: list[Mapping[str, Array]] = []
        self._inner = inner

    def infer(
        self, inputs: Mapping[str, Array], outputs: Sequence[str], parameters: Mapping[str, Any]
    ) -> list[Tensor]:
        self.asked.append(inputs)
        return self._inner.infer(inputs, outputs, parameters)


@contextmanager
def watched(path: Path) -> Iterator[tuple[Watched, ModelSpec]]:
    spec = ModelSpec("m", "onnx", path)
    model = RuntimeRegistry().format_runtime("onnx").load(spec)
    try:
        yield Watched(model), spec  # type: ignore[arg-type]
    finally:
        model.unload()


def asking(spec: ModelSpec, *samples: WarmUp) -> ModelSpec:
    return replace(spec, options=replace(spec.options, source="config.pbtxt", warm_up=samples))


def x(*shape: int, datatype: str = "FP32") -> tuple[TensorSpec, ...]:
    return (TensorSpec("x", datatype, shape),)


def test_zeros_are_asked_as_often_as_said(tmp_path: Path) -> None:
    with watched(matmul(tmp_path / "m.onnx")) as (model, spec):
        warm_up(model, asking(spec, WarmUp(x(2, 4), 3), WarmUp(x(1, 4))))
        assert [inputs["x"].shape for inputs in model.asked] == [(2, 4)] * 3 + [(1, 4)]
        assert all(not inputs["x"].any() for inputs in model.asked)


def test_without_a_wish_nothing_is_asked(tmp_path: Path) -> None:
    with watched(matmul(tmp_path / "m.onnx")) as (model, spec):
        warm_up(model, spec)
        assert model.asked == []


def test_data_from_a_file_are_what_the_model_gets(tmp_path: Path) -> None:
    values = np.arange(4, dtype=np.float32).reshape(1, 4)
    (tmp_path / "x.raw").write_bytes(values.tobytes())
    with watched(matmul(tmp_path / "m.onnx")) as (model, spec):
        warm_up(model, asking(spec, WarmUp(x(1, 4), 1, {"x": tmp_path / "x.raw"})))
        assert np.array_equal(model.asked[0]["x"], values)


def test_strings_are_empty_or_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "x.raw").write_bytes(b"\x02\0\0\0hi\x00\0\0\0")
    tensor = x(2, datatype="BYTES")
    with watched(identity(tmp_path / "m.onnx", TensorProto.STRING)) as (model, spec):
        warm_up(model, asking(spec, WarmUp(tensor), WarmUp(tensor, 1, {"x": tmp_path / "x.raw"})))
        assert [inputs["x"].tolist() for inputs in model.asked] == [[b"", b""], [b"hi", b""]]


@pytest.mark.parametrize(
    ("sample", "said"),
    [
        pytest.param(WarmUp(x(1, 5)), "must have the shape [-1, 4]", id="a wrong shape"),
        pytest.param(WarmUp(x(1, 4, datatype="FP64")), "datatype FP32; found FP64", id="a type"),
        pytest.param(WarmUp((TensorSpec("z", "FP32", (1, 4)),)), "no input 'z'", id="a name"),
        pytest.param(WarmUp(()), "input 'x' (FP32 [-1, 4]) is missing", id="no input"),
    ],
)
def test_what_the_model_does_not_take_fails_the_load(
    tmp_path: Path, sample: WarmUp, said: str
) -> None:
    with watched(matmul(tmp_path / "m.onnx")) as (model, spec):
        with pytest.raises(LoadFailed) as caught:
            warm_up(model, asking(spec, sample))
        assert caught.value.message.startswith("model 'm': config.pbtxt: the warm-up request")
        assert said in caught.value.message
        assert model.asked == []


@pytest.mark.parametrize(
    ("content", "code", "said"),
    [
        pytest.param(bytes(15), Code.FAILED_PRECONDITION, "x.raw", id="too short"),
        pytest.param(bytes(99), Code.FAILED_PRECONDITION, "x.raw", id="too long"),
        pytest.param(None, Code.UNAVAILABLE, "data cannot be read", id="gone"),
    ],
)
def test_data_that_do_not_fit_fail_the_load(
    tmp_path: Path, content: bytes | None, code: Code, said: str
) -> None:
    if content is not None:
        (tmp_path / "x.raw").write_bytes(content)
    with watched(matmul(tmp_path / "m.onnx")) as (model, spec):
        with pytest.raises(LoadFailed) as caught:
            warm_up(model, asking(spec, WarmUp(x(1, 4), 1, {"x": tmp_path / "x.raw"})))
        assert (caught.value.code, said in caught.value.message) == (code, True)


@pytest.mark.parametrize(
    ("samples", "said"),
    [
        pytest.param([WarmUp(x(1), REQUESTS_MAX + 1)], "at most 100 warm-up requests", id="often"),
        pytest.param([WarmUp(x(1), 51)] * 2, "found 102", id="often together"),
        pytest.param([WarmUp(x(10**6, 10**6))], "at most 256 MiB", id="1e12 elements"),
        pytest.param([WarmUp((*x(BYTES_MAX // 4), *x(1)))], "at most 256 MiB", id="large together"),
        pytest.param([WarmUp(x(2**63 - 1, 2**63 - 1, datatype="BYTES"))], "MiB", id="strings"),
        pytest.param([WarmUp(x(-1))], "must say the size of every axis", id="a free axis"),
        pytest.param([WarmUp(x(1, datatype="FP7"))], "unknown datatype 'FP7'", id="a datatype"),
    ],
)
def test_a_wish_without_measure_is_refused_before_memory_is_taken(
    samples: list[WarmUp], said: str
) -> None:
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(LoadFailed) as caught:
        check_warm_ups(samples, "config.pbtxt")
    assert said in caught.value.message
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib < 64 << 10


def test_the_largest_wish_that_is_allowed_is_allowed() -> None:
    check_warm_ups([WarmUp(x(BYTES_MAX // 4), REQUESTS_MAX)], "config.pbtxt")


def test_a_config_file_beside_a_model_is_acted_on(tmp_path: Path) -> None:
    matmul(tmp_path / "1" / "model.onnx")
    warm = 'model_warmup { inputs { key: "x" value { data_type: TYPE_FP32 dims: [ 1, 5 ] } } }'
    (tmp_path / "config.pbtxt").write_text(warm)
    runtime = RuntimeRegistry().runtime_for("triton")
    with pytest.raises(LoadFailed, match=r"config\.pbtxt: the warm-up request failed: .*\[-1, 4\]"):
        runtime.load(ModelSpec("m", "triton", tmp_path))
    (tmp_path / "config.pbtxt").write_text(warm.replace("5", "4"))
    runtime.load(ModelSpec("m", "triton", tmp_path)).unload()
