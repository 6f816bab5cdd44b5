"""What h2load, a metrics page and /proc say, and the requests that are sent."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench import density, h2load, scrape
from bench.payload import framed, infer_message
from bench.process import BenchError, Child, cpu_seconds
from protos import oip_pb2

OUTPUT = """\
starting benchmark...
finished in 1.25s, 8000.00 req/s, 3.86MB/s
requests: 10000 total, 10000 started, 10000 done, 9990 succeeded, 10 failed, 0 errored, 0 timeout
status codes: 9990 2xx, 0 3xx, 10 4xx, 0 5xx
traffic: 4.82MB (5051072) total, 312.52KB (320016) headers (space savings 95.79%), 3.86MB (4050000) data
                     min         max         mean         sd        +/- sd
time for request:      205us     15.11ms      1.61ms       512us    80.50%
time for connect:       84us       433us       215us       120us    62.50%
"""  # noqa: E501


def test_the_summary_is_read() -> None:
    run = h2load.parse(OUTPUT, (1, 2))
    assert (run.requests, run.seconds, run.data_bytes) == (9_990, 1.25, 4_050_000)
    assert (run.mean_us, run.max_us, run.latencies_us) == (1_610.0, 15_110.0, (1, 2))
    assert run.rate == pytest.approx(7_992)


@pytest.mark.parametrize(
    ("written", "seconds"), [("1.25s", 1.25), ("934.98ms", 0.93498), ("500us", 0.0005), ("1m", 60)]
)
def test_durations_in_every_unit(written: str, seconds: float) -> None:
    assert h2load.parse(OUTPUT.replace("1.25s", written)).seconds == pytest.approx(seconds)


def test_output_that_is_not_a_summary_is_refused() -> None:
    with pytest.raises(BenchError, match="cannot read h2load"):
        h2load.parse("could not connect")


def test_only_answered_requests_of_a_log_count(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("1700000000000000\t200\t512\n1700000000000001\t503\t9\n", "ascii")
    assert h2load.read_log(log) == (512,)


@given(st.integers(64, 70_000))
def test_a_request_has_exactly_the_size_that_was_asked_for(size: int) -> None:
    message = infer_message("bench-model", size)
    assert len(message) == size
    request = oip_pb2.ModelInferRequest.FromString(message)
    assert request.model_name == "bench-model"
    assert request.inputs[0].shape[0] == len(request.raw_input_contents[0])


def test_a_size_that_is_too_small_is_refused() -> None:
    with pytest.raises(ValueError, match="does not fit into 20 bytes"):
        infer_message("bench-model", 20)


def test_a_frame_is_prefix_and_message() -> None:
    assert framed(b"abc") == b"\x00\x00\x00\x00\x03abc"


def test_zipf_is_the_same_for_a_seed_and_falls_with_the_rank() -> None:
    names = density.names_of(1_000)
    drawn = density.zipf_sequence(names, 20_000, seed=1)
    assert drawn == density.zipf_sequence(names, 20_000, seed=1)
    count = Counter(drawn)
    assert set(drawn) <= set(names)
    assert count[names[0]] > 5 * count[names[9]] > 0
    assert len(count) > 500


def test_a_page_is_added_up_over_labels() -> None:
    text = '# HELP a b\na{x="1"} 2\na{x="}"} 3.5\nb 1e3\nc_bucket{le="+Inf"} 7\n'
    assert scrape.parse(text) == {"a": 5.5, "b": 1_000.0, "c_bucket": 7.0}


def test_cpu_of_a_process_grows_with_its_work() -> None:
    before = cpu_seconds(os.getpid())
    total, rounds = 0, 0
    while cpu_seconds(os.getpid()) < before + 0.03 and rounds < 10_000:
        total += sum(range(10_000))
        rounds += 1
    assert cpu_seconds(os.getpid()) >= before + 0.03


def test_a_child_that_dies_early_is_quoted() -> None:
    with Child("loser", ["/bin/sh", "-c", "echo no luck; exit 3"]) as child:
        assert child.wait_for_exit(10) == 3
        with pytest.raises(BenchError, match="loser ended with 3: no luck"):
            child.check()


def test_a_child_is_ended_by_its_pid() -> None:
    with Child("sleeper", ["/bin/sleep", "600"]) as child:
        pid = child.pid
        child.check()
    assert not Path(f"/proc/{pid}").exists()
