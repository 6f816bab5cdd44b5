"""etcd is killed, compacted behind everybody's back, slow and cut off, all under steady load."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import grpc
import pytest

from mesh.core.types import ModelRecord
from mesh.registry import encode, key_of, model_key
from mesh.store.etcd import EtcdStore
from mesh.store.etcd_options import EtcdOptions
from tests.chaos.rig import MODELS, Rig, readiness
from tests.e2e.asking import Asker, isvc, total

pytestmark = [pytest.mark.e2e, pytest.mark.etcd]


def directly(rig: Rig, work: Callable[[EtcdStore], Awaitable[None]]) -> None:
    """Act on the store past the proxy."""

    async def act() -> None:
        store = EtcdStore(EtcdOptions((rig.etcd.endpoint,)))
        try:
            await work(store)
        finally:
            await store.close()

    asyncio.run(act())


def disconnected(rig: Rig) -> bool:
    return total(rig.routers, "mesh_store_connected") == 0


def test_a_mesh_without_its_etcd_serves_loads_and_refuses_registrations(
    rig: Rig, chaos_samples: Path
) -> None:
    uri = (chaos_samples / "digits-0001").as_uri()
    with rig.steady() as load:
        load.more(200)
        before = rig.loads()
        rig.etcd.kill()
        try:
            load.until(lambda: disconnected(rig), "the loss being noticed")
            load.more(200)
            code, text = rig.refused_apply("in-vain", uri)
            assert code is grpc.StatusCode.UNAVAILABLE
            assert "etcd" in text or "store" in text, text
            loaded = rig.loads()
            load.until(lambda: rig.loads() > loaded, "a load for a miss", 30)
            load.more(200)
        finally:
            rig.etcd.start()
        load.until(rig.is_whole, "a whole mesh")
        load.more(200)
        print(f"{rig.loads() - before:.0f} loads in that time")
        with Asker(rig.address) as ask:
            ask.apply(isvc("afterwards", uri))
            assert ask.delete("afterwards")
    load.assert_none_failed()
    copies = rig.copies()
    doubled = [name for name, holders in copies.items() if len(holders) > 1]
    print(f"models with more than one copy afterwards: {doubled}")
    # Each router placed by itself; and the most asked model may have earned a second copy.
    assert len(doubled) <= MODELS // 5, copies
    assert "in-vain" not in copies


def test_watchers_that_missed_a_compaction_know_what_has_changed(rig: Rig) -> None:
    gone, new = ModelRecord("gone", "onnx"), ModelRecord("new", "onnx")

    async def before(store: EtcdStore) -> None:
        await store.put(key_of(gone), encode(gone))

    async def behind_their_back(store: EtcdStore) -> None:
        await store.delete(model_key(gone.model_id))
        await store.compact(await store.put(key_of(new), encode(new)))

    async def after(store: EtcdStore) -> None:
        await store.delete(model_key(new.model_id))

    def both_know_it() -> bool:
        return all(readiness(router).get("models") == MODELS + 1 for router in rig.routers)

    with rig.steady() as load:
        load.more(100)
        directly(rig, before)
        load.until(both_know_it, "the record in every view")
        rig.proxy.cut()
        load.until(lambda: disconnected(rig), "the cut being noticed")
        directly(rig, behind_their_back)
        load.more(100)
        rig.proxy.mend()
        load.until(rig.is_whole, "a whole mesh")
        load.until(lambda: {"new"} == set(rig.copies()) - set(rig.names), "what has changed")
        directly(rig, after)
        load.until(lambda: set(rig.copies()) == set(rig.names), "what has changed after that")
        load.more(100)
    load.assert_none_failed()


def test_connections_to_etcd_that_are_slow_and_cut_cost_no_request(rig: Rig) -> None:
    with rig.steady() as load:
        load.more(100)
        for delay_s in (0.05, 0.2, 0.5):
            rig.proxy.delay(delay_s)
            load.more(100)
            rig.proxy.cut()
            load.more(50)
            rig.proxy.mend()
            load.more(100)
        rig.proxy.delay(0.0)
        load.until(rig.is_whole, "a whole mesh")
        load.more(100)
    load.assert_none_failed()
