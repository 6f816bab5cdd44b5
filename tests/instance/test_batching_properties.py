"""Any mix of requests: each gets exactly what the model says to it alone, or its own error."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from mesh.core.errors import DeadlineExceeded, InvalidArgument
from mesh.instance.batching import agree, alike, all_equal, fits, join, other_row, split
from mesh.oip.call import InferCall, InferHead, rows_of
from mesh.runtimes.api import ModelMetadata, Tensor, TensorSpec
from tests.instance.joined import POISON, Reply, RowModel, doubled, executing, past, request


@dataclass(frozen=True)
class Asked:
    rows: int
    width: int
    value: float
    outputs: tuple[str, ...]
    factor: int | None
    fate: str  # what becomes of it

    def content(self) -> list[list[float]]:
        first = POISON if self.fate == "poisoned" else self.value
        return [[first + n, *[self.value] * (self.width - 1)] for n in range(self.rows)]

    def expected(self) -> dict[str, list[object]]:
        x = np.array(self.content(), np.float32)
        made = {
            "y": (x * 2 * np.float32(1 if self.factor is None else self.factor)).tolist(),
            "sums": x.sum(axis=1, dtype=np.float32).tolist(),
        }
        return {name: made[name] for name in self.outputs or ("y", "sums")}


ASKED = st.builds(
    Asked,
    rows=st.sampled_from([1, 1, 1, 2, 3, 9]),
    width=st.sampled_from([2, 2, 2, 3]),
    value=st.integers(-50, 50).map(float),
    outputs=st.sampled_from([(), (), ("y",), ("sums", "y")]),
    factor=st.sampled_from([None, None, 1, 3]),
    fate=st.sampled_from(["lives"] * 8 + ["poisoned", "expired", "cancelled"]),
)
# True: a turn of the loop passes.
STEPS = st.lists(st.one_of(ASKED, ASKED, ASKED, st.just(True)), min_size=1, max_size=40)


@settings(max_examples=60, deadline=None)
@given(
    steps=STEPS,
    rows_max=st.integers(2, 12),
    wait_us=st.sampled_from([None, None, 200]),
    stated=st.booleans(),
    quick=st.booleans(),
    threads=st.integers(2, 4),
)
def test_every_request_gets_its_own_answer(
    steps: list[Asked | bool],
    rows_max: int,
    wait_us: int | None,
    stated: bool,
    quick: bool,
    threads: int,
) -> None:
    async def scenario() -> None:
        bound = 50_000 if quick else 0
        async with executing(RowModel(doubled), threads=threads, inline_max_us=bound) as rig:
            if stated:
                rig.state(rows_max, wait_us)
            if quick:
                rig.quick()
            sent: list[tuple[int, Asked, Reply]] = []
            for number, step in enumerate(steps):
                if isinstance(step, bool):
                    await asyncio.sleep(0)
                    continue
                message = request(step.content(), str(number), step.outputs, step.factor)
                deadline_s = past() if step.fate == "expired" else float("inf")
                reply = rig.submit(message, deadline_s)
                reply.cancelled = step.fate == "cancelled"
                sent.append((number, step, reply))
            await rig.quiet()
            for number, step, reply in sent:
                await judge(str(number), step, reply)
            if stated:
                assert all(rows <= max(rows_max, 9) for rows in rig.rows)

    asyncio.run(scenario())


async def judge(ident: str, asked: Asked, reply: Reply) -> None:
    """Who is not waited for may have been answered in time; nobody else's answer is right."""
    if not reply.told.done():
        assert asked.fate == "cancelled"
        return
    error = reply.told.exception()
    if isinstance(error, DeadlineExceeded):
        assert asked.fate == "expired"
    elif isinstance(error, InvalidArgument):
        assert asked.fate == "poisoned"
    else:
        assert asked.fate != "poisoned"
        assert await reply.tensors() == (ident, asked.expected())


# ---- joining and taking apart ----


def call(head: InferHead | None = None, **inputs: np.ndarray) -> InferCall:
    return InferCall(inputs, "", head or InferHead())


@given(
    counts=st.lists(st.integers(1, 5), min_size=1, max_size=6),
    kind=st.sampled_from(["f4", "f8", "i8", "?", "O"]),
    order=st.sampled_from("CF"),
)
def test_what_is_joined_and_split_is_what_it_was(counts: list[int], kind: str, order: str) -> None:
    parts = []
    for number, count in enumerate(counts):
        data = np.arange(count * 3).reshape(count, 3) + 100 * number
        if kind == "O":
            text = [str(value).encode() for value in data.ravel()]
            made = np.empty(data.size, object)
            made[:] = text
            parts.append({"x": made.reshape(data.shape)})
        else:
            parts.append({"x": data.astype(kind)})
    whole = np.asarray(join(parts)["x"], order=order)
    shares = split([Tensor("y", "any", whole)], counts, sum(counts))
    for part, share in zip(parts, shares, strict=True):
        assert share[0].data.tolist() == part["x"].tolist()
        assert share[0].data.flags.c_contiguous


SPEC = TensorSpec("x", "FP32", (-1, 3))


def test_only_free_first_axes_fit() -> None:
    def metadata(*outputs: TensorSpec) -> ModelMetadata:
        return ModelMetadata("", (), (SPEC,), outputs)

    assert fits(metadata(TensorSpec("y", "FP32", (-1,))))
    assert not fits(metadata(TensorSpec("y", "FP32", (1, -1))))
    assert not fits(metadata(TensorSpec("y", "FP32", ())))
    assert not fits(metadata(TensorSpec("y", "FP32", (), any_rank=True)))
    assert not fits(metadata())


def test_a_flat_array_for_a_model_that_takes_anything_is_not_joined() -> None:
    anything = ModelMetadata("", (), (SPEC,), (SPEC,), accepts_any_input=True)
    assert rows_of(call(x=np.zeros((2, 3), np.float32)), anything) == 2
    assert rows_of(call(x=np.zeros(3, np.float32)), anything) == 0
    assert rows_of(call(a=np.zeros((2, 1)), b=np.zeros((2, 1))), anything) == 0


def test_inputs_of_unequal_rows_and_empty_ones_are_not_joined() -> None:
    two = ModelMetadata("", (), (SPEC, TensorSpec("z", "FP32", (-1, 3))), (SPEC,))
    x, z = np.zeros((2, 3), np.float32), np.zeros((1, 3), np.float32)
    assert rows_of(call(x=x, z=z), two) == 0
    assert rows_of(call(x=z[:0], z=z[:0]), two) == 0
    assert rows_of(call(x=np.float32(1).reshape(()), z=z), two) == 0


def test_parameters_that_only_look_equal_keep_requests_apart() -> None:
    x = np.zeros((1, 3), np.float32)
    heads = [InferHead(parameters={"p": value}) for value in (True, 1, 1.0, "1")]
    for one in heads:
        for other in heads:
            assert alike(call(one, x=x), call(other, x=x)) == (one is other)
    assert alike(call(InferHead(parameters={"p": 1}), x=x), call(heads[1], x=x))


def test_other_datatypes_and_names_keep_requests_apart() -> None:
    x = np.zeros((1, 3), np.float32)
    assert alike(call(x=x), call(x=np.ones((4, 3), np.float32)))
    assert not alike(call(x=x), call(x=x.astype(np.float64)))
    assert not alike(call(x=x), call(y=x))
    assert not alike(call(x=x), call(x=x, y=x))


def tensor(data: object, datatype: str = "FP32", dtype: str = "f4") -> list[Tensor]:
    return [Tensor("y", datatype, np.array(data, dtype))]


def test_answers_agree_within_what_other_kernels_change() -> None:
    one = tensor([1.0, 1000.0, np.nan, np.inf])
    assert agree(one, tensor([1.000005, 1000.005, np.nan, np.inf]))
    assert agree(tensor([1e-7, 1.0]), tensor([0.0, 1.0]))  # small beside the largest
    assert not agree(one, tensor([1.01, 1000.0, np.nan, np.inf]))
    assert not agree(one, tensor([1.0, 1000.0, 0.0, np.inf]))
    assert not agree(tensor([1e-7]), tensor([2e-7]))
    half = tensor([1.0], "FP16", "f2")
    assert agree(half, tensor([1.001], "FP16", "f2"))
    assert not agree(half, tensor([1.1], "FP16", "f2"))


def test_whole_numbers_and_text_agree_exactly() -> None:
    assert agree(tensor([1, 2], "INT64", "i8"), tensor([1, 2], "INT64", "i8"))
    assert not agree(tensor([10**9], "INT64", "i8"), tensor([10**9 + 1], "INT64", "i8"))
    assert not agree(tensor([b"a"], "BYTES", "O"), tensor([b"b"], "BYTES", "O"))
    assert not agree(tensor([[1.0]]), tensor([1.0]))


def test_equal_requests_are_recognised_and_get_a_row_that_is_unlike() -> None:
    x = {"x": np.array([[1.0, 2.0]], np.float32)}
    assert all_equal([x, {"x": x["x"].copy()}])
    assert not all_equal([x, {"x": x["x"] + 1}])
    for data in ([[1.0, 2.0]], [[0.0, 0.0]]):
        made = other_row({"x": np.array(data, np.float32)})
        assert made is not None and made["x"].dtype == np.float32
        assert made["x"].tolist() != data
    assert other_row({"x": np.array([[0, 0]])}) is not None
    assert other_row({"x": np.array([[b"a"]], object)}) is None
