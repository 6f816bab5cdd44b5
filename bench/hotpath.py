"""CPU per request of the hit paths, without sockets: ``python -m bench.hotpath``.

The bytes of eight clients, eight requests a read, go straight into the connections of a real
server: the instance's with its real handlers, executor and a small ONNX model, and the router's
relay with its peer played by prepared replies. What a loop, a kernel and another process cost is
left out, so the figure repeats within a few per cent on a busy machine, and is for comparing two
versions of the code, not for comparing with anybody else. The best of several rounds counts.
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import pstats
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import uvloop

from bench import bare_loop
from bench.models import check_reply, request_for, small_model
from bench.payload import INFER_PATH, framed, infer_message
from mesh.core.policy import Policy
from mesh.core.usage import Use
from mesh.instance.carrier import Carrier
from mesh.instance.clock import Clock
from mesh.instance.executor import Executor
from mesh.instance.inference import Inference
from mesh.instance.servable import Servable
from mesh.metrics import InstanceMetrics
from mesh.runtimes.api import ModelSpec
from mesh.runtimes.onnx import OnnxRuntime
from mesh.wire import frames, hpack, messages
from mesh.wire.connection import Connection
from mesh.wire.limits import INSIDE, PUBLIC
from mesh.wire.relay import Relay, Upstream
from mesh.wire.server import Server, Unary

MODEL = "bench-small"
CONNECTIONS = 8
STREAMS = 8
RELAYED_BYTES = 400
WARM_READS = 20


def _head(*more: tuple[bytes, bytes]) -> bytes:
    fields = [
        (b":method", b"POST"), (b":scheme", b"http"), (b":path", INFER_PATH.encode()),
        (b":authority", b"127.0.0.1:8033"), (b"te", b"trailers"),
        (b"content-type", b"application/grpc"), (b"user-agent", b"h2load"), *more,
    ]  # fmt: skip
    return hpack.encode(fields)


def _frame(kind: int, flags: int, stream_id: int, payload: bytes) -> bytes:
    return frames.frame_header(len(payload), kind, flags, stream_id) + payload


def _request(block: bytes, body: bytes, stream_id: int) -> bytes:
    return _frame(1, 4, stream_id, block) + _frame(0, 1, stream_id, body)


def _reply(body: bytes, stream_id: int) -> bytes:
    return (
        _frame(1, 4, stream_id, messages.OK_HEADERS)
        + _frame(0, 0, stream_id, body)
        + _frame(1, 5, stream_id, messages.OK_TRAILERS)
    )


def _reads(count: int, make: Callable[[int], bytes], first: int = 1) -> list[bytes]:
    """``count`` reads of STREAMS pieces each, for the stream ids that a client counts up."""
    ids = iter(range(first, first + 2 * count * STREAMS, 2))
    return [b"".join(make(next(ids)) for _ in range(STREAMS)) for _ in range(count)]


class _Client:
    """A connection that a client has opened, and what it was answered last."""

    def __init__(self, server: Any, *, inside: bool) -> None:
        self.conn = Connection(server, INSIDE if inside else PUBLIC, client=False)
        self.conn.receive(frames.PREFACE + frames.settings({}), time.monotonic())
        self.conn.take_output()
        self.reply = b""

    def receive(self, data: bytes) -> None:
        self.conn.receive(data, time.monotonic())

    def take(self) -> None:
        if self.conn.dirty:
            self.reply = b"".join(self.conn.take_output())
        self.conn.send_window = frames.MAX_WINDOW  # clients give credit back now and then


class InstancePath:
    """Everything of an instance between its socket and its model."""

    def __init__(self, folder: Path) -> None:
        path = folder / "model.onnx"
        path.write_bytes(small_model())
        model = OnnxRuntime().load(ModelSpec(MODEL, "onnx", path))
        self.use = Use()
        self.servable = Servable(MODEL, "onnx", model, self.use, 64)
        self.executor = Executor(
            Policy(), 1, InstanceMetrics(), Clock().offset_ms,
            on_idle=lambda model_id: None, idle_wanted=lambda: False,
        )  # fmt: skip
        carrier = Carrier(
            Policy(), InstanceMetrics(), Clock().offset_ms, on_idle=lambda model_id: None,
            idle_wanted=lambda: False, on_lost=lambda model_id: None,
        )  # fmt: skip
        inference = Inference({MODEL: self.servable}, self.executor, carrier)
        methods = {INFER_PATH: Unary(inference.model_infer, inference.accept)}
        server = Server(methods, limits=INSIDE)
        self.clients = [_Client(server, inside=True) for _ in range(CONNECTIONS)]
        self.message = request_for(MODEL)
        self._block = _head((b"mm-model-id", MODEL.encode()))

    def prepare(self, reads: int, done: int) -> list[bytes]:
        body = framed(self.message)
        first = 1 + 2 * STREAMS * done
        return _reads(reads, lambda stream_id: _request(self._block, body, stream_id), first)

    async def run(self, reads: list[bytes]) -> None:
        clients = self.clients
        for data in reads:
            for client in clients:
                client.receive(data)
                client.take()
            while True:  # the next turn of the loop, and more while requests wait for one
                await asyncio.sleep(0)
                if not self.executor.busy:
                    break
                await asyncio.sleep(0.0001)
            for client in clients:
                client.take()

    def check(self) -> None:
        for client in self.clients:
            if client.conn.streams:
                raise ValueError(f"{len(client.conn.streams)} requests were not answered")
            start = client.reply.index(messages.OK_HEADERS) + len(messages.OK_HEADERS)
            size = int.from_bytes(client.reply[start : start + 3], "big")
            check_reply(MODEL, client.reply[start + 14 : start + 9 + size])

    @property
    def inline_share(self) -> float:
        found = self.servable.statistics
        return found.inline_count / max(1, found.success_count)


class RelayPath:
    """The wire level of a router: a client's connection, the relay, and one back end's."""

    def __init__(self) -> None:
        up = Upstream("127.0.0.1:1")
        field = hpack.encode_literal(b"mm-model-id", MODEL.encode())
        paths = frozenset({INFER_PATH})
        director: Any = SimpleNamespace(
            route=lambda call: call.forward(up, field),
            failed=lambda call, up, failure: None,
            done=lambda call, code, now_s: None,
        )
        relay = Relay(director, peek=paths, idempotent=paths, limits=PUBLIC)
        self.client = _Client(Server({}, fallback=relay), inside=False)
        self.back = Connection(up, INSIDE, client=True)
        self.back.on_dirty = lambda conn: None
        self.back.receive(frames.settings({}), 0.0)
        self.body = framed(infer_message(MODEL, RELAYED_BYTES))
        self._block = _head()

    def prepare(self, reads: int, done: int) -> list[tuple[bytes, bytes]]:
        first = 1 + 2 * STREAMS * done
        asked = _reads(reads, lambda i: _request(self._block, self.body, i), first)
        answers = _reads(reads, lambda i: _reply(self.body, i), first)
        return list(zip(asked, answers, strict=True))

    def run(self, reads: list[tuple[bytes, bytes]]) -> None:
        client, back = self.client, self.back
        for asked, answered in reads:
            client.receive(asked)
            b"".join(back.take_output())
            back.receive(answered, 1.0)
            client.take()
            back.send_window = frames.MAX_WINDOW

    def check(self) -> None:
        if self.client.conn.streams or self.back.streams:
            raise ValueError("not every relayed request was answered")
        if self.client.reply.count(self.body) != STREAMS:
            raise ValueError("the relay has changed what it passed on")


def measure(requests: int, rounds: int) -> Iterator[tuple[str, float, str]]:
    """(path, CPU us a request, remark), best of the rounds, which take turns."""
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        loop = uvloop.new_event_loop()
        try:
            yield from loop.run_until_complete(_measure(Path(name), requests, rounds))
        finally:
            loop.close()


async def _measure(folder: Path, requests: int, rounds: int) -> list[tuple[str, float, str]]:
    instance, relay = InstancePath(folder), RelayPath()
    turns = max(1, requests // (STREAMS * CONNECTIONS))
    reads = max(1, requests // STREAMS)
    await instance.run(instance.prepare(WARM_READS, 0))
    relay.run(relay.prepare(WARM_READS, 0))
    session = bare_loop.open_session(small_model())
    best = dict.fromkeys(("bare loop", "instance", "relay"), float("inf"))

    def took(what: str, started_s: float, count: int) -> None:
        best[what] = min(best[what], (time.process_time() - started_s) / count * 1e6)

    for number in range(rounds):
        started_s = time.process_time()
        for _ in range(requests):
            bare_loop.answer(session, instance.message)
        took("bare loop", started_s, requests)
        asked = instance.prepare(turns, WARM_READS + number * turns)
        started_s = time.process_time()
        await instance.run(asked)
        took("instance", started_s, turns * STREAMS * CONNECTIONS)
        instance.check()
        passed = relay.prepare(reads, WARM_READS + number * reads)
        started_s = time.process_time()
        relay.run(passed)
        took("relay", started_s, reads * STREAMS)
        relay.check()
    instance.executor.close()
    share = best["bare loop"] / best["instance"]
    remarks = {
        "instance": f"bare loop : instance {share:.2f}, inline {instance.inline_share:.1%}",
        "relay": f"{RELAYED_BYTES} bytes each way",
    }
    return [(what, us, remarks.get(what, "")) for what, us in best.items()]


async def _profile(what: str, requests: int) -> pstats.Stats:
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        profile = cProfile.Profile()
        if what == "relay":
            relay = RelayPath()
            passed = relay.prepare(requests // STREAMS, 0)
            profile.runcall(relay.run, passed)
            return pstats.Stats(profile)
        instance = InstancePath(Path(name))
        await instance.run(instance.prepare(WARM_READS, 0))
        asked = instance.prepare(requests // STREAMS // CONNECTIONS, WARM_READS)
        with profile:
            await instance.run(asked)
        instance.executor.close()
        return pstats.Stats(profile)


def main(arguments: list[str]) -> int:
    made = argparse.ArgumentParser(prog="python -m bench.hotpath", description=__doc__)
    made.add_argument("--requests", type=int, default=12_800, help="of a round (%(default)s)")
    made.add_argument("--rounds", type=int, default=7, help="the best one counts (%(default)s)")
    made.add_argument(
        "--profile", choices=("instance", "relay"), help="print where the time goes instead"
    )
    options = made.parse_args(arguments)
    if options.profile:
        found = uvloop.run(_profile(options.profile, options.requests))
        found.sort_stats("tottime").print_stats(25)
        return 0
    for what, micros, remark in measure(options.requests, options.rounds):
        print(f"{what:10} {micros:7.2f} CPU us/request  {remark}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
