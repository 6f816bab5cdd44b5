"""What was decided, told by those who decided it: `mesh explain --decisions`, metrics, the log."""

from __future__ import annotations

import logging
import socket
from pathlib import Path
from typing import Any

import grpc
import pytest

from mesh import registry
from mesh.admin_views import (
    DecisionList,
    DecisionRow,
    Explanation,
    InstanceRow,
    ModelRow,
    decode,
    decode_list,
)
from mesh.core.types import InstanceRecord, InstanceState
from mesh.internal_calls import DECISIONS_PATH
from mesh.store.api import Put
from protos import mesh_admin_pb2 as pb
from router import roster
from tests.instance.fakes import MIB, until
from tests.router.mesh_rig import ADMIN, MeshRig, mesh


async def decisions(rig: MeshRig, name: str = "", **fields: Any) -> DecisionList:
    request = pb.DecisionsRequest(name=name, **fields)
    reply = await rig.call(ADMIN + "Decisions", request, pb.DecisionsResponse)
    return decode(DecisionList, reply.json)


async def rows(rig: MeshRig, kind: str, **fields: Any) -> list[DecisionRow]:
    return [row for row in (await decisions(rig, **fields)).rows if row.kind == kind]


async def loaded(rig: MeshRig, *names: str) -> None:
    for name in names:
        await rig.register(name)
        await rig.infer(name, 1.0)


async def test_a_placement_is_told_counted_and_logged_in_the_same_words(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "mesh.decisions")
    async with mesh(tmp_path, pods=0) as rig:
        pod = await rig.add_pod()
        router = rig.routers[0]
        await loaded(rig, "m")
        [row] = await rows(rig, "place")
        assert (row.model_id, row.instance_id) == ("m", pod.instance.instance_id)
        assert row.reason == "only_candidate"
        assert row.detail
        assert row.who == router.router_id
        assert router.metrics.value("decisions", "place", row.reason) == 1
        assert [r for r in caplog.messages if "place m on" in r and row.reason in r]


async def test_an_instances_evictions_are_told_by_it(tmp_path: Path) -> None:
    async with mesh(tmp_path, pods=0) as rig:
        pod = await rig.add_pod(capacity_bytes=3 * MIB)
        await loaded(rig, *(f"m{at}" for at in range(6)))
        evicted = await rows(rig, "evict")
        assert evicted
        assert {row.who for row in evicted} == {pod.instance.instance_id}
        assert all(row.reason and row.model_id for row in evicted)
        counted = sum(
            pod.instance.metrics.value("decisions", "evict", reason)
            for reason in {row.reason for row in evicted}
        )
        assert counted == len(evicted)


async def test_the_latest_come_first_and_no_more_than_asked_for(tmp_path: Path) -> None:
    async with mesh(tmp_path, pods=0) as rig:
        await rig.add_pod(capacity_bytes=3 * MIB)
        await loaded(rig, *(f"m{at}" for at in range(6)))
        everything = (await decisions(rig)).rows
        instants = [row.at_ms for row in everything]
        assert instants == sorted(instants, reverse=True)
        assert (await decisions(rig, limit=2)).rows == everything[:2]
        since_ms = instants[0]
        assert {row.at_ms for row in (await decisions(rig, since_ms=since_ms)).rows} == {since_ms}


async def test_a_name_is_a_model_an_alias_or_an_instance(tmp_path: Path) -> None:
    async with mesh(tmp_path, pods=0) as rig:
        one, two = await rig.add_pod(capacity_bytes=3 * MIB), await rig.add_pod()
        await loaded(rig, "a", "b")
        applied = await rig.apply("iris", "fake://1")
        await rig.infer("iris", 1.0)
        assert {row.model_id for row in (await decisions(rig, "a")).rows} == {"a"}
        assert {row.model_id for row in (await decisions(rig, "iris")).rows} == {applied.model_id}
        for pod in (one, two):
            about = pod.instance.instance_id
            told = (await decisions(rig, about)).rows
            assert all(about in (row.instance_id, row.who) for row in told)
        assert (await decisions(rig, "nobody")).rows == ()


async def test_who_cannot_be_asked_is_named_and_the_others_are_told(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        async with mesh(tmp_path, pods=0) as rig:
            await rig.add_pod()
            await loaded(rig, "m")
            addresses = {"gone": "127.0.0.1:1", "mute": f"127.0.0.1:{silent.getsockname()[1]}"}
            for name, address in addresses.items():
                record = InstanceRecord(name, address, InstanceState.READY, MIB)
                rig.server.apply([Put(registry.key_of(record), registry.encode(record))])
            await until(lambda: addresses.keys() <= rig.routers[0].view.instances.keys())
            told = await decisions(rig)
            assert told.unreachable.keys() == addresses.keys()
            assert all(told.unreachable.values())
            assert any(row.kind == "place" for row in told.rows)
            assert told.asked == 2


@pytest.mark.parametrize("limit", [-1, 10_001])
async def test_a_limit_out_of_range_is_refused(tmp_path: Path, limit: int) -> None:
    async with mesh(tmp_path, pods=0) as rig:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await decisions(rig, limit=limit)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_decisions_of_an_instance_are_not_for_clients(tmp_path: Path) -> None:
    async with mesh(tmp_path, pods=0) as rig:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await rig.call(DECISIONS_PATH, pb.DecisionsRequest(), pb.DecisionsResponse)
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


# ---- lists that show what was decided ------------------------------------------------------------


async def listed(rig: MeshRig, kind: str, cls: type[Any]) -> list[Any]:
    reply = await rig.call(ADMIN + "List", pb.ListRequest(kind=kind), pb.ListResponse)
    return list(decode_list(cls, reply.items_json))


async def test_a_minimum_that_cannot_be_had_is_listed_with_the_reason(tmp_path: Path) -> None:
    async with mesh(tmp_path, pods=0) as rig:
        await rig.add_pod()
        router = rig.routers[0]
        await rig.register("two", min_copies=2)
        await rig.register("one")
        await rig.infer("two", 1.0)
        await until(lambda: router.leader.copies_lacking == 1)
        shown: dict[str, ModelRow] = {r.name: r for r in await listed(rig, "models", ModelRow)}
        assert (shown["two"].copies_loaded, shown["two"].copies_wanted) == (1, 2)
        assert "1 missing" in shown["two"].shortfall
        assert (shown["one"].copies_wanted, shown["one"].shortfall) == (0, "")
        assert b"mesh_shortfall_copies 1.0" in router.metrics.render()[0]
        await rig.add_pod()
        await until(lambda: router.leader.copies_lacking == 0)
        await until(lambda: len(router.view.loaded_on("two")) == 2)
        shown = {r.name: r for r in await listed(rig, "models", ModelRow)}
        assert (shown["two"].copies_loaded, shown["two"].shortfall) == (2, "")


async def test_an_instance_is_listed_with_its_place_and_whether_it_is_passed_over(
    tmp_path: Path,
) -> None:
    async with mesh(tmp_path, pods=0) as rig:
        router = rig.routers[0]
        record = InstanceRecord(
            "gone",
            "127.0.0.1:1",
            InstanceState.READY,
            MIB,
            zone="z1",
            labels=("gpu",),
            group="g",
            replica_set="r2",
            victim_score=0.5,
        )
        rig.server.apply([Put(registry.key_of(record), registry.encode(record))])
        await until(lambda: "gone" in router.view.instances)
        router.peers.connect_failed("gone")
        [row] = await listed(rig, "instances", InstanceRow)
        assert (row.zone, row.labels, row.group, row.replica_set) == ("z1", ("gpu",), "g", "r2")
        assert (row.victim_score, row.passed_over) == (0.5, True)
        assert router.metrics.value("ejected") == 1
        assert [r.instance_id for r in await rows(rig, "eject")] == ["gone"]


# ---- several routers -----------------------------------------------------------------------------


async def test_each_router_tells_what_the_others_decided(tmp_path: Path) -> None:
    async with mesh(tmp_path, routers=2) as rig:
        one, two = rig.routers
        await until(lambda: one.roster.others and two.roster.others)
        await rig.register("m")
        await rig.infer("m", 1.0, router=0)
        await rig.register("n")
        await rig.infer("n", 1.0, router=1)
        for at in (0, 1):
            request = pb.DecisionsRequest()
            reply = await rig.call(ADMIN + "Decisions", request, pb.DecisionsResponse, router=at)
            told = decode(DecisionList, reply.json)
            places = {(row.model_id, row.who) for row in told.rows if row.kind == "place"}
            assert places == {("m", one.router_id), ("n", two.router_id)}
            assert told.unreachable == {}
            assert told.asked == 3


async def test_a_router_that_leaves_is_asked_no_more_and_one_that_is_mute_is_named(
    tmp_path: Path,
) -> None:
    async with mesh(tmp_path, routers=2) as rig:
        one, two = rig.routers
        await until(lambda: one.roster.others)
        await two.close()
        await until(lambda: not one.roster.others)
        for name, value in {"gone": b'{"metrics":"127.0.0.1:1"}', "odd": b"[]"}.items():
            rig.server.apply([Put(roster.PREFIX + name, value)])
        await until(lambda: len(one.roster.others) == 2)
        assert (await decisions(rig)).unreachable.keys() == {"gone", "odd"}


async def test_a_lost_lease_does_not_strike_a_router_off_for_good(tmp_path: Path) -> None:
    async with mesh(tmp_path, routers=2) as rig:
        one, two = rig.routers
        await until(lambda: two.router_id in one.roster.others)
        key = roster.PREFIX + two.router_id
        [item] = rig.server.read(key)
        rig.server.expire_lease(item.lease_id)
        await until(lambda: [i for i in rig.server.read(key) if i.lease_id != item.lease_id])
        await until(lambda: two.router_id in one.roster.others)


@pytest.mark.parametrize("query", ["limit=x", "limit=-1", "since_ms=x"])
async def test_what_a_router_cannot_understand_of_another_it_refuses(
    tmp_path: Path, query: str
) -> None:
    async with mesh(tmp_path, pods=0) as rig:
        assert rig.http is not None
        url = f"http://127.0.0.1:{rig.bounds[0].metrics_port}/decisions?{query}"
        async with rig.http.get(url) as reply:
            assert reply.status == 400
            assert "limit" in await reply.text()


# ---- where a request would go --------------------------------------------------------------------


async def explained(rig: MeshRig, name: str) -> Explanation:
    reply = await rig.call(ADMIN + "Explain", pb.ExplainRequest(name=name), pb.ExplainResponse)
    return decode(Explanation, reply.json)


async def test_without_an_instance_a_request_would_wait_for_one(tmp_path: Path) -> None:
    async with mesh(tmp_path, pods=0) as rig:
        await rig.register("m")
        told = await explained(rig, "m")
        assert (told.action, told.code, told.instance_id) == ("wait", "UNAVAILABLE", "")
        assert told.reason and told.text


async def test_what_speaks_against_an_instance_is_told_with_it(tmp_path: Path) -> None:
    async with mesh(tmp_path) as rig:
        gone = rig.pods[0].instance.instance_id
        other = (await rig.add_pod(zone="z2", labels=("gpu",))).instance.instance_id
        await rig.register("m", preferred_labels=("gpu",))
        rig.routers[0].peers.connect_failed(gone)
        told = await explained(rig, "m")
        assert (told.action, told.instance_id) == ("load", other)
        by_id = {one.instance_id: one for one in told.candidates}
        assert by_id[gone].marks == ("avoided", "not_preferred")
        assert "avoided" in by_id[gone].reason
        assert (by_id[other].marks, by_id[other].zone) == ((), "z2")


async def test_a_label_that_no_instance_has_is_named(tmp_path: Path) -> None:
    async with mesh(tmp_path) as rig:
        await rig.register("m", required_labels=("tpu",))
        told = await explained(rig, "m")
        assert (told.action, told.reason) == ("refused", "no_label")
        assert "tpu" in told.text


async def test_copies_that_lack_are_explained(tmp_path: Path) -> None:
    async with mesh(tmp_path) as rig:
        await rig.register("m", min_copies=2)
        await rig.infer("m", 1.0)
        told = await explained(rig, "m")
        assert told.action == "hit"
        assert "1 missing" in told.shortfall
