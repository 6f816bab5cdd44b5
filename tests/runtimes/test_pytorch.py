"""PyTorch models answer as the library does, and what is wrong with a file is said."""

from __future__ import annotations

import gc
import io
import json
import pickle
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_iris

from mesh.core.errors import Code, Internal, InvalidArgument, LoadFailed, Unavailable
from mesh.runtimes.api import ModelOptions, ModelSpec, TensorSpec
from mesh.runtimes.native_memory import NativeHeap
from mesh.runtimes.registry import RuntimeRegistry, RuntimeSettings
from tests.worker.isolation import answers_of, isolation

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


@pytest.mark.parametrize(
    ("missing", "words"),
    [
        ("weights/weight_0", r"lacks the weights of 'weight' \(weight_0\)"),
        ("sample_inputs", "lacks the example inputs"),
        ("model_weights_config", "cannot load model.pt2: .*model_weights_config.json not found"),
        ("models/model.json", "not a program"),
    ],
)
def test_an_exported_program_with_something_missing_is_refused(
    missing: str, words: str, tmp_path: Path
) -> None:
    path = export(torch.nn.Linear(4, 3), (torch.ones(2, 4),), tmp_path) / "model.pt2"
    rewritten(path, lambda name, content: None if missing in name else content)
    with pytest.raises(LoadFailed, match=words) as caught:
        RUNTIME.load(spec(path))
    assert caught.value.code is Code.FAILED_PRECONDITION
    assert str(tmp_path) not in caught.value.message


def test_a_damaged_description_is_refused(tmp_path: Path) -> None:
    path = export(torch.nn.Linear(4, 3), (torch.ones(2, 4),), tmp_path) / "model.pt2"
    whole = path.read_bytes()
    for content, words in (
        (whole[:-200], "is cut off"),
        (whole.replace(b'"graph_module"', b'"graph_modul_"'), "is damaged: Bad CRC"),
    ):
        path.write_bytes(content)
        assert RUNTIME.predict_size_bytes(spec(path)) > 0
        with pytest.raises(LoadFailed, match=words):
            RUNTIME.load(spec(path))


def test_two_files_that_may_be_meant_are_named(trained, tmp_path: Path) -> None:
    for name in ("a.pt", "b.pt"):
        torch.jit.script(trained).save(str(tmp_path / name))
    with pytest.raises(LoadFailed, match=r"found a\.pt, b\.pt"):
        RUNTIME.load(spec(tmp_path))
    assert RUNTIME.load(spec(tmp_path, file="b.pt")).metadata.inputs


def test_an_exported_program_is_told_by_its_content_not_its_name(tmp_path: Path) -> None:
    path = export(torch.nn.Linear(4, 3), (torch.ones(2, 4),), tmp_path) / "model.pt2"
    path = path.rename(tmp_path / "model.pt")
    assert RUNTIME.load(spec(path)).metadata.inputs == (TensorSpec("input", "FP32", (2, 4)),)


def test_a_device_that_is_not_there_is_said(trained, tmp_path: Path) -> None:
    torch.jit.script(trained).save(str(tmp_path / "model.pt"))
    runtime = RuntimeRegistry(RuntimeSettings(device="cuda:7")).format_runtime("pytorch")
    with pytest.raises(LoadFailed, match=r"cuda:7 \(--device\)"):
        runtime.load(spec(tmp_path))
    runtime = RuntimeRegistry(RuntimeSettings(device="gpu")).format_runtime("pytorch")
    with pytest.raises(LoadFailed, match=r"'gpu' \(--device\) is none of cpu, cuda"):
        runtime.load(spec(tmp_path))


def script(module: torch.nn.Module, folder: Path) -> Path:
    torch.jit.script(module.eval()).save(str(folder / "model.pt"))
    return folder


def export(module: torch.nn.Module, arguments: tuple, folder: Path, **how: object) -> Path:
    torch.export.save(
        torch.export.export(module.eval(), arguments, **how), str(folder / "model.pt2")
    )
    return folder


class _Optional(torch.nn.Module):
    def forward(
        self, a: torch.Tensor, scale: float = 2.0, b: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return a * scale if b is None else a * scale + b, a


def test_arguments_with_a_default_need_not_be_sent_but_may_be_stated(tmp_path: Path) -> None:
    script(_Optional(), tmp_path)
    ones = np.ones(2, np.float32)
    plain = RUNTIME.load(spec(tmp_path))
    assert [one.name for one in plain.metadata.inputs] == ["a"]
    assert [one.name for one in plain.metadata.outputs] == ["OUTPUT__0", "OUTPUT__1"]
    assert plain.infer({"a": ones}, ("OUTPUT__0",), {})[0].data.tolist() == [2.0, 2.0]
    stated = (TensorSpec("b", "FP32", (-1,)), TensorSpec("a", "FP32", (-1,)))
    model = RUNTIME.load(spec(tmp_path, inputs=stated))
    assert model.infer({"b": ones, "a": ones}, (), {})[0].data.tolist() == [3.0, 3.0]


class _Number(torch.nn.Module):
    def forward(self, a: torch.Tensor, times: int) -> torch.Tensor:
        return a * times


def test_an_argument_that_cannot_be_sent_is_named(tmp_path: Path) -> None:
    with pytest.raises(LoadFailed, match="argument 'times' of forward is a int; only tensors"):
        RUNTIME.load(spec(script(_Number(), tmp_path)))
    text = (TensorSpec("times", "BYTES", (-1,)), TensorSpec("a", "FP32", (-1,)))
    with pytest.raises(LoadFailed):
        RUNTIME.load(spec(tmp_path, inputs=text))


def test_stated_outputs_are_mapped_by_their_place(tmp_path: Path) -> None:
    script(_Optional(), tmp_path)
    outputs = (TensorSpec("OUT__1", "FP32", (-1,)), TensorSpec("OUT__0", "FP32", (-1,)))
    found = RUNTIME.load(spec(tmp_path, outputs=outputs)).infer({"a": np.ones(1, "f4")}, (), {})
    assert {one.name: one.data.tolist() for one in found} == {"OUT__0": [2.0], "OUT__1": [1.0]}


class _Nested(torch.nn.Module):
    def forward(self, a, d, k=1, flag=None):
        return {"sum": a + d["x"], "ids": d["y"] * k}


def test_an_exported_program_keeps_the_form_of_its_arguments_and_answers(tmp_path: Path) -> None:
    rows = torch.export.Dim("rows")
    arguments = {"x": torch.ones(2, 3), "y": torch.ones(2, dtype=torch.int64)}
    export(
        _Nested(),
        (torch.ones(2, 3),),
        tmp_path,
        kwargs={"d": arguments, "k": 3},
        dynamic_shapes={"a": {0: rows}, "d": {"x": {0: rows}, "y": {0: rows}}, "k": None},
    )
    model = RUNTIME.load(spec(tmp_path))
    assert [(s.name, s.datatype, s.shape) for s in model.metadata.inputs] == [
        ("a", "FP32", (-1, 3)),
        ("d_x", "FP32", (-1, 3)),
        ("d_y", "INT64", (-1,)),
    ]
    assert [(s.name, s.datatype) for s in model.metadata.outputs] == [
        ("sum", "FP32"),
        ("ids", "INT64"),
    ]
    inputs = {"d_y": np.arange(5), "a": np.ones((5, 3), "f4"), "d_x": np.ones((5, 3), "f4")}
    found = {one.name: one.data for one in model.infer(inputs, (), {})}
    assert found["sum"].tolist() == np.full((5, 3), 2.0).tolist()
    assert found["ids"].tolist() == [0, 3, 6, 9, 12]


def test_sizes_that_a_program_was_not_exported_for_are_the_clients_mistake(
    tmp_path: Path,
) -> None:
    rows = torch.export.Dim("rows", max=8)
    export(torch.nn.Linear(4, 3), (torch.ones(2, 4),), tmp_path, dynamic_shapes=({0: rows},))
    model = RUNTIME.load(spec(tmp_path))
    assert model.infer({"input": np.ones((8, 4), np.float32)}, (), {})[0].data.shape == (8, 3)
    with pytest.raises(InvalidArgument, match="PyTorch refused the input"):
        model.infer({"input": np.ones((9, 4), np.float32)}, (), {})


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        ("BOOL", np.array([True, False])),
        ("UINT8", np.array([0, 255], np.uint8)),
        ("INT8", np.array([-128, 127], np.int8)),
        ("INT16", np.array([-(2**15), 1], np.int16)),
        ("INT32", np.array([-(2**31), 1], np.int32)),
        ("INT64", np.array([-(2**63), 1], np.int64)),
        ("FP16", np.array([0.5, -2], np.float16)),
        ("FP32", np.array([0.5, -2], np.float32)),
        ("FP64", np.array([0.5, -2], np.float64)),
        ("BF16", np.array([0x3F00, 0xC000], np.uint16)),
    ],
)
def test_every_datatype_goes_through(kind: str, values: np.ndarray, tmp_path: Path) -> None:
    stated = (TensorSpec("input", kind, (-1,)),)
    model = RUNTIME.load(spec(script(torch.nn.Identity(), tmp_path), inputs=stated))
    values.flags.writeable = False
    for array in (values, values[:0]):
        (answer,) = model.infer({"input": array}, (), {})
        assert (answer.datatype, answer.data.dtype) == (kind, values.dtype)
        assert answer.data.tolist() == array.tolist()


class _InPlace(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mul_(2)


def test_a_module_that_works_in_place_does_not_write_into_the_request(tmp_path: Path) -> None:
    model = RUNTIME.load(spec(script(_InPlace(), tmp_path)))
    request = np.frombuffer(np.ones(3, np.float32).tobytes(), np.float32)
    assert model.infer({"x": request}, (), {})[0].data.tolist() == [2.0, 2.0, 2.0]
    assert request.tolist() == [1.0, 1.0, 1.0]


class _Complex(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.complex(x, x)


def test_an_answer_that_no_datatype_carries_is_the_models_fault(tmp_path: Path) -> None:
    model = RUNTIME.load(spec(script(_Complex(), tmp_path)))
    with pytest.raises(Internal, match=r"'OUTPUT__0' is a torch.complex64"):
        model.infer({"x": np.ones(1, np.float32)}, (), {})


def test_many_threads_get_their_own_answers(trained, expected, tmp_path: Path) -> None:
    model = RUNTIME.load(spec(script(trained, tmp_path)))
    with ThreadPoolExecutor(4) as pool:
        rows = list(pool.map(lambda n: model.infer({"input": X[n : n + 1]}, (), {}), range(150)))
    np.testing.assert_allclose(np.vstack([row[0].data for row in rows]), expected, atol=1e-6)


def test_after_unload_it_is_unavailable(trained, tmp_path: Path) -> None:
    model = RUNTIME.load(spec(script(trained, tmp_path)))
    model.unload()
    with pytest.raises(Unavailable, match="unloaded"):
        model.infer({"input": X}, (), {})


@pytest.mark.parametrize("frozen", [False, True])
def test_predicted_is_not_below_measured_and_measured_covers_the_weights(
    frozen: bool, tmp_path: Path
) -> None:
    module = torch.jit.script(torch.nn.Linear(512, 1024).eval())
    (torch.jit.freeze(module) if frozen else module).save(str(tmp_path / "model.pt"))
    model = RUNTIME.load(spec(tmp_path))
    assert 4 * 512 * 1024 <= model.size_bytes <= 1.1 * RUNTIME.predict_size_bytes(spec(tmp_path))


class _Boom:
    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (Path("boom-was-here"),))


def rewritten(path: Path, change: Callable[[str, bytes], bytes | None]) -> None:
    """The archive with its entries changed; None takes one out."""
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            if (changed := change(name, content)) is not None:
                archive.writestr(name, changed)


class TestNothingIsRun:
    """Files that would run code in PyTorch's own loaders are refused before."""

    @pytest.fixture(autouse=True)
    def in_a_folder_that_stays_clean(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> object:
        monkeypatch.chdir(tmp_path)
        yield
        assert not (tmp_path / "boom-was-here").exists()

    @pytest.fixture
    def exported(self, tmp_path: Path) -> Path:
        return export(torch.nn.Linear(4, 3), (torch.ones(2, 4),), tmp_path) / "model.pt2"

    @pytest.mark.parametrize("suffix", [".pt", ".pth"])
    @pytest.mark.parametrize("as_zip", [True, False])
    def test_a_pickled_module(self, suffix: str, as_zip: bool, tmp_path: Path) -> None:
        path = tmp_path / f"model{suffix}"
        torch.save(_Boom(), path, _use_new_zipfile_serialization=as_zip)
        with pytest.raises(LoadFailed, match=r"pickle.*torch.jit.save.*torch.export.save"):
            RUNTIME.load(spec(tmp_path))

    def test_example_inputs_with_code(self, exported: Path) -> None:
        evil = io.BytesIO()
        torch.save(((_Boom(),), {}), evil)
        rewritten(exported, lambda n, c: evil.getvalue() if "sample_inputs" in n else c)
        with pytest.raises(LoadFailed, match="example inputs that are not plain"):
            RUNTIME.load(spec(exported))

    @pytest.mark.parametrize("holder", ["weights", "constants"])
    def test_pickled_weights(self, holder: str, exported: Path) -> None:
        payload = {"path_name": "opaque_obj_0", "is_param": False, "use_pickle": True}
        config = json.dumps({"config": {"w": {**payload, "tensor_meta": None}}}).encode()
        rewritten(exported, lambda n, c: config if f"model_{holder}_config" in n else c)
        with zipfile.ZipFile(exported, "a") as archive:
            archive.writestr("model/data/constants/opaque_obj_0", pickle.dumps(_Boom()))
        with pytest.raises(LoadFailed, match="a pickled object, 'w'"):
            RUNTIME.load(spec(exported))

    def test_weights_of_the_old_pickled_form(self, exported: Path) -> None:
        with zipfile.ZipFile(exported, "a") as archive:
            archive.writestr("model/data/weights/model.pt", pickle.dumps(_Boom()))
        with pytest.raises(LoadFailed, match="has pickled weights"):
            RUNTIME.load(spec(exported))

    def test_a_native_library(self, exported: Path) -> None:
        with zipfile.ZipFile(exported, "a") as archive:
            archive.writestr("model/data/aotinductor/model/model.so", b"")
        with pytest.raises(LoadFailed, match="native library"):
            RUNTIME.load(spec(exported))

    def test_an_entry_that_two_readers_would_see_differently(self, exported: Path) -> None:
        with zipfile.ZipFile(exported, "a") as archive:
            archive.writestr("model/MODELS/model.json", b"{}")
        with pytest.raises(LoadFailed, match="two entries named"):
            RUNTIME.load(spec(exported))

    def test_a_directory_that_two_readers_would_find_in_different_places(
        self, exported: Path
    ) -> None:
        whole = exported.read_bytes()
        # Bytes before the directory: one reader counts from the end, the other from the start.
        place = int.from_bytes(whole[-6:-2], "little")
        exported.write_bytes(whole[:place] + b"0" * 8 + whole[place:])
        with pytest.raises(LoadFailed, match="directory is not where it says"):
            RUNTIME.load(spec(exported))

    @pytest.mark.parametrize(
        ("key", "value", "words"),
        [
            ("guards_code", ["open('boom-was-here', 'w') == 0"], "a guard"),
            ("guards_code", ["L['input'].__class__ == 0"], "a guard"),
            ("guards_code", ["L['x\"'].size()[0] == 0"], "a guard"),
            ("expr_str", "__import__('os').system('touch boom-was-here')", "a size"),
            ("expr_str", "Symbol('s0', __import__('os'))", "a size"),
            ("target", "torch.os.system", "an operator"),
            ("target", "torch.ops.load_library", "an operator"),
            ("target", "_operator.methodcaller", "an operator"),
            ("name", "x=open('boom-was-here', 'w')", "a name"),
        ],
    )
    def test_a_text_that_would_be_evaluated(
        self, key: str, value: object, words: str, exported: Path
    ) -> None:
        def change(name: str, content: bytes) -> bytes:
            if not name.endswith("models/model.json"):
                return content
            described = json.loads(content)
            if key == "guards_code":
                described[key] = value
            elif key == "target":
                described["graph_module"]["graph"]["nodes"][0][key] = value
            else:
                described["graph_module"]["graph"]["inputs"].append({key: value})
            return json.dumps(described).encode()

        rewritten(exported, change)
        with pytest.raises(LoadFailed, match=f"has {words}.*as code"):
            RUNTIME.load(spec(exported))

    def test_arguments_of_a_type_that_is_looked_up_by_name(self, exported: Path) -> None:
        rewritten(exported, lambda n, c: c.replace(b"builtins.tuple", b"collections.deque"))
        with pytest.raises(LoadFailed, match=r"has (arguments|answers)"):
            RUNTIME.load(spec(exported))

    def test_a_script_that_reads_files(self, tmp_path: Path) -> None:
        class Reads(torch.nn.Module):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return torch.from_file("boom-was-here", True, 4) + x

        torch.jit.trace(Reads(), torch.ones(4)).save(str(tmp_path / "model.pt"))
        (tmp_path / "boom-was-here").unlink()
        with pytest.raises(LoadFailed, match="touches files"):
            RUNTIME.load(spec(tmp_path))


class _Words(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = torch.nn.Embedding(20, 8)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        kept = self.words(ids) * (~mask).unsqueeze(-1)
        pairs = kept[:, : ids.shape[1] // 2 * 2].reshape(ids.shape[0], -1, 2, 8).mean((1, 2))
        return torch.cond(ids.sum() > 0, torch.sin, torch.cos, (pairs,))


def test_what_programs_really_say_of_themselves_is_let_through(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = _Words().eval()
    axes = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
    example = (torch.ones(2, 5, dtype=torch.int64), torch.zeros(2, 5, dtype=torch.bool))
    export(net, example, tmp_path, dynamic_shapes=(axes, axes))
    model = RUNTIME.load(spec(tmp_path))
    assert [(s.datatype, s.shape) for s in model.metadata.inputs] == [
        ("INT64", (-1, -1)),
        ("BOOL", (-1, -1)),
    ]
    ids, mask = np.arange(21).reshape(3, 7) % 20, np.zeros((3, 7), bool)
    (answer,) = model.infer({"ids": ids, "mask": mask}, (), {})
    wanted = net(torch.tensor(ids), torch.tensor(mask)).detach().numpy()
    np.testing.assert_allclose(answer.data, wanted, atol=1e-6)


class _Big(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(1024, 1024)
        self.constant = torch.ones(1024, 1024)  # neither a parameter nor a buffer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) + self.constant[0]


def test_the_memory_of_a_script_comes_back(trained, tmp_path: Path) -> None:
    torch.jit.script(trained).save(str(tmp_path / "model.pt"))
    assert growth_of("pytorch", tmp_path / "model.pt", X[:4], tmp_path) < 1.1


def test_the_weights_of_an_exported_program_go_without_waiting_for_a_collection(
    tmp_path: Path,
) -> None:
    heap = NativeHeap(trim_after_bytes=1)
    if heap.allocated_bytes() is None:
        pytest.skip("this C library does not say what is allocated")
    path = export(_Big(), (torch.ones(2, 1024),), tmp_path)
    RUNTIME.load(spec(path)).unload()
    gc.collect()
    gc.disable()
    try:
        before = heap.allocated_bytes()
        model = RUNTIME.load(spec(path))
        assert heap.allocated_bytes() - before > 8_000_000
        model.unload()
        assert heap.allocated_bytes() - before < 1_000_000
    finally:
        gc.enable()


async def test_an_exported_program_runs_in_a_worker_unless_told_otherwise(
    trained, expected, tmp_path: Path
) -> None:
    # torch.export.load unpickles: what is refused before is what is known to run code.
    path = tmp_path / "model.pt2"
    batch = ({0: torch.export.Dim("batch")},)
    torch.export.save(
        torch.export.export(trained, (torch.tensor(X[:2]),), dynamic_shapes=batch), str(path)
    )
    registry = RuntimeRegistry()
    assert registry.runs_isolated("pytorch", path) and registry.runs_isolated("pytorch", tmp_path)
    assert not registry.runs_isolated("pytorch", tmp_path / "model.pt")
    async with isolation(tmp_path, worker_memory_bytes=1 << 30) as workers:
        model = await workers.load("m", path=path, kind="pytorch")
        np.testing.assert_allclose(await answers_of(model, X), expected, atol=1e-6)
