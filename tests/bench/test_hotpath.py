"""The measurement of the hit paths runs, and its answers are looked at."""

from __future__ import annotations

import pytest

from bench import hotpath

pytest.importorskip("onnx")


def test_every_path_is_measured_and_answered_in_full() -> None:
    found = {what: micros for what, micros, _ in hotpath.measure(requests=128, rounds=2)}
    assert set(found) == {"bare loop", "instance", "relay"}
    assert all(micros > 0 for micros in found.values())


def test_an_answer_that_is_missing_is_found_out() -> None:
    relay = hotpath.RelayPath()
    relay.run([(asked, b"") for asked, _ in relay.prepare(1, 0)])
    with pytest.raises(ValueError, match="not every relayed request was answered"):
        relay.check()


def test_the_command_prints_a_line_for_each(capsys: pytest.CaptureFixture[str]) -> None:
    assert hotpath.main(["--requests", "64", "--rounds", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["bare", "instance", "relay"]
