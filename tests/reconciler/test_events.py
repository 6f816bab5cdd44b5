"""Events: the allowance as a pure thing, the rest against the real API server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from mesh.reconciler.events import BURST, Allowance, EventRecorder
from mesh.reconciler.kube import Kube, Limits, Obj
from mesh.reconciler.kube_resources import CONFIG_MAPS, EVENTS
from tests.instance.fakes import until
from tests.kube_server import KubeServer
from tests.reconciler.access import grant
from tests.store.tcp_proxy import TcpProxy


def test_an_object_may_speak_up_in_a_burst_and_then_now_and_then() -> None:
    allowance = Allowance(burst=3, refill_ms=1_000)
    assert [allowance.take("a", 0) for _ in range(5)] == [True, True, True, False, False]
    assert allowance.take("b", 0)
    assert not allowance.take("a", 999)
    assert allowance.take("a", 1_001)
    assert not allowance.take("a", 1_002)
    assert [allowance.take("a", 99_000) for _ in range(4)] == [True, True, True, False]


def test_the_longest_silent_are_forgotten_first() -> None:
    allowance = Allowance(burst=1, refill_ms=1_000_000, limit=2)
    assert allowance.take("a", 0)
    assert allowance.take("b", 0)
    assert not allowance.take("a", 1)
    assert allowance.take("c", 2)  # b goes
    assert not allowance.take("a", 3)
    assert allowance.take("b", 4)


@asynccontextmanager
async def recording(client: Kube) -> AsyncIterator[EventRecorder]:
    recorder = EventRecorder(client, component="mesh-controller", instance="pod-1")
    task = asyncio.create_task(recorder.run())
    try:
        yield recorder
    finally:
        task.cancel()
        await asyncio.wait([task])


@pytest.fixture
async def client(kube: KubeServer) -> AsyncIterator[Kube]:
    async with await Kube.connect(kube.kubeconfig()) as client:
        yield client


async def make(client: Kube, namespace: str, name: str) -> Obj:
    return await client.create(
        CONFIG_MAPS, {"metadata": {"name": name, "namespace": namespace}, "data": {}}
    )


async def events(client: Kube, namespace: str) -> list[tuple[str, str, int]]:
    listing = await client.list(EVENTS, namespace)
    return sorted((item["reason"], item["message"], item["count"]) for item in listing.items)


@pytest.mark.kube
async def test_an_event_is_about_its_object_and_counts_itself(
    kube: KubeServer, client: Kube, namespace: str
) -> None:
    about = await make(client, namespace, "a")
    async with recording(client) as recorder:
        recorder.emit(about, "Normal", "Registered", "as a__isvc-1")
        await recorder.settled()
        for _ in range(3):
            recorder.emit(about, "Warning", "Failed", "no such path")
        await recorder.settled()
        recorder.emit(about, "Warning", "Failed", "no such path")
        await recorder.settled()
        assert await events(client, namespace) == [
            ("Failed", "no such path", 4),
            ("Registered", "as a__isvc-1", 1),
        ]
        assert client.calls_total["create", "events", 201] == 2
        selector = f"involvedObject.uid={about['metadata']['uid']},type=Warning"
        (event,) = (await client.list(EVENTS, namespace, field_selector=selector)).items
        assert event["source"] == {"component": "mesh-controller"}
    told = await asyncio.to_thread(kube.kubectl, "describe", "cm", "a", namespace=namespace)
    assert "no such path" in told.stdout


@pytest.mark.kube
async def test_an_event_whose_hour_is_over_is_written_anew(client: Kube, namespace: str) -> None:
    about = await make(client, namespace, "a")
    async with recording(client) as recorder:
        recorder.emit(about, "Normal", "Loaded", "once")
        await recorder.settled()
        (event,) = (await client.list(EVENTS, namespace)).items
        await client.delete(EVENTS, namespace, event["metadata"]["name"])
        recorder.emit(about, "Normal", "Loaded", "once")
        await recorder.settled()
    assert await events(client, namespace) == [("Loaded", "once", 1)]


@pytest.mark.kube
async def test_an_object_that_will_not_be_quiet_fills_nothing(client: Kube, namespace: str) -> None:
    about = await make(client, namespace, "a")
    async with recording(client) as recorder:
        for number in range(BURST + 10):
            recorder.emit(about, "Warning", "Failed", f"for the {number}th time")
        await recorder.settled()
    assert len(await events(client, namespace)) == BURST
    assert recorder.dropped_total == 10


@pytest.mark.kube
async def test_names_and_messages_as_long_as_they_get(client: Kube, namespace: str) -> None:
    about = await make(client, namespace, "a" * 235 + "-" + "b" * 17)
    async with recording(client) as recorder:
        recorder.emit(about, "Normal", "Loaded", "ä" * 5_000)
        await recorder.settled()
    assert [(r, len(m)) for r, m, _ in await events(client, namespace)] == [("Loaded", 1_024)]


@pytest.mark.kube
async def test_a_missing_right_loses_events_and_is_said_once(
    kube: KubeServer, client: Kube, namespace: str, caplog: pytest.LogCaptureFixture
) -> None:
    about = await make(client, namespace, "a")
    grant(kube, namespace, "controller", CONFIG_MAPS, "get")
    async with (
        await Kube.connect(kube.kubeconfig("controller")) as limited,
        recording(limited) as recorder,
    ):
        for message in ("one", "two", "three"):
            recorder.emit(about, "Normal", "Loaded", message)
        await recorder.settled()
        assert recorder.dropped_total == 3
        warnings = [r for r in caplog.records if r.levelname == "WARNING"]
        assert len(warnings) == 1
        assert "cannot create events a." in warnings[0].getMessage()
        assert await limited.get(CONFIG_MAPS, namespace, "a") == about


@pytest.mark.kube
async def test_what_could_not_be_written_while_the_server_was_away_is_written_later(
    kube: KubeServer, client: Kube, namespace: str
) -> None:
    about = await make(client, namespace, "a")
    async with TcpProxy(f"127.0.0.1:{kube.port}") as proxy:
        path = kube.kubeconfig(url=f"https://{proxy.endpoint}")
        async with (
            await Kube.connect(path, limits=Limits(call_timeout_s=0.2)) as cut,
            recording(cut) as recorder,
        ):
            proxy.delay_s = 1.0  # beyond the call's time-out
            recorder.emit(about, "Normal", "Loaded", "late")
            await until(lambda: cut.calls_total["create", "events", 0])
            proxy.delay_s = 0.0
            await recorder.settled()
    assert [(r, m) for r, m, _ in await events(client, namespace)] == [("Loaded", "late")]
