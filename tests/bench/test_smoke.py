"""The harness itself: proxies start, content is compared, a broken proxy is found out."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from bench import __main__ as command
from bench import h2load, proxies, relay
from bench.effort import SMOKE
from bench.h2load import Load
from bench.payload import framed, infer_message
from bench.process import BenchError, free_port, python_child
from bench.proxies import Proxy
from bench.report import Report
from bench.verify import verify_echo

needs_h2load = pytest.mark.skipif(
    shutil.which("h2load") is None, reason="h2load is not installed (Debian: nghttp2-client)"
)


@needs_h2load
def test_the_router_relays_under_load_and_every_reply_is_counted(tmp_path: Path) -> None:
    body = tmp_path / "body"
    body.write_bytes(framed(infer_message(relay.MODEL, 400)))
    with proxies.echo_backend() as backend, proxies.mesh_router(backend.port) as router:
        verify_echo("mesh", router.port, relay.MODEL)
        run = h2load.run(router.port, body, Load(400, 4, 4), reply_bytes=405, log=True)
    assert run.requests == 400
    assert len(run.latencies_us) == 400


@needs_h2load
def test_answers_that_are_too_short_do_not_count(tmp_path: Path) -> None:
    body = tmp_path / "body"
    body.write_bytes(framed(infer_message("nobody-knows-this", 400)))
    with (
        proxies.echo_backend() as backend,
        proxies.mesh_router(backend.port) as router,
        pytest.raises(BenchError, match="not every request was answered in full"),
    ):
        # A trailers-only error is a 200 for h2load.
        h2load.run(router.port, body, Load(20, 2, 2), reply_bytes=405)


def test_a_proxy_that_is_no_proxy_is_found_out() -> None:
    with (
        proxies.echo_backend() as backend,
        proxies.mesh_router(backend.port) as router,
        pytest.raises(BenchError, match=r"mesh does not relay 400 bytes: (.|\n)*NOT_FOUND"),
    ):
        verify_echo("mesh", router.port, "nobody-knows-this")


def test_the_grpcio_baseline_passes_the_bytes() -> None:
    port = free_port()
    with python_child("echo", "bench.grpcio_echo", str(port)) as echo:
        echo.wait_for_port(port)
        with proxies.grpcio(port) as proxy:
            verify_echo(proxy.name, proxy.port, "any")


@needs_h2load
@pytest.mark.parametrize("start", [proxies.haproxy, proxies.envoy])
def test_the_other_baselines_pass_the_bytes(start: proxies.Start) -> None:
    try:
        with proxies.echo_backend() as backend, start(backend.port) as proxy:
            verify_echo(proxy.name, proxy.port, "any")
    except proxies.Unavailable as missing:
        pytest.skip(str(missing))


@needs_h2load
def test_a_scenario_makes_rows_and_figures(tmp_path: Path) -> None:
    report = Report("relay")
    bodies = relay.Bodies(tmp_path / "small", tmp_path / "large")
    bodies.small.write_bytes(framed(infer_message(relay.MODEL, relay.SMALL_BYTES)))
    with proxies.echo_backend() as direct, proxies.mesh_router(direct.port) as router:
        running: dict[str, Proxy] = {"direct": direct, "mesh": router}
        relay.small(report, SMOKE, running, bodies)
        relay.lone(report, SMOKE, running, bodies)
    assert [row["proxy"] for row in report.rows] == ["mesh", "direct", "mesh"]
    assert report.figures == []  # nobody to compare with: no figure, and no claim


def test_an_unknown_part_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(["relai"])
    assert "no part relai; there are relay, instance" in capsys.readouterr().err


def test_a_part_that_fails_is_told_and_makes_the_command_fail(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def broken(report: Report, effort: object) -> None:
        raise BenchError("content differs")

    parts = {"broken": ("", broken)}
    assert command.main(["--results", str(tmp_path)], parts) == 1
    assert "FAILED: content differs" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_a_part_that_misses_its_target_fails_only_when_strict(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def slow(report: Report, effort: object) -> None:
        report.figure("rate", relay.spread([1.0]), "at least", 2.0)

    parts = {"slow": ("", slow)}
    assert command.main(["slow", "--results", str(tmp_path)], parts) == 0
    assert "0 of 1 figures reached\n  not reached: rate" in capsys.readouterr().out
    assert command.main(["slow", "--results", str(tmp_path), "--strict"], parts) == 1
    assert (tmp_path / "slow.json").is_file()
