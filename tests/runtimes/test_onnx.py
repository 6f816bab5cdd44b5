"""ONNX models: what is loaded, answered, measured and refused."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from onnx import TensorProto, helper

from mesh.core.errors import Code, InvalidArgument, LoadFailed, Unavailable
from mesh.runtimes.api import TensorSpec
from mesh.runtimes.native_memory import NativeHeap
from mesh.runtimes.onnx import OnnxRuntime, settle_size

from .models import identity, matmul, spec, with_external_weights, write

RUNTIME = OnnxRuntime()


def test_metadata_is_the_sessions(tmp_path: Path) -> None:
    model = RUNTIME.load(spec(matmul(tmp_path / "model.onnx")))
    assert model.metadata.platform == "onnxruntime_onnx"
    assert model.metadata.inputs == (TensorSpec("x", "FP32", (-1, 4)),)
    assert model.metadata.outputs == (TensorSpec("y", "FP32", (-1, 3)),)


def test_answers_are_numpys(tmp_path: Path) -> None:
    model = RUNTIME.load(spec(matmul(tmp_path / "model.onnx", seed=3)))
    weights = np.random.default_rng(3).standard_normal((4, 3)).astype(np.float32)
    x = np.arange(8, dtype=np.float32).reshape(2, 4)
    x.flags.writeable = False
    (answer,) = model.infer({"x": x}, (), {})
    assert (answer.name, answer.datatype) == ("y", "FP32")
    np.testing.assert_allclose(answer.data, x @ weights, rtol=1e-5)


@pytest.mark.parametrize(
    ("kind", "onnx_type", "values"),
    [
        ("BOOL", TensorProto.BOOL, np.array([True, False])),
        ("UINT8", TensorProto.UINT8, np.array([0, 255], np.uint8)),
        ("UINT16", TensorProto.UINT16, np.array([0, 65535], np.uint16)),
        ("UINT32", TensorProto.UINT32, np.array([0, 2**32 - 1], np.uint32)),
        ("UINT64", TensorProto.UINT64, np.array([0, 2**64 - 1], np.uint64)),
        ("INT8", TensorProto.INT8, np.array([-128, 127], np.int8)),
        ("INT16", TensorProto.INT16, np.array([-(2**15), 1], np.int16)),
        ("INT32", TensorProto.INT32, np.array([-(2**31), 1], np.int32)),
        ("INT64", TensorProto.INT64, np.array([-(2**63), 1], np.int64)),
        ("FP16", TensorProto.FLOAT16, np.array([0.5, -2], np.float16)),
        ("FP32", TensorProto.FLOAT, np.array([0.5, -2], np.float32)),
        ("FP64", TensorProto.DOUBLE, np.array([0.5, -2], np.float64)),
        ("BYTES", TensorProto.STRING, np.array(["é".encode(), b"a\x00b", b""], object)),
        (
            "BF16",
            TensorProto.BFLOAT16,
            np.array([0.5, -2, 3], ml_dtypes.bfloat16).view(np.uint16),
        ),
    ],
)
def test_every_datatype_goes_through(
    kind: str, onnx_type: int, values: np.ndarray, tmp_path: Path
) -> None:
    model = RUNTIME.load(spec(identity(tmp_path / "model.onnx", onnx_type)))
    assert model.metadata.inputs[0].datatype == kind
    for array in (values, values[:0]):
        (answer,) = model.infer({"x": array}, ["y"], {})
        assert answer.datatype == kind
        assert answer.data.dtype == values.dtype
        assert answer.data.tolist() == array.tolist()


def test_text_that_is_not_utf8_is_the_clients_fault(tmp_path: Path) -> None:
    model = RUNTIME.load(spec(identity(tmp_path / "model.onnx", TensorProto.STRING)))
    with pytest.raises(InvalidArgument, match="'x': element 1 is not UTF-8"):
        model.infer({"x": np.array([b"a", b"\xff"], object)}, (), {})


def test_an_unknown_rank_is_said_so(tmp_path: Path) -> None:
    model = RUNTIME.load(spec(identity(tmp_path / "model.onnx", TensorProto.FLOAT, None)))
    assert model.metadata.inputs[0].any_rank
    x = np.ones((1, 2, 3), np.float32)
    assert model.infer({"x": x}, (), {})[0].data.shape == (1, 2, 3)


def test_named_outputs_come_alone_and_in_order(tmp_path: Path) -> None:
    path = write(
        tmp_path / "model.onnx",
        [helper.make_node("Neg", ["x"], ["a"]), helper.make_node("Abs", ["x"], ["b"])],
        {"x": (TensorProto.FLOAT, ["n"])},
        {"a": (TensorProto.FLOAT, ["n"]), "b": (TensorProto.FLOAT, ["n"])},
    )
    model = RUNTIME.load(spec(path))
    x = np.array([1.0], np.float32)
    for asked, answered in (((), "ab"), (("b",), "b"), (("b", "a"), "ba")):
        assert "".join(tensor.name for tensor in model.infer({"x": x}, asked, {})) == answered


def test_a_zipmaps_rows_become_a_tensor(tmp_path: Path) -> None:
    path = write(
        tmp_path / "model.onnx",
        [
            helper.make_node(
                "ZipMap", ["x"], ["p"], domain="ai.onnx.ml", classlabels_int64s=[10, 20]
            )
        ],
        {"x": (TensorProto.FLOAT, ["n", 2])},
        {},
    )
    import onnx

    model_proto = onnx.load(path)
    value = model_proto.graph.output.add(name="p")
    row = value.type.sequence_type.elem_type.map_type
    row.key_type = TensorProto.INT64
    row.value_type.tensor_type.elem_type = TensorProto.FLOAT
    onnx.save(model_proto, path)
    model = RUNTIME.load(spec(path))
    assert model.metadata.outputs == (TensorSpec("p", "FP32", (-1, -1)),)
    x = np.array([[0.25, 0.75], [1, 0]], np.float32)
    np.testing.assert_array_equal(model.infer({"x": x}, (), {})[0].data, x)


def test_what_onnxruntime_refuses_is_an_invalid_argument(tmp_path: Path) -> None:
    path = write(
        tmp_path / "model.onnx",
        [helper.make_node("Gather", ["x", "i"], ["y"])],
        {"x": (TensorProto.FLOAT, ["n"]), "i": (TensorProto.INT64, ["k"])},
        {"y": (TensorProto.FLOAT, ["k"])},
    )
    model = RUNTIME.load(spec(path))
    with pytest.raises(InvalidArgument, match="out of data bounds"):
        model.infer({"x": np.ones(2, np.float32), "i": np.array([5])}, (), {})


class TestFiles:
    def test_a_file_a_folder_and_a_folder_with_one_onnx_file(self, tmp_path: Path) -> None:
        named = matmul(tmp_path / "a" / "model.onnx")
        other = matmul(tmp_path / "b" / "net.onnx")
        for path in (named, named.parent, other, other.parent):
            RUNTIME.load(spec(path)).unload()

    def test_no_file_or_several_are_refused_by_name(self, tmp_path: Path) -> None:
        with pytest.raises(LoadFailed, match=r"'the-model'.*no model\.onnx; found no \.onnx"):
            RUNTIME.load(spec(tmp_path))
        matmul(tmp_path / "a.onnx")
        matmul(tmp_path / "b.onnx")
        with pytest.raises(LoadFailed, match=r"a\.onnx, b\.onnx"):
            RUNTIME.load(spec(tmp_path))
        with pytest.raises(LoadFailed, match="no file or folder"):
            RUNTIME.load(spec(tmp_path / "nowhere"))

    @pytest.mark.parametrize(
        "content", [b"", b"garbage" * 20, b"\x0a\xff", b"\x08\x08\x3a\x02\x0a\x00"]
    )
    def test_a_corrupt_file_says_why(self, content: bytes, tmp_path: Path) -> None:
        path = tmp_path / "model.onnx"
        path.write_bytes(content)
        assert RUNTIME.predict_size_bytes(spec(path)) > 0
        with pytest.raises(LoadFailed) as caught:
            RUNTIME.load(spec(path))
        assert caught.value.code is Code.FAILED_PRECONDITION
        assert "onnxruntime cannot load model.onnx: " in caught.value.message
        assert str(tmp_path) not in caught.value.message

    def test_a_cut_off_file(self, tmp_path: Path) -> None:
        path = matmul(tmp_path / "model.onnx", 64, 64)
        path.write_bytes(path.read_bytes()[:-100])
        with pytest.raises(LoadFailed, match="PROTOBUF"):
            RUNTIME.load(spec(path))


class TestExternalData:
    WEIGHTS = np.eye(4, dtype=np.float32)

    def test_inside_the_folder_it_is_loaded_and_counted(self, tmp_path: Path) -> None:
        path = with_external_weights(tmp_path / "m" / "model.onnx", "w.bin")
        (path.parent / "w.bin").write_bytes(self.WEIGHTS.tobytes() + bytes(1_000_000))
        assert RUNTIME.predict_size_bytes(spec(path)) > 1_000_000
        x = np.ones((1, 4), np.float32)
        (answer,) = RUNTIME.load(spec(path)).infer({"x": x}, (), {})
        np.testing.assert_array_equal(answer.data, x)

    @pytest.mark.parametrize("location", ["../secret.bin", "{root}/secret.bin", "link.bin"])
    def test_outside_the_folder_it_is_refused(self, location: str, tmp_path: Path) -> None:
        secret = tmp_path / "secret.bin"
        secret.write_bytes(self.WEIGHTS.tobytes())
        path = with_external_weights(tmp_path / "m" / "model.onnx", location.format(root=tmp_path))
        (path.parent / "link.bin").symlink_to(secret)
        with pytest.raises(LoadFailed, match=r"cannot load model\.onnx.*(escapes|[Aa]bsolute)"):
            RUNTIME.load(spec(path.parent))


class TestSize:
    def test_predicted_is_not_below_measured_and_measured_covers_the_weights(
        self, tmp_path: Path
    ) -> None:
        for rows, columns in ((4, 3), (64, 1024), (512, 2048)):
            path = matmul(tmp_path / "model.onnx", rows, columns)
            model = RUNTIME.load(spec(path))
            assert rows * columns * 4 * 0.9 <= model.size_bytes
            assert model.size_bytes <= 1.1 * RUNTIME.predict_size_bytes(spec(path))

    def test_many_nodes_are_predicted(self, tmp_path: Path) -> None:
        nodes = [helper.make_node("Sin", [f"t{i}"], [f"t{i + 1}"]) for i in range(300)]
        path = write(
            tmp_path / "model.onnx",
            nodes,
            {"t0": (TensorProto.FLOAT, ["n"])},
            {"t300": (TensorProto.FLOAT, ["n"])},
        )
        model = RUNTIME.load(spec(path))
        assert model.size_bytes > 20 * path.stat().st_size
        assert model.size_bytes <= RUNTIME.predict_size_bytes(spec(path))

    @pytest.mark.parametrize(
        ("measured", "settled"),
        [(None, 2_000_000), (1_500_000, 1_500_000), (-5, 900_000), (10**9, 4_000_000)],
    )
    def test_a_measurement_is_believed_within_bounds(
        self, measured: int | None, settled: int
    ) -> None:
        assert settle_size(measured, 2_000_000, 1_000_000) == settled

    def test_overlapping_measurements_are_not_believed(self) -> None:
        heap = NativeHeap()
        with heap.measure() as outer, heap.measure() as inner:
            pass
        assert (outer.bytes_, inner.bytes_) == (None, None)
        with heap.measure() as alone:
            pass
        assert alone.bytes_ is not None or heap.allocated_bytes() is None


def test_unload_gives_the_memory_back(tmp_path: Path) -> None:
    heap = NativeHeap(trim_after_bytes=1)
    if heap.allocated_bytes() is None:
        pytest.skip("this C library does not say what is allocated")
    runtime = OnnxRuntime(heap=heap)
    path = matmul(tmp_path / "model.onnx", 1024, 4096)
    runtime.load(spec(path)).unload()
    before = heap.allocated_bytes()
    model = runtime.load(spec(path))
    assert heap.allocated_bytes() - before > 15_000_000
    model.unload()
    assert heap.allocated_bytes() - before < 2_000_000
    with pytest.raises(Unavailable, match="unloaded"):
        model.infer({"x": np.ones((1, 1024), np.float32)}, (), {})


def test_infer_from_many_threads(tmp_path: Path) -> None:
    model = RUNTIME.load(spec(matmul(tmp_path / "model.onnx", 64, 64, seed=1)))
    weights = np.random.default_rng(1).standard_normal((64, 64)).astype(np.float32)
    start = threading.Barrier(4)

    def ask(worker: int) -> float:
        start.wait(timeout=60)
        worst = 0.0
        for number in range(50):
            x = np.full((1, 64), worker * 100 + number, np.float32)
            answer = model.infer({"x": x}, (), {})[0].data
            worst = max(worst, float(np.abs(answer - x @ weights).max() / (1 + x[0, 0])))
        return worst

    with ThreadPoolExecutor(4) as pool:
        assert max(pool.map(ask, range(4))) < 1e-3
