"""PyTorch models answer as the library does, and what is wrong with a file is said."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_iris

from mesh.core.errors import Code, InvalidArgument, LoadFailed
from mesh.runtimes.api import ModelOptions, ModelSpec, TensorSpec
from mesh.runtimes.registry import RuntimeRegistry, RuntimeSettings

from .memory import growth_of

X = load_iris().data.astype(np.float32)
Y = load_iris().target
RUNTIME = RuntimeRegistry().format_runtime("pytorch")


@pytest.fixture(scope="module")
def trained() -> torch.nn.Module:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3))
    optimizer = torch.optim.Adam(net.parameters(), 0.02)
    for _ in range(50):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(net(torch.tensor(X)), torch.tensor(Y))
        loss.backward()
        optimizer.step()
    return net.eval()


@pytest.fixture(scope="module")
def expected(trained: torch.nn.Module) -> np.ndarray:
    return trained(torch.tensor(X)).detach().numpy()


def spec(path: Path, **options: object) -> ModelSpec:
    return ModelSpec("m", "pytorch", path, options=ModelOptions("config.pbtxt", **options))


def test_torchscript_equals_the_module(trained, expected, tmp_path: Path) -> None:
    torch.jit.script(trained).save(str(tmp_path / "model.pt"))
    model = RUNTIME.load(spec(tmp_path))
    assert model.metadata.inputs == (TensorSpec("input", "FP32", (), any_rank=True),)
    (answer,) = model.infer({"input": X}, (), {})
    np.testing.assert_allclose(answer.data, expected, atol=1e-6)
    assert answer.name == "OUTPUT__0"
    assert model.size_bytes > 4 * (4 * 16 + 16 + 16 * 3 + 3)


def test_an_exported_program_equals_the_module_and_tells_its_shapes(
    trained, expected, tmp_path: Path
) -> None:
    batch = ({0: torch.export.Dim("batch")},)
    program = torch.export.export(trained, (torch.tensor(X[:2]),), dynamic_shapes=batch)
    torch.export.save(program, str(tmp_path / "model.pt2"))
    model = RUNTIME.load(spec(tmp_path))
    assert model.metadata.inputs == (TensorSpec("input", "FP32", (-1, 4)),)
    assert model.metadata.outputs == (TensorSpec("OUTPUT__0", "FP32", (-1, 3)),)
    (answer,) = model.infer({"input": X}, (), {})
    np.testing.assert_allclose(answer.data, expected, atol=1e-6)


def test_inputs_are_named_by_their_place_as_tritons_are(trained, expected, tmp_path: Path) -> None:
    torch.jit.script(trained).save(str(tmp_path / "model.pt"))
    inputs = (TensorSpec("INPUT__0", "FP32", (-1, 4)),)
    outputs = (TensorSpec("scores", "FP32", (-1, 3)),)
    model = RUNTIME.load(spec(tmp_path, inputs=inputs, outputs=outputs))
    (answer,) = model.infer({"INPUT__0": X}, ("scores",), {})
    np.testing.assert_allclose(answer.data, expected, atol=1e-6)
    with pytest.raises(LoadFailed, match=r"names the inputs \['nonsense'\].*\['input'\]"):
        RUNTIME.load(spec(tmp_path, inputs=(TensorSpec("nonsense", "FP32", (-1, 4)),)))


class _Two(torch.nn.Module):
    def forward(self, a: torch.Tensor, b: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"sum": a + b, "half": a.to(torch.bfloat16)}


def test_several_inputs_a_dict_of_outputs_and_bfloat16(tmp_path: Path) -> None:
    torch.jit.script(_Two()).save(str(tmp_path / "model.pt"))
    model = RUNTIME.load(spec(tmp_path))
    a, b = np.float32([1.5, 2.0]), np.float32([1.0, 1.0])
    found = {t.name: t for t in model.infer({"b": b, "a": a}, (), {})}
    np.testing.assert_array_equal(found["sum"].data, a + b)
    assert found["half"].datatype == "BF16"
    np.testing.assert_array_equal(found["half"].data, (a.view(np.uint32) >> 16).astype(np.uint16))


def test_what_the_model_refuses_is_the_clients_mistake(trained, tmp_path: Path) -> None:
    torch.jit.script(trained).save(str(tmp_path / "model.pt"))
    model = RUNTIME.load(spec(tmp_path))
    with pytest.raises(InvalidArgument, match=r"PyTorch refused the input: .*shapes"):
        model.infer({"input": np.ones((2, 5), np.float32)}, (), {})


def test_weights_alone_are_refused_and_not_unpickled(trained, tmp_path: Path) -> None:
    torch.save(trained.state_dict(), tmp_path / "model.pt")
    with pytest.raises(LoadFailed, match=r"torch.jit.save") as caught:
        RUNTIME.load(spec(tmp_path))
    assert caught.value.code is Code.FAILED_PRECONDITION


def test_a_file_that_is_cut_off_or_something_else_is_refused(trained, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.jit.script(trained).save(str(path))
    whole = path.read_bytes()
    for content, words in (
        (whole[: len(whole) // 2], "cut off"),
        (b"no model", "no archive"),
        (b"", "is empty"),
    ):
        path.write_bytes(content)
        with pytest.raises(LoadFailed, match=words):
            RUNTIME.load(spec(tmp_path))


def test_a_device_that_is_not_there_is_said(trained, tmp_path: Path) -> None:
    torch.jit.script(trained).save(str(tmp_path / "model.pt"))
    runtime = RuntimeRegistry(RuntimeSettings(device="cuda:7")).format_runtime("pytorch")
    with pytest.raises(LoadFailed, match=r"cuda:7 \(--device\)"):
        runtime.load(spec(tmp_path))


def test_its_memory_comes_back(trained, tmp_path: Path) -> None:
    torch.jit.script(trained).save(str(tmp_path / "model.pt"))
    assert growth_of("pytorch", tmp_path / "model.pt", X[:4], tmp_path) < 1.1
