"""Two controllers: one acts, the other is warm and takes over."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from mesh.reconciler.kube import Kube
from mesh.reconciler.kube_resources import INFERENCE_SERVICES
from mesh.reconciler.lease import LeaseElection
from tests.reconciler.rig import Rig, isvc, rig_of, runtime, until

pytestmark = [pytest.mark.kube, pytest.mark.etcd]


@asynccontextmanager
async def candidate(rig: Rig, identity: str) -> AsyncIterator[LeaseElection]:
    """``rig``'s controller, which acts while it holds the Lease."""
    async with await Kube.connect(rig.server.kubeconfig("admin")) as client:
        held: list[LeaseElection] = []
        controller = await rig.start(leads=lambda: bool(held) and held[0].is_leader)
        election = LeaseElection(
            client,
            rig.namespace,
            "mesh-controller",
            identity,
            on_change=controller.leading_changed,
        )
        held.append(election)
        running = asyncio.create_task(election.run())
        try:
            yield election
        finally:
            await rig.stop()
            await election.close()
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)


async def leads(election: LeaseElection) -> None:
    async def look() -> bool:
        return election.is_leader

    await until(look, what="a leader")


async def test_one_acts_and_the_other_takes_over_what_was_left(rig: Rig) -> None:
    await rig.apply(runtime("mesh-1.x", rig.namespace))
    await rig.mesh.instance()
    async with (
        rig_of(rig.server, rig.etcd, rig.namespace) as other,
        candidate(other, "second") as second,
    ):
        await leads(second)
        async with candidate(rig, "first") as first:
            await rig.apply(isvc("iris", rig.namespace))
            await rig.mesh.registered("iris")
            await rig.idle()
            assert not first.is_leader
            assert rig.writes == 0 and other.writes > 0
            await second.close()
            await leads(first)
            before = other.writes
            await rig.mesh.load("iris")
            await rig.ready("iris")
            await rig.client.delete(INFERENCE_SERVICES, rig.namespace, "iris")
            await rig.gone("iris")
            assert other.writes == before and rig.writes > 0
    assert await rig.mesh.aliases() == {}


async def test_who_comes_to_lead_looks_at_everything(rig: Rig) -> None:
    await rig.apply(runtime("mesh-1.x", rig.namespace))
    leader = False
    controller = await rig.start(leads=lambda: leader)
    await rig.apply(isvc("iris", rig.namespace))

    async def seen() -> bool:
        return controller.cluster.resource(INFERENCE_SERVICES, rig.namespace, "iris") is not None

    await until(seen, what="the follower to know it")
    await rig.idle()
    assert rig.writes == 0 and await rig.mesh.aliases() == {}
    leader = True
    controller.leading_changed(True)
    await rig.mesh.registered("iris")
