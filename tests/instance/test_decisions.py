"""What an instance notes and tells of its decisions, and the policy by which it takes them."""

from __future__ import annotations

from pathlib import Path

import orjson

from mesh import registry
from mesh.core.types import CopyState, LoadPriority
from mesh.store.api import Delete, Put
from protos import mesh_internal_pb2 as internal
from tests.instance.fakes import MIB, Rig, running, until, with_policy
from tests.instance.test_inference import Client

DECISIONS = "/mesh.internal.v1.Instance/Decisions"


def noted(rig: Rig, kind: str) -> list[tuple[str, str]]:
    found = rig.instance.decisions.decisions.recent(100)
    return [(d.reason, d.model_id) for d in reversed(found) if d.kind == kind]


async def test_evictions_say_what_went_and_what_would_have_gone_next(tmp_path: Path) -> None:
    async with running(tmp_path, capacity_bytes=3 * MIB) as rig:
        for name in "abcd":
            rig.register(name, size_bytes_stated=MIB, size_bytes_measured=MIB)
            await rig.load(name)
            rig.pod.servables[name].use.last_used_at_ms += 1  # its first request
            rig.pod.servables[name].use.uses += 1
        await until(lambda: noted(rig, "evict"))
        assert noted(rig, "evict")[0][0] == "evicted"
        told = next(d for d in rig.instance.decisions.decisions.recent(9) if d.kind == "evict")
        assert told.instance_id == rig.instance.instance_id
        assert "next" in told.detail


async def test_unloads_and_refused_loads_carry_the_words_of_the_cache(tmp_path: Path) -> None:
    async with running(
        tmp_path, capacity_bytes=5 * MIB // 2, policy=with_policy(load_slots=1)
    ) as rig:
        for name in "abc":
            rig.register(name, size_bytes_stated=MIB)
        await rig.load("a")
        await rig.load("b")
        await rig.load("c", priority=LoadPriority.PROACTIVE)
        assert noted(rig, "reject") == [("no-free-memory", "c")]
        await rig.pod.unload("a", "the test is done with it")
        assert noted(rig, "unload") == [("asked", "a")]


async def test_a_failed_load_is_noted_with_its_cause(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        rig.register("m")
        rig.runtime.load_faults["m"] = [ValueError("bad magic")]
        await rig.load("m")
        told = rig.instance.decisions.decisions.recent(1)[0]
        assert (told.kind, told.reason) == ("reject", "load-failed")
        assert "bad magic" in told.detail


async def test_decisions_are_told_latest_first_and_by_model(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        client = Client(rig.instance.address)
        for name in "ab":
            rig.register(name)
            await rig.load(name)
            await rig.pod.unload(name)
        kinds = (internal.DecisionsRequest(), internal.DecisionsResponse)
        told = orjson.loads((await client.ask(DECISIONS, *kinds)).json)
        assert [(d["kind"], d["model_id"]) for d in told] == [("unload", "b"), ("unload", "a")]
        assert told[0]["instance_id"] == rig.instance.instance_id
        assert told[0]["at_ms"]
        one = internal.DecisionsRequest(model_id="a", limit=5)
        reply = await client.ask(DECISIONS, one, internal.DecisionsResponse)
        assert [d["model_id"] for d in orjson.loads(reply.json)] == ["a"]
        await client.channel.close()


# ---- the policy ----------------------------------------------------------------------------------


def put_policy(rig: Rig, value: bytes) -> None:
    rig.server.apply([Put(registry.config_key("policy"), value)])


async def test_a_policy_in_the_store_reaches_every_part(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        put_policy(rig, b'{"load_slots": 7, "default_max_concurrency": 3, "drain_moves": 9}')
        await until(lambda: rig.pod.policy.load_slots == 7)
        assert rig.pod.cache.config.load_slots == 7
        assert rig.instance.record().load_slots == 7
        rig.server.apply([Delete(registry.config_key("policy"))])
        await until(lambda: rig.pod.policy.load_slots == rig.policy.load_slots)
        assert noted(rig, "policy") == [("changed", ""), ("changed", "")]


async def test_terms_of_loaded_copies_follow_the_policy(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        rig.register("m")
        rig.register("n", max_concurrency=5)
        await rig.load("m")
        await rig.load("n")
        put_policy(rig, b'{"default_max_concurrency": 3}')
        await until(lambda: rig.pod.servables["m"].max_concurrency == 3)
        assert rig.pod.servables["n"].max_concurrency == 5


async def test_a_policy_that_cannot_be_is_said_once_and_changes_nothing(
    tmp_path: Path, caplog
) -> None:
    async with running(tmp_path) as rig:
        put_policy(rig, b'{"load_slots": 7}')
        await until(lambda: rig.pod.policy.load_slots == 7)
        put_policy(rig, b'{"load_slots": -1}')
        await until(lambda: len(noted(rig, "policy")) == 2)
        rig.server.resync_watches()
        put_policy(rig, b'{"load_slots": 8}')
        await until(lambda: rig.pod.policy.load_slots == 8)
        assert [reason for reason, _ in noted(rig, "policy")] == ["changed", "refused", "changed"]
        assert caplog.text.count("config/policy is not acted on") == 1


async def test_the_record_tells_the_deployment_and_its_generation(tmp_path: Path) -> None:
    async with running(tmp_path, group="pods", replica_set="2") as rig:
        assert (rig.record().group, rig.record().replica_set) == ("pods", "2")


async def test_minimum_and_idle_time_of_a_record_reach_the_cache(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        rig.register("m", idle_unload_ms=1)
        await rig.load("m")
        await until(lambda: "m" not in rig.pod.servables)  # nobody used it for a millisecond
        await until(lambda: rig.copy("m") is None)
        rig.register("n", min_copies=2)
        await rig.load("n")
        await until(lambda: rig.copy("n").state is CopyState.LOADED)
