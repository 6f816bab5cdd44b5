"""Requests for one copy that wait together: what is joined, and that each has its own answer."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import pytest

from bench.models import perceptron
from mesh.core.errors import DeadlineExceeded, Internal, InvalidArgument
from mesh.core.usage import Use
from mesh.instance.describe import describe
from mesh.instance.servable import Servable
from mesh.runtimes.api import Array, ModelSpec
from mesh.runtimes.registry import RuntimeRegistry
from mesh.runtimes.settings import RuntimeSettings
from protos import oip_pb2
from tests.instance.fakes import running, until, with_policy
from tests.instance.joined import (
    POISON,
    Reply,
    RowModel,
    centred,
    costly,
    doubled,
    executing,
    past,
    request,
)
from tests.instance.test_inference import Client
from tests.instance.test_inference import request as fake_request


def row(number: int) -> list[list[float]]:
    return [[float(number), 1.0]]


async def answers(replies: list[Reply]) -> list[object]:
    """Each one's values of ``y``, or its error."""
    found: list[object] = []
    for reply in replies:
        try:
            found.append((await reply.tensors())[1]["y"])
        except Exception as error:
            found.append(error)
    return found


async def test_what_waits_while_a_run_is_inside_is_joined_in_the_next() -> None:
    async with executing(RowModel(doubled)) as rig:
        rig.state(64)
        rig.servable.collects = False
        replies = [rig.submit(request(row(n))) for n in range(8)]
        assert await answers(replies) == [[[2.0 * n, 2.0]] for n in range(8)]
        assert rig.rows == [1, 7]


async def test_what_one_turn_of_the_loop_brings_is_joined_at_its_end() -> None:
    async with executing(RowModel(doubled)) as rig:
        rig.state(64)
        replies = [rig.submit(request(row(n))) for n in range(8)]
        assert await answers(replies) == [[[2.0 * n, 2.0]] for n in range(8)]
        assert rig.rows == [8]


async def test_a_quick_joined_run_is_in_the_event_loop() -> None:
    async with executing(RowModel(doubled), inline_max_us=50_000) as rig:
        rig.state(64)
        rig.quick()
        replies = [rig.submit(request(row(n))) for n in range(5)]
        assert await answers(replies) == [[[2.0 * n, 2.0]] for n in range(5)]
        assert rig.model.runs == [(5, "MainThread")]


@pytest.mark.parametrize(
    ("cores", "waits", "running"), [(1, False, 1), (2, False, 2), (1, True, 3)]
)
async def test_runs_that_compute_are_no_more_than_cores(
    cores: int, waits: bool, running: int
) -> None:
    async with executing(RowModel(doubled), threads=4, cores=cores) as rig:
        rig.state(64)
        rig.servable.collects = False
        rig.servable.batch.waits = waits
        rig.model.gate.clear()
        replies = [rig.submit(request(row(n))) for n in range(9)]
        assert rig.servable.running == running
        rig.model.gate.set()
        assert await answers(replies) == [[[2.0 * n, 2.0]] for n in range(9)]
        assert len(rig.rows) == running + 1


async def test_more_rows_than_may_be_joined_are_several_runs() -> None:
    async with executing(RowModel(doubled)) as rig:
        rig.state(4)
        replies = [rig.submit(request(row(n) * 2)) for n in range(5)]
        await answers(replies)
        assert rig.rows == [4, 4, 2]


async def test_a_request_larger_than_that_runs_alone() -> None:
    async with executing(RowModel(doubled)) as rig:
        rig.state(4)
        replies = [rig.submit(request(row(1) * count)) for count in (1, 9, 1)]
        await answers(replies)
        assert sorted(rig.rows) == [2, 9]


@pytest.mark.parametrize(
    "other",
    [
        pytest.param({"rows": [[1.0, 2.0, 3.0]]}, id="another width"),
        pytest.param({"rows": row(1), "outputs": ("y",)}, id="other outputs"),
        pytest.param({"rows": row(1), "factor": 3}, id="other parameters"),
    ],
)
async def test_unlike_requests_are_not_joined(other: dict[str, object]) -> None:
    async with executing(RowModel(doubled)) as rig:
        rig.state(64)
        await answers([rig.submit(request(row(1))), rig.submit(request(**other))])  # type: ignore[arg-type]
        assert rig.rows == [1, 1]


async def test_one_bad_request_among_good_ones_fails_alone() -> None:
    async with executing(RowModel(doubled)) as rig:
        rig.state(64)
        numbers = [1.0, 2.0, POISON, 4.0]
        found = await answers([rig.submit(request([[n, 0.0]])) for n in numbers])
        assert isinstance(found[2], InvalidArgument)
        assert [found[0], found[1], found[3]] == [[[2.0 * n, 0.0]] for n in (1.0, 2.0, 4.0)]
        assert rig.servable.batch.standing.blames == 0


async def test_one_bad_request_fails_alone_in_the_event_loop_too() -> None:
    async with executing(RowModel(doubled), inline_max_us=50_000) as rig:
        rig.state(64)
        rig.quick()
        found = await answers([rig.submit(request([[n, 0.0]])) for n in (1.0, POISON)])
        assert found[0] == [[2.0, 0.0]]
        assert isinstance(found[1], InvalidArgument)


async def test_a_bad_request_that_nobody_was_joined_with_runs_once() -> None:
    async with executing(RowModel(doubled), inline_max_us=50_000) as rig:
        rig.state(64)
        rig.quick()
        rig.servable.estimates[:] = [1_000] * len(rig.servable.estimates)
        (found,) = await answers([rig.submit(request([[POISON, 0.0]]))])
        assert isinstance(found, InvalidArgument)
        assert rig.model.runs == [(1, "MainThread")]
        assert rig.servable.use.in_flight == 0


async def test_a_model_that_does_not_answer_by_rows_is_run_alone_and_joined_no_more() -> None:
    def last(x: Array) -> Array:
        return x[-1:]

    async with executing(RowModel(last)) as rig:
        rig.state(64)
        for _ in range(3):
            found = await answers([rig.submit(request(row(n))) for n in range(4)])
            assert found == [row(n) for n in range(4)]
        assert rig.reason == "joined_fails"
        assert rig.changes == [("m", "joined_fails")]


async def test_expired_and_cancelled_requests_do_not_run() -> None:
    async with executing(RowModel(doubled)) as rig:
        rig.state(64)
        late = rig.submit(request(row(1)), deadline_s=past())
        gone = rig.submit(request(row(2)))
        gone.cancelled = True
        live = [rig.submit(request(row(n))) for n in (3, 4)]
        assert await answers(live) == [[[6.0, 2.0]], [[8.0, 2.0]]]
        with pytest.raises(DeadlineExceeded):
            await late.told
        assert rig.rows == [2]
        assert not gone.told.done()


async def test_a_request_is_held_for_others_as_long_as_the_owner_says() -> None:
    async with executing(RowModel(doubled)) as rig:
        rig.state(4, wait_us=60_000_000)
        replies = []
        for number in range(4):
            replies.append(rig.submit(request(row(number))))
            await asyncio.sleep(0)
            assert not rig.rows or number == 3
        await answers(replies)  # the fourth filled it up: nobody waits for the minute to pass
        assert rig.rows == [4]


async def test_a_request_that_is_held_in_vain_runs_alone() -> None:
    async with executing(RowModel(doubled)) as rig:
        rig.state(4, wait_us=2_000)
        assert await answers([rig.submit(request(row(1)))]) == [[[2.0, 2.0]]]


# ---- found out by trial ----


async def burst(rig: object, count: int, same: bool = False) -> list[object]:
    replies = [rig.submit(request(row(1 if same else n))) for n in range(count)]  # type: ignore[attr-defined]
    return await answers(replies)


async def test_a_model_that_gains_is_joined_after_its_trial() -> None:
    async with executing(RowModel(costly)) as rig:
        assert rig.reason == "not_tried"
        await burst(rig, 9)
        assert rig.reason == "faster"
        assert rig.changes == [("m", "faster")]
        assert await burst(rig, 8) == [[[2.0 * n, 2.0]] for n in range(8)]
        assert rig.rows[-1] == 8


@pytest.mark.parametrize("same", [False, True], ids=["differing requests", "equal requests"])
async def test_a_model_whose_rows_look_at_each_other_is_found_out(same: bool) -> None:
    async with executing(RowModel(centred)) as rig:
        found = await burst(rig, 9, same)
        assert found == [[[0.0, 0.0]]] * 9  # each alone: its own mean
        assert rig.reason == "answers_differ"
        assert await burst(rig, 9, same) == [[[0.0, 0.0]]] * 9
        assert max(rig.rows[-9:]) == 1


async def test_a_fixed_axis_is_never_joined() -> None:
    async with executing(RowModel(doubled, first_axis=1)) as rig:
        rig.state(64)
        await burst(rig, 9)
        assert rig.rows == [1] * 9
        assert rig.reason == "fixed_axis"


async def test_a_model_that_is_switched_off_is_never_tried() -> None:
    async with executing(RowModel(costly)) as rig:
        rig.state(0)
        await burst(rig, 20)
        assert rig.rows == [1] * 20


async def test_a_bad_request_in_a_trial_fails_alone() -> None:
    async with executing(RowModel(costly)) as rig:
        replies = [rig.submit(request([[n, 0.0]])) for n in (1.0, 2.0, POISON, 3.0)]
        found = await answers(replies)
        assert isinstance(found[2], InvalidArgument)
        assert found[3] == [[6.0, 0.0]]
        assert rig.reason == "not_tried"


async def test_an_unexpected_error_of_the_model_is_internal_and_its_own() -> None:
    def broken(x: Array) -> Array:
        if (x == 7).any():
            raise ZeroDivisionError("seven")
        return x

    async with executing(RowModel(broken)) as rig:
        rig.state(64)
        found = await burst(rig, 9)
        assert isinstance(found[7], Internal)
        assert "seven" in str(found[7])
        assert [n for n, one in enumerate(found) if isinstance(one, Exception)] == [7]


# ---- in an instance ----

INSIDE = with_policy(inline_max_us=0)


async def test_a_copy_is_unloaded_when_its_joined_runs_have_been_answered(tmp_path: Path) -> None:
    async with running(tmp_path, policy=INSIDE, inference_threads=2) as rig:
        rig.register("m", max_batch_size=64)
        await rig.load("m")
        client = Client(rig.instance.address)
        gate = rig.runtime.infer_gates["m"] = threading.Event()
        asking = [asyncio.create_task(client.infer(fake_request("m", 2))) for _ in range(6)]
        await until(lambda: rig.pod.servables["m"].use.in_flight == 6)
        unloading = asyncio.create_task(rig.pod.unload("m"))
        await asyncio.sleep(0)
        assert not rig.runtime.unloaded
        gate.set()
        replies = await asyncio.gather(*asking)
        assert all(len(reply.raw_output_contents[0]) == 8 for reply in replies)
        await unloading
        assert rig.runtime.unloaded == ["m"]
        await client.channel.close()


async def test_statistics_metrics_and_describe_tell_of_joined_runs(tmp_path: Path) -> None:
    async with running(tmp_path, policy=INSIDE, inference_threads=2) as rig:
        rig.register("m", max_batch_size=64)
        await rig.load("m")
        client = Client(rig.instance.address)
        gate = rig.runtime.infer_gates["m"] = threading.Event()
        asking = [asyncio.create_task(client.infer(fake_request("m", 2))) for _ in range(6)]
        await until(lambda: rig.pod.servables["m"].use.in_flight == 6)
        gate.set()
        await asyncio.gather(*asking)
        asked = oip_pb2.ModelStatisticsRequest(name="m")
        told = await client.ask("ModelStatistics", asked, oip_pb2.ModelStatisticsResponse)
        found = told.model_stats[0]
        assert (found.inference_stats.success.count, found.inference_count) == (6, 12)  # rows
        assert found.execution_count == len(rig.runtime.calls) < 6
        batching = describe(rig.pod, "m")["batching"]
        assert (batching["state"], batching["reason"]) == ("ON", "stated")
        assert batching["mean_rows"] > 2
        assert rig.instance.metrics.value("batch_size") >= 1
        await client.channel.close()


async def test_a_changed_record_switches_joining_off_and_on(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        rig.register("m", max_batch_size=8)
        await rig.load("m")
        batch = rig.pod.servables["m"].batch
        assert (batch.on, batch.terms.max_rows) == (True, 8)
        rig.register("m", max_batch_size=0)
        await until(lambda: not batch.on)
        rig.register("m", max_batch_size=16, max_batch_latency_ms=3)
        await until(lambda: batch.on)
        assert batch.wait_us == 3_000


# ---- what the model's own file says ----


@pytest.mark.parametrize(
    ("said", "reason", "rows", "wait_us"),
    [
        pytest.param("", "not_tried", 64, 0, id="nothing: it is found out"),
        pytest.param("max_batch_size: 0", "switched_off", 0, 0, id="never"),
        pytest.param("max_batch_size: 8", "not_tried", 8, 0, id="rows alone are a bound"),
        pytest.param(
            "max_batch_size: 8 dynamic_batching { max_queue_delay_microseconds: 300 }",
            "stated", 8, 300, id="dynamic batching",
        ),
    ],
)  # fmt: skip
def test_a_config_pbtxt_says_how_requests_are_joined(
    tmp_path: Path, said: str, reason: str, rows: int, wait_us: int
) -> None:
    (tmp_path / "model.onnx").write_bytes(perceptron([4, 3]))
    if said:
        (tmp_path / "config.pbtxt").write_text(said, "utf-8")
    registry = RuntimeRegistry(RuntimeSettings())
    model = registry.runtime_for("onnx").load(ModelSpec("m", "onnx", tmp_path))
    batch = Servable("m", "onnx", model, Use(), 4).batch
    assert batch.standing.reason.value == reason
    assert (batch.terms.max_rows, batch.terms.max_wait_us) == (rows, wait_us)
    model.unload()
