"""The router as a process, against a real etcd: start, wait, drain on SIGTERM."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from tests.etcd_server import EtcdServer, free_port

pytestmark = pytest.mark.etcd

WAIT_S = 60.0

PROGRAM = """
import logging, sys
from router.process import main
from router.settings import RouterSettings
logging.basicConfig(level="INFO")
etcd, grpc, rest, metrics = sys.argv[1:]
sys.exit(main(RouterSettings(
    grpc_port=int(grpc), rest_port=int(rest), metrics_port=int(metrics), etcd_endpoints=(etcd,),
    drain_notice_ms=0,
)))
"""


class RouterProcess:
    def __init__(self, etcd: str, grpc_port: int = 0, rest_port: int = 0) -> None:
        self.metrics_port = free_port()
        ports = map(str, (grpc_port, rest_port, self.metrics_port))
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, etcd, *ports],
            stderr=subprocess.PIPE,
            text=True,
        )

    def state(self) -> dict[str, object] | None:
        """The document of /readyz, None while nothing listens."""
        url = f"http://127.0.0.1:{self.metrics_port}/readyz"
        try:
            with urllib.request.urlopen(url, timeout=60) as reply:
                return dict(json.load(reply))
        except urllib.error.HTTPError as error:
            return dict(json.load(error))
        except OSError:
            return None

    def until(self, holds: Callable[[dict[str, object]], object]) -> dict[str, object]:
        end = time.monotonic() + WAIT_S
        while time.monotonic() < end:
            assert self.process.poll() is None, self.process.stderr.read()
            state = self.state()
            if state is not None and holds(state):
                return state
            time.sleep(0.02)
        raise AssertionError(f"in vain: {self.state()}")

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(WAIT_S)


@contextmanager
def router(etcd: str, **ports: int) -> Iterator[RouterProcess]:
    process = RouterProcess(etcd, **ports)
    try:
        yield process
    finally:
        process.process.kill()
        process.process.wait()
        process.process.stderr.close()


@pytest.fixture(scope="module")
def etcd() -> Iterator[EtcdServer]:
    with EtcdServer() as server:
        yield server


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_serves_and_ends_with_0(etcd: EtcdServer, number: signal.Signals) -> None:
    with router(etcd.endpoint) as process:
        state = process.until(lambda s: s["ready"] and s["leader"])
        assert state["store_connected"]
        assert process.end(number) == 0


def test_two_share_the_ports_and_one_leads(etcd: EtcdServer) -> None:
    ports = {"grpc_port": free_port(), "rest_port": free_port()}
    with router(etcd.endpoint, **ports) as one, router(etcd.endpoint, **ports) as two:
        first = one.until(lambda s: s["ready"] and s["leader"])
        second = two.until(lambda s: s["ready"] and s["leader"])
        assert first["leader"] == second["leader"]


def test_without_etcd_it_waits_and_says_so_and_serves_when_it_comes() -> None:
    with EtcdServer() as server:
        server.kill()
        with router(server.endpoint) as process:
            assert not process.until(lambda s: True)["ready"]
            line = process.process.stderr.readline()
            assert "waiting for etcd" in line
            assert server.endpoint in line
            server.start()
            process.until(lambda s: s["ready"])
            assert process.end() == 0


def test_told_to_end_while_it_waits_it_ends_with_0() -> None:
    with router("127.0.0.1:1") as process:
        process.until(lambda s: not s["ready"])
        assert process.end() == 0


def test_a_port_that_is_taken_is_an_error(etcd: EtcdServer) -> None:
    with router(etcd.endpoint, grpc_port=etcd.client_port) as process:
        assert process.process.wait(WAIT_S) != 0
        assert "cannot listen" in process.process.stderr.read().lower()
