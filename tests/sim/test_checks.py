"""The simulator sees what is broken: rules are broken on purpose, and each is named."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

import pytest

from bench.sim.baselines import placing_by
from bench.sim.checks import Broken
from bench.sim.faults import Crash, Drain
from bench.sim.store import SimStore
from mesh.core import placement
from mesh.core.placement import NoPlacement, Placement
from mesh.core.policy import Policy
from mesh.core.types import CopyRecord, InstanceState, ModelRecord
from mesh.core.view import ClusterView
from tests.sim.meshes import SMALL, small


def prefers_draining(
    view: ClusterView,
    model: ModelRecord,
    *,
    now_ms: int,
    policy: Policy,
    exclude: Collection[str] = (),
    avoid: Collection[str] = (),
) -> Placement | NoPlacement:
    placed = placement.place(
        view, model, now_ms=now_ms, policy=policy, exclude=exclude, avoid=avoid
    )
    for instance_id, slot in view.instances.items():
        draining = slot.record.state is InstanceState.DRAINING
        if draining and isinstance(placed, Placement) and not exclude:
            return replace(placed, instance_id=instance_id)
    return placed


def always_the_first(
    view: ClusterView,
    model: ModelRecord,
    *,
    now_ms: int,
    policy: Policy,
    exclude: Collection[str] = (),
    avoid: Collection[str] = (),
) -> Placement | NoPlacement:
    first = min(view.instances)
    return Placement(first, "the first", None, 1, False, "")


def test_a_placement_that_names_a_draining_instance() -> None:
    with placing_by(prefers_draining), pytest.raises(Broken, match="which is DRAINING"):
        small([Drain(20_000, 1)])


def test_a_placement_that_names_an_instance_which_has_the_model() -> None:
    with placing_by(always_the_first), pytest.raises(Broken, match="placed on"):
        small([Drain(20_000, 0), Crash(30_000, 1)])


def test_a_store_that_grants_every_claim(monkeypatch: pytest.MonkeyPatch) -> None:
    def grant(
        self: SimStore, record: CopyRecord, revision: int, lease: object
    ) -> tuple[int, tuple[str, int] | None]:
        return self.write([record]), None

    monkeypatch.setattr(SimStore, "claim", grant)
    with pytest.raises(Broken, match="is claimed by"):
        for seed in range(20):
            small(seed=seed, settings=replace(SMALL, watch_ms=200.0))


def test_a_copy_that_does_not_fit() -> None:
    cluster, _ = small()
    instance = cluster.world.instances[cluster.places[0]]
    instance.cache.used_bytes += instance.cache.config.capacity_bytes
    with pytest.raises(Broken, match="used_bytes is not the sum"):
        instance.unload(instance.cache.copies()[0].model_id)


def test_a_view_that_missed_an_event() -> None:
    cluster, _ = small()
    copy = next(iter(cluster.world.routers[0].view.all_copies()))
    cluster.world.routers[0].view.delete_copy(copy.model_id, copy.instance_id)
    with pytest.raises(Broken, match="router 0 sees None"):
        cluster.settle()


def test_a_request_that_waits_for_ever() -> None:
    cluster, _ = small(settings=replace(SMALL, settle_max_ms=20_000.0))
    router = cluster.world.routers[0]
    request = router.request("model-1")
    router.open[request] = None
    with pytest.raises(Broken, match="not at rest"):
        cluster.settle()
        router.open[request] = None
        cluster.settle()
