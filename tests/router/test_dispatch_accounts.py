"""Whatever happens to a call, it ends once, and nothing is in flight or waiting afterwards."""

from __future__ import annotations

import asyncio
import random

import pytest

from mesh.core.errors import Code
from mesh.core.policy import Policy
from mesh.wire.client import RpcError
from mesh.wire.relay import Failure
from protos import mesh_internal_pb2 as internal

OUTCOMES = (
    None,
    internal.LoadResponse(outcome="FAILED", code=int(Code.FAILED_PRECONDITION), message="bad"),
    internal.LoadResponse(outcome="REJECTED", message="full"),
    internal.LoadResponse(outcome="CLAIMED_ELSEWHERE", claimed_instance_id="b"),
    internal.LoadResponse(outcome="CLAIMED_ELSEWHERE"),
    RpcError(Code.UNAVAILABLE, "refused"),
)


@pytest.mark.parametrize("seed", range(40))
async def test_every_call_ends_once_and_leaves_nothing_behind(world, seed: int) -> None:
    chance = random.Random(seed)
    # Nothing is waited for as long as in a real mesh; the number of steps is the same.
    world.build(
        Policy(
            outlier_eject_ms=1,
            outlier_eject_max_ms=2,
            placement_retry_ms=1,
            placement_retry_max_ms=2,
        )
    )
    instances = ["a", "b", "c"]
    for instance_id in instances:
        world.instance(instance_id)
        scripted = [chance.choice(OUTCOMES) for _ in range(6)]
        world.script(instance_id, *(o for o in scripted if o is not None))
    models = [f"m{at}" for at in range(4)]
    for model_id in models:
        world.model(model_id)
        world.alias(f"name-of-{model_id}", model_id)
    names = [*models, *(f"name-of-{m}" for m in models), "nobody"]
    calls = []
    ended: list[int] = []

    for _ in range(60):
        call = _Scripted(world, chance, names, ended)
        calls.append(call)
        world.dispatcher.route(call)
        if chance.random() < 0.3:
            await asyncio.sleep(0)
        if chance.random() < 0.1:
            world.view.delete_copy(chance.choice(models), chance.choice(instances))
        if chance.random() < 0.05:
            world.view.delete_instance("c")
            await world.peers.prune()
            world.instance("c")
        if chance.random() < 0.1:
            open_calls = [c for c in calls if not c.over]
            if open_calls:
                chance.choice(open_calls).end(1)  # the client goes away
        world.dispatcher.prune()

    await world.until(lambda: all(call.over or call.flying for call in calls))
    for call in calls:
        if not call.over:
            call.end(0)
    await world.until(lambda: not world.loads.under_way)
    assert len(ended) == len(calls)
    assert world.dispatcher.inflight == 0
    assert world.loads.waiting == 0
    on_copies = [c.inflight for m in world.dispatcher._table._models.values() for c in m.copies]
    assert not any(on_copies)
    assert not any(slot.pending for slot in world.view.instances.values())


class _Scripted:
    """A relayed call to which chance happens at each forward."""

    def __init__(self, world, chance: random.Random, names: list[str], ended: list[int]) -> None:
        from tests.router.conftest import FakeCall

        fake = FakeCall(world.dispatcher, chance.choice(names))
        self.__dict__.update(fake.__dict__)
        self.chance = chance
        self.ended = ended
        self.over = False
        self.flying = False

    def forward(self, upstream, model_id_field: bytes) -> None:
        assert not self.over
        self.attempts += 1
        self.upstream = upstream
        kind = self.chance.random()
        if kind < 0.4:
            asyncio.get_running_loop().call_soon(self._fail_attempt, upstream)
        elif kind < 0.6:
            asyncio.get_running_loop().call_soon(self.end, 0)
        else:
            self.flying = True

    def _fail_attempt(self, upstream) -> None:
        if not self.over:
            self.dispatcher.failed(self, upstream, self.chance.choice(list(Failure)))

    def fail(self, error) -> None:
        self.end(int(error.code))

    def end(self, code: int) -> None:
        if not self.over:
            self.over = True
            self.ended.append(code)
            self.dispatcher.done(self, code, self.started_s + 1)
