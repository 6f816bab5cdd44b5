"""Fakes for the router's parts: instances that answer by script, calls that record what they get.

``world`` holds a view that has synced, with the dispatcher and the loads over it. Nothing here
waits for time: a Load is held until the test lets it go (``world.hold``), and tests wait for what
they expect to happen (``world.until``).
"""

from __future__ import annotations

import asyncio
import math
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from time import monotonic
from typing import Any

import pytest

from mesh.core.errors import Code, MeshError
from mesh.core.policy import Policy
from mesh.core.types import (
    CopyRecord,
    CopyState,
    InstanceRecord,
    InstanceState,
    ModelRecord,
    VModelRecord,
)
from mesh.core.view import ClusterView
from mesh.decision_log import DecisionLog
from mesh.internal_calls import LOAD_PATH, UNLOAD_PATH
from mesh.metrics import RouterMetrics
from mesh.store.memory import MemoryStore
from mesh.wire.client import Reply, RpcError
from mesh.wire.peer import NoConnection, Unconnected
from protos import mesh_internal_pb2 as internal
from router.dispatch import Dispatcher
from router.loads import Loads
from router.names import NameLookup
from router.peers import Peers

NOW_MS = 1_700_000_000_000


class FakePeer:
    """A way to an instance. ``silent_since_s`` and ``listens`` are the test's to set."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.silent_since_s = 0.0
        self.heard_s = 1.0
        self.look_at_s = 0.0
        self.troubled = False
        self.listens = True
        self.relieved = 0

    def watch(self, now_s: float, patience: Any) -> None:
        self.troubled = self.silent_since_s > 0

    def relieve(self, now_s: float, patience: Any) -> None:
        self.relieved += 1

    def acquire(self, on_ready: Any) -> None:
        on_ready(None if self.listens else NoConnection(Unconnected.FAILED, "refused"))


class FakeUpstream(FakePeer):
    def __init__(self, address: str) -> None:
        super().__init__(address)
        self.inflight = 0
        self.closed = False

    def close(self) -> None:
        self.closed = True


@dataclass
class Head:
    path: str = "/inference.GRPCInferenceService/ModelInfer"


class FakeCall:
    """A client call. ``on_forward`` plays the relay: by default the request stays in flight."""

    def __init__(self, dispatcher: Dispatcher, name: str, deadline_s: float = math.inf) -> None:
        self.dispatcher = dispatcher
        self.head = Head()
        self.model_name = name
        self.deadline_s = deadline_s
        self.started_s = monotonic()
        self.attempts = 0
        self.request_bytes = 100
        self.response_bytes = 50
        self.context: Any = None
        self.forwards: list[str] = []  # addresses
        self.fields: list[bytes] = []
        self.error: MeshError | None = None
        self.upstream: Any = None
        self.on_forward: Callable[[FakeCall], None] | None = None

    def forward(self, upstream: Any, model_id_field: bytes) -> None:
        self.attempts += 1
        self.upstream = upstream
        self.forwards.append(upstream.address)
        self.fields.append(model_id_field)
        if self.on_forward is not None:
            self.on_forward(self)

    def fail(self, error: MeshError) -> None:
        assert self.error is None, "failed twice"
        self.error = error
        self.dispatcher.done(self, int(error.code), monotonic())

    def finish(self, code: int = 0) -> None:
        self.dispatcher.done(self, code, monotonic())

    @property
    def settled(self) -> bool:
        return bool(self.forwards) or self.error is not None


@dataclass
class FakeInstances:
    """All instances' answers to internal calls, by address."""

    scripts: dict[str, deque[internal.LoadResponse | MeshError]] = field(
        default_factory=lambda: defaultdict(deque)
    )
    asked: list[tuple[str, internal.LoadRequest]] = field(default_factory=list)
    unloaded: list[tuple[str, str]] = field(default_factory=list)
    gate: asyncio.Event = field(default_factory=asyncio.Event)

    def answer(self, address: str) -> internal.LoadResponse:
        script = self.scripts[address]
        if not script:
            return internal.LoadResponse(outcome="LOADED", copy_revision=1, size_bytes=10)
        scripted = script.popleft()
        if isinstance(scripted, MeshError):
            raise scripted
        return scripted


class FakeChannel:
    def __init__(self, address: str, instances: FakeInstances) -> None:
        self.address = address
        self.instances = instances
        self.peer = FakePeer(address)
        self.closed = False

    async def unary(
        self, path: str, message: bytes, *, metadata: Any = (), timeout_s: float | None = None
    ) -> Reply:
        if path == UNLOAD_PATH:
            model_id = internal.UnloadRequest.FromString(message).model_id
            self.instances.unloaded.append((self.address, model_id))
            return Reply(internal.UnloadResponse(was_here=True).SerializeToString(), (), ())
        if path != LOAD_PATH:
            raise RpcError(Code.UNIMPLEMENTED, path)
        self.instances.asked.append((self.address, internal.LoadRequest.FromString(message)))
        await self.instances.gate.wait()
        return Reply(self.instances.answer(self.address).SerializeToString(), (), ())

    async def close(self) -> None:
        self.closed = True


class World:
    def __init__(self) -> None:
        self.policy = Policy()
        self.now_ms = NOW_MS
        self.view = ClusterView()
        self.store = MemoryStore()
        self.instances = FakeInstances()
        self.instances.gate.set()
        self.metrics = RouterMetrics()
        self.clock_s = 0.0
        self.starved: list[str] = []
        self.decisions = DecisionLog(now_ms=lambda: self.now_ms)
        self.build()
        for replace_family in (
            self.view.replace_models,
            self.view.replace_vmodels,
            self.view.replace_instances,
            self.view.replace_copies,
            self.view.replace_failures,
        ):
            replace_family(())

    def build(self, policy: Policy | None = None) -> None:
        """The parts over the view; again with another policy."""
        self.policy = policy or self.policy
        self.peers = Peers(
            self.view,
            make_upstream=FakeUpstream,  # type: ignore[arg-type]
            make_channel=lambda address: FakeChannel(address, self.instances),  # type: ignore
            policy=self.policy,
            decisions=self.decisions,
        )
        self.loads = Loads(
            self.view,
            self.peers,
            self.metrics,
            policy=self.policy,
            now_ms=lambda: self.now_ms,
            avoid=self.peers.avoided,
            starved=lambda model_id: self.starved.append(model_id),
        )
        self.names = NameLookup(self.store, self.view, clock=lambda: self.clock_s)
        self.dispatcher = Dispatcher(
            self.view,
            self.peers,
            self.loads,
            self.names,
            self.metrics,
            policy=self.policy,
            draw=lambda: 0.0,
            decisions=self.decisions,
            now_ms=lambda: self.now_ms,
        )

    # What stands in the view.

    def instance(self, instance_id: str, **changes: Any) -> None:
        record = InstanceRecord(
            instance_id=instance_id,
            address=f"{instance_id}:1",
            state=InstanceState.READY,
            capacity_bytes=1_000_000_000,
            model_types=("onnx",),
        )
        self.view.put_instance(replace(record, **changes))

    def model(self, model_id: str, **changes: Any) -> None:
        self.view.put_model(replace(ModelRecord(model_id, "onnx"), **changes))

    def alias(self, name: str, active: str, target: str | None = None) -> None:
        self.view.put_vmodel(VModelRecord(name, active, target or active))

    def copy(self, model_id: str, instance_id: str, state: CopyState = CopyState.LOADED) -> None:
        self.view.put_copy(CopyRecord(model_id, instance_id, state, size_bytes=10))

    # Calls.

    def call(self, name: str, *, deadline_s: float = math.inf) -> FakeCall:
        call = FakeCall(self.dispatcher, name, deadline_s)
        self.dispatcher.route(call)
        return call

    def script(self, instance_id: str, *answers: internal.LoadResponse | MeshError) -> None:
        self.instances.scripts[f"{instance_id}:1"].extend(answers)

    def hold(self) -> None:
        """Loads wait until ``release``."""
        self.instances.gate.clear()

    def release(self) -> None:
        self.instances.gate.set()

    @property
    def asked(self) -> list[str]:
        """Instances that were asked to load, in order."""
        return [address.removesuffix(":1") for address, _ in self.instances.asked]

    async def until(self, holds: Callable[[], object]) -> None:
        """Let the loop turn, and the connections be watched, until ``holds``; a test that waits in
        vain fails."""
        async with asyncio.timeout(60):
            while not holds():
                self.watch()
                await asyncio.sleep(0)

    def watch(self) -> None:
        """One look at the connections, as the router takes it every 100 ms."""
        self.peers.watch(monotonic())

    def silent(self, instance_id: str) -> None:
        """Its PINGs are not answered, until ``speaks``."""
        self.peers.upstream(instance_id).silent_since_s = 2.0
        self.watch()

    def speaks(self, instance_id: str) -> None:
        upstream = self.peers.upstream(instance_id)
        upstream.silent_since_s, upstream.heard_s = 0.0, 3.0
        self.watch()


@pytest.fixture
async def world() -> Any:
    world = World()
    yield world
    await world.loads.close()
    await world.names.close()
    await world.store.close()
