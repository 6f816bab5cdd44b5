"""List and watch against the real API server, and through a proxy that cuts them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from mesh.reconciler.informer import Informer
from mesh.reconciler.kube import ApiAway, ApiForbidden, Kube, Limits, Obj, Resource
from mesh.reconciler.kube_resources import CONFIG_MAPS
from tests.instance.fakes import until
from tests.kube_server import KubeServer
from tests.reconciler.access import grant, revoke
from tests.store.tcp_proxy import TcpProxy

pytestmark = pytest.mark.kube


class Seen:
    """Waits until an informer's store is as a test wants it, at each of its callbacks."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self._moved = asyncio.Event()

    def __call__(self, _: Resource, namespace: str, name: str) -> None:
        self.told.append(name)
        self._moved.set()

    async def until(self, reached: Callable[[], bool]) -> None:
        async with asyncio.timeout(30):
            while not reached():
                self._moved.clear()
                await self._moved.wait()


@asynccontextmanager
async def following(client: Kube, namespace: str) -> AsyncIterator[tuple[Informer, Seen]]:
    seen = Seen()
    informer = Informer(client, CONFIG_MAPS, namespace, on_change=seen)
    task = asyncio.create_task(informer.run())
    try:
        yield informer, seen
    finally:
        task.cancel()
        await asyncio.wait([task])


@pytest.fixture
async def client(kube: KubeServer) -> AsyncIterator[Kube]:
    async with await Kube.connect(kube.kubeconfig()) as client:
        yield client


def config_map(namespace: str, name: str, **data: str) -> Obj:
    return {"metadata": {"name": name, "namespace": namespace}, "data": data}


async def test_the_store_follows_what_comes_changes_and_goes(client: Kube, namespace: str) -> None:
    await client.create(CONFIG_MAPS, config_map(namespace, "old", x="1"))
    async with following(client, namespace) as (informer, seen):
        assert not informer.synced
        await informer.wait_synced()
        assert seen.told == ["old"]
        await client.create(CONFIG_MAPS, config_map(namespace, "new", x="1"))
        await seen.until(lambda: informer.get(namespace, "new") is not None)
        await client.patch(CONFIG_MAPS, namespace, "new", {"data": {"x": "2"}})
        await seen.until(lambda: informer.store[namespace, "new"]["data"]["x"] == "2")
        await client.delete(CONFIG_MAPS, namespace, "old")
        await seen.until(lambda: informer.get(namespace, "old") is None)
        (kept,) = informer.store.values()
        assert "managedFields" not in kept["metadata"]
        assert (kept["kind"], kept["apiVersion"]) == ("ConfigMap", "v1")
        assert (informer.lists_total, informer.watches_total) == (1, 1)


async def test_what_is_kept_of_an_object_is_the_callers_choice(
    client: Kube, namespace: str
) -> None:
    await client.create(CONFIG_MAPS, config_map(namespace, "a", x="1", y="2"))
    seen = Seen()

    def keep(obj: Obj) -> Obj:
        return obj | {"data": sorted(obj["data"])}

    informer = Informer(client, CONFIG_MAPS, namespace, on_change=seen, keep=keep)
    task = asyncio.create_task(informer.run())
    await informer.wait_synced()
    assert informer.store[namespace, "a"]["data"] == ["x", "y"]
    await client.patch(CONFIG_MAPS, namespace, "a", {"data": {"z": "3"}})
    await seen.until(lambda: informer.store[namespace, "a"]["data"] == ["x", "y", "z"])
    task.cancel()
    await asyncio.wait([task])


async def test_a_watch_that_was_cut_resumes_and_lists_nothing_again(
    kube: KubeServer, client: Kube, namespace: str
) -> None:
    async with TcpProxy(f"127.0.0.1:{kube.port}") as proxy:
        path = kube.kubeconfig(url=f"https://{proxy.endpoint}")
        async with (
            await Kube.connect(path) as cut_client,
            following(cut_client, namespace) as (informer, seen),
        ):
            await client.create(CONFIG_MAPS, config_map(namespace, "a"))
            await client.create(CONFIG_MAPS, config_map(namespace, "b"))
            await seen.until(lambda: len(informer.store) == 2)
            proxy.cut()
            # While nothing gets through: one goes, one changes, one comes.
            await client.delete(CONFIG_MAPS, namespace, "a")
            await client.patch(CONFIG_MAPS, namespace, "b", {"data": {"x": "2"}})
            await client.create(CONFIG_MAPS, config_map(namespace, "c"))
            assert {name for _, name in informer.store} == {"a", "b"}
            proxy.mend()
            await seen.until(lambda: {name for _, name in informer.store} == {"b", "c"})
            assert informer.store[namespace, "b"]["data"] == {"x": "2"}
            assert (informer.lists_total, informer.error) == (1, None)


async def test_a_watch_whose_time_is_over_goes_on_without_a_list(
    kube: KubeServer, client: Kube, namespace: str
) -> None:
    limits = Limits(watch_timeout_s=1)
    async with (
        await Kube.connect(kube.kubeconfig(), limits=limits) as short,
        following(short, namespace) as (informer, seen),
    ):
        await informer.wait_synced()
        made: list[str] = []
        while informer.watches_total < 3:
            made.append(f"a{len(made)}")
            await client.create(CONFIG_MAPS, config_map(namespace, made[-1]))
            await seen.until(lambda: len(informer.store) == len(made))
        assert informer.lists_total == 1
        assert seen.told == made


async def test_a_server_that_cannot_be_reached_keeps_the_store_and_is_said_once(
    kube: KubeServer, client: Kube, namespace: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with TcpProxy(f"127.0.0.1:{kube.port}") as proxy:
        path = kube.kubeconfig(url=f"https://{proxy.endpoint}")
        async with (
            await Kube.connect(path) as cut_client,
            following(cut_client, namespace) as (informer, seen),
        ):
            await client.create(CONFIG_MAPS, config_map(namespace, "a"))
            await seen.until(lambda: len(informer.store) == 1)
            caplog.clear()
            proxy.cut()
            failed = cut_client.calls_total
            await until(lambda: failed["list", "configmaps", 0] >= 3)
            assert isinstance(informer.error, ApiAway)
            assert [name for _, name in informer.store] == ["a"]
            # The watch that broke, and the look at the server after it.
            assert len([r for r in caplog.records if r.levelname == "WARNING"]) <= 2
            proxy.mend()
            await client.create(CONFIG_MAPS, config_map(namespace, "b"))
            await seen.until(lambda: len(informer.store) == 2)


async def test_a_missing_right_is_told_and_the_informer_goes_on_when_it_comes(
    kube: KubeServer, client: Kube, namespace: str, caplog: pytest.LogCaptureFixture
) -> None:
    await client.create(CONFIG_MAPS, config_map(namespace, "a"))
    grant(kube, namespace, "controller", CONFIG_MAPS, "list")
    async with (
        await Kube.connect(kube.kubeconfig("controller")) as limited,
        following(limited, namespace) as (informer, seen),
    ):
        await informer.wait_synced()  # of a list alone
        await until(lambda: isinstance(informer.error, ApiForbidden))
        assert f"cannot watch configmaps in namespace {namespace}" in caplog.text
        revoke(kube, namespace, "controller", CONFIG_MAPS)
        grant(kube, namespace, "controller", CONFIG_MAPS, "list", "watch")
        await client.create(CONFIG_MAPS, config_map(namespace, "b"))
        await seen.until(lambda: len(informer.store) == 2)
        assert (informer.lists_total, informer.error) == (1, None)
