"""A router without its mind: a real relay and real instances around a scripted dispatcher."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from mesh.core.errors import MeshError, Unavailable
from mesh.wire import hpack
from mesh.wire.calls import ServerCall, StreamCall, Streaming, Unary
from mesh.wire.client import Channel
from mesh.wire.head import RequestHead
from mesh.wire.limits import INSIDE, PUBLIC, Limits
from mesh.wire.relay import Failure, Relay, RelayCall, Upstream
from mesh.wire.server import Server
from protos import oip_pb2
from tests.wire.waiting import until

INFER = "/inference.GRPCInferenceService/ModelInfer"
STREAM = "/inference.GRPCInferenceService/ModelStreamInfer"
ADD = "/test.Ledger/Add"  # must not be done twice


def request(model: str = "m", size: int = 100) -> bytes:
    content = bytes(i & 0xFF for i in range(256)) * (size // 256 + 1)
    return oip_pb2.ModelInferRequest(
        model_name=model, raw_input_contents=[content[:size]]
    ).SerializeToString()


@dataclass
class Received:
    """A call as an instance saw it."""

    head: RequestHead
    message: bytes
    call: ServerCall

    def header(self, name: bytes) -> bytes | None:
        return self.head.get(name)


class Instance:
    """A serving pod that does what a test says.

    ``answers`` are used up one a call; then every call is echoed. ``held`` keeps calls unanswered.
    """

    def __init__(self) -> None:
        self.received: list[Received] = []
        self.answers: list[Callable[[ServerCall, bytes], None]] = []
        self.cancelled: list[ServerCall] = []
        self.reading = asyncio.Event()  # a streaming call reads only when this is set
        self.reading.set()
        self.streams: list[StreamCall] = []
        self.server = Server(
            {INFER: Unary(self._unary), ADD: Unary(self._unary), STREAM: Streaming(self._stream)},
            limits=INSIDE,
        )
        self.address = ""

    async def start(self) -> None:
        self.address = f"127.0.0.1:{await self.server.start()}"

    def _unary(self, call: ServerCall, message: bytes) -> None:
        self.received.append(Received(call.head, message, call))
        call.on_cancel = lambda: self.cancelled.append(call)
        if self.answers:
            self.answers.pop(0)(call, message)
        else:
            call.reply(message)

    async def _stream(self, call: StreamCall) -> None:
        self.streams.append(call)
        await self.reading.wait()
        async for message in call:
            await call.send(message)

    def kill(self) -> None:
        """The process is gone: its connections break."""
        for link in list(self.server._links):
            link.abort()

    @property
    def inflight(self) -> int:
        return self.server.inflight


def hold(call: ServerCall, message: bytes) -> None:
    """Do not answer."""


def refuse(reason: str) -> Callable[[ServerCall, bytes], None]:
    def answer(call: ServerCall, message: bytes) -> None:
        call.fail(Unavailable(f"scripted: {reason}"), trailers=[("mesh-error", reason)])

    return answer


class Dispatch:
    """Forwards to ``upstreams[0]``; after a failure to the next one. Notes everything."""

    def __init__(self) -> None:
        self.upstreams: list[Upstream] = []
        self.routed: list[RelayCall] = []
        self.failures: list[tuple[RelayCall, Failure]] = []
        self.ended: list[tuple[RelayCall, int]] = []
        self.waiting = False  # a miss: the calls wait until the test forwards them
        self.error: MeshError | None = None

    def forward(self, call: RelayCall, upstream: Upstream) -> None:
        call.forward(upstream, hpack.encode_literal(b"mm-model-id", b"id-of-" + call_name(call)))

    def route(self, call: RelayCall) -> None:
        self.routed.append(call)
        call.context = 0
        if self.error is not None:
            call.fail(self.error)
        elif not self.waiting:
            self.forward(call, self.upstreams[0])

    def failed(self, call: RelayCall, upstream: Upstream, failure: Failure) -> None:
        self.failures.append((call, failure))
        call.context += 1
        if call.context < len(self.upstreams):
            self.forward(call, self.upstreams[call.context])
        else:
            call.fail(Unavailable("no instance is left"))

    def done(self, call: RelayCall, code: int, now_s: float) -> None:
        self.ended.append((call, code))

    @property
    def codes(self) -> list[int]:
        return [code for _, code in self.ended]

    @property
    def kinds(self) -> list[Failure]:
        return [failure for _, failure in self.failures]


def call_name(call: RelayCall) -> bytes:
    return call.model_name.encode()


@dataclass
class World:
    dispatch: Dispatch
    relay: Relay
    front: Server
    instances: list[Instance]
    address: str
    channels: list[Channel] = field(default_factory=list)

    def channel(self) -> Channel:
        channel = Channel(self.address)
        self.channels.append(channel)
        return channel

    @property
    def upstreams(self) -> Sequence[Upstream]:
        return self.dispatch.upstreams

    async def settled(self) -> None:
        """Every scenario ends like this: nothing held, nothing counted, each call done once."""
        dispatch = self.dispatch
        await until(lambda: len(dispatch.ended) >= len(dispatch.routed), "done for every call")
        await until(lambda: self.relay.budget.used_bytes == 0, "nothing is held")
        await until(lambda: all(up.inflight == 0 for up in self.upstreams), "none in flight")
        await until(lambda: not any(i.inflight for i in self.instances), "instances are idle")
        await until(lambda: self.front.inflight == 0, "the front is idle")
        ended = Counter(id(call) for call, _ in dispatch.ended)
        assert ended == Counter(id(call) for call in dispatch.routed), "done is not once a call"
        for upstream in self.upstreams:
            for link in upstream._links:
                assert not link.conn.streams and not link.conn._blocked

    async def close(self) -> None:
        for channel in self.channels:
            await channel.close()
        await self.front.close()
        for upstream in self.upstreams:
            upstream.abort()
        for instance in self.instances:
            instance.reading.set()
            await instance.server.close()


async def make_world(
    instances: int = 2, *, limits: Limits = PUBLIC, held_bytes_max: int = 256 * 1024
) -> World:
    dispatch = Dispatch()
    relay = Relay(
        dispatch,
        peek=frozenset({INFER, STREAM}),
        idempotent=frozenset({INFER}),
        limits=limits,
        held_bytes_max=held_bytes_max,
    )
    front = Server({}, limits=limits, fallback=relay)
    pods = [Instance() for _ in range(instances)]
    for pod in pods:
        await pod.start()
    dispatch.upstreams = [Upstream(pod.address) for pod in pods]
    return World(dispatch, relay, front, pods, f"127.0.0.1:{await front.start()}")


@contextlib.asynccontextmanager
async def running(world: World):  # type: ignore[no-untyped-def]
    try:
        yield world
        for channel in world.channels:
            await channel.close()
        await world.settled()
    finally:
        await world.close()
