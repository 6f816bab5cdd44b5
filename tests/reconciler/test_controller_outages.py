"""The API server or etcd away, slow, or cut: afterwards all is as it should be, nothing is lost."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from mesh.reconciler import work_queue
from mesh.reconciler.controller import ServiceKey
from mesh.reconciler.kube import Limits
from mesh.reconciler.kube_resources import INFERENCE_SERVICES, Obj
from mesh.reconciler.plan import FINALIZER
from tests.etcd_server import EtcdServer
from tests.kube_server import KubeServer
from tests.reconciler.rig import Rig, condition, isvc, rig_of, runtime, until
from tests.store.tcp_proxy import TcpProxy

pytestmark = [pytest.mark.kube, pytest.mark.etcd]


@asynccontextmanager
async def behind_proxy(rig: Rig, limits: Limits | None = None) -> AsyncIterator[TcpProxy]:
    """The controller reaches the API server through it, the test does not."""
    async with TcpProxy(f"127.0.0.1:{rig.server.port}") as proxy:
        await rig.apply(runtime("mesh-1.x", rig.namespace))
        await rig.mesh.instance()
        config = rig.server.kubeconfig("admin", url=f"https://{proxy.endpoint}")
        await rig.start(kubeconfig=config, limits=limits)
        yield proxy
        await rig.stop()


async def served(rig: Rig, *names: str) -> None:
    for name in names:
        await rig.apply(isvc(name, rig.namespace))
        await rig.mesh.registered(name)
        await rig.mesh.load(name)
        await rig.ready(name)


def is_ready(obj: Obj) -> bool:
    return condition(obj.get("status") or {}, "Ready").get("status") == "True"


async def unanswered(rig: Rig, verb: str) -> None:
    """Until a call of that kind has got no answer."""

    async def look() -> bool:
        return any(kind == verb and code == 0 for kind, _, code in rig.calls)

    await until(look, what=f"a {verb} without an answer")


async def change_everything(rig: Rig) -> str:
    """To be told while the controller cannot hear of it: one loads, one changes, one goes, one
    comes. The target of the changed one as it was."""
    await rig.mesh.load("loads")
    old = await rig.mesh.alias("changes")
    assert old is not None
    await rig.apply(isvc("changes", rig.namespace, uri="s3://models/two"))
    await rig.client.delete(INFERENCE_SERVICES, rig.namespace, "goes")
    await rig.apply(isvc("comes", rig.namespace))
    return old.target_model_id


async def in_step(rig: Rig, old: str) -> None:
    await rig.ready("loads")
    await rig.mesh.registered("changes", besides=old)
    await rig.gone("goes")
    await rig.mesh.registered("comes")
    await rig.idle()
    assert set(await rig.mesh.aliases()) == {"loads", "changes", "comes"}
    assert len(await rig.mesh.models()) == 4  # of the changed one both


async def test_the_api_server_goes_away_and_comes_back(rig: Rig) -> None:
    async with behind_proxy(rig) as proxy:
        await served(rig, "changes", "goes")
        await rig.apply(isvc("loads", rig.namespace))
        await rig.mesh.registered("loads")
        proxy.cut()
        old = await change_everything(rig)
        await unanswered(rig, "update")  # the status of what has loaded
        await unanswered(rig, "watch")
        before = await rig.mesh.aliases()
        assert "comes" not in before and "goes" in before
        assert not is_ready(await rig.get("loads"))
        proxy.mend()
        await in_step(rig, old)


async def test_what_failed_meanwhile_is_tried_again_as_soon_as_the_server_is_back(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(work_queue, "LONGEST_MS", 3_600_000)
    async with behind_proxy(rig) as proxy:
        await rig.apply(isvc("loads", rig.namespace))
        await rig.mesh.registered("loads")
        await rig.idle()
        proxy.cut()
        await rig.mesh.load("loads")
        await unanswered(rig, "watch")
        controller = rig.controller
        assert controller is not None
        queue = controller.queue
        key = ServiceKey(INFERENCE_SERVICES, rig.namespace, "loads")

        async def often() -> bool:
            queue.add(key)
            return queue.schedule.failures(key) > 20

        await until(often, what="many failures")
        await rig.idle()
        assert key in queue.schedule.failed  # and due in an hour
        proxy.mend()
        await rig.ready("loads")


async def test_cut_watches_lose_nothing(rig: Rig) -> None:
    async with behind_proxy(rig) as proxy:
        await served(rig, "changes", "goes")
        await rig.apply(isvc("loads", rig.namespace))
        await rig.mesh.registered("loads")
        for _ in range(3):
            proxy.cut()
            proxy.mend()
        old = await change_everything(rig)
        proxy.cut()
        proxy.mend()
        await in_step(rig, old)


async def test_a_slow_api_server_only_takes_longer(rig: Rig) -> None:
    async with behind_proxy(rig) as proxy:
        await served(rig, "changes", "goes")
        await rig.apply(isvc("loads", rig.namespace))
        await rig.mesh.registered("loads")
        proxy.delay_s = 0.1
        old = await change_everything(rig)
        await in_step(rig, old)
        assert not any(code == 0 for _, _, code in rig.calls)


async def test_a_server_that_takes_requests_and_says_nothing(rig: Rig) -> None:
    """Writes whose answers never come may have been done: they are looked at, not repeated."""
    async with behind_proxy(rig, Limits(call_timeout_s=0.3)) as proxy:
        await served(rig, "changes", "goes")
        await rig.apply(isvc("loads", rig.namespace))
        await rig.mesh.registered("loads")
        await rig.idle()
        proxy.delay_s = 3_600.0
        old = await change_everything(rig)
        await unanswered(rig, "update")
        proxy.delay_s = 0.0
        proxy.cut()
        proxy.mend()
        await in_step(rig, old)


# ---- etcd ---------------------------------------------------------------------------------------


@pytest.fixture
async def own(kube: KubeServer, namespace: str) -> AsyncIterator[Rig]:
    """With an etcd that the test may stop."""
    with EtcdServer() as etcd:
        async with rig_of(kube, etcd, namespace) as rig:
            await rig.apply(runtime("mesh-1.x", rig.namespace))
            yield rig


async def test_while_etcd_is_away_a_deletion_waits_and_what_is_said_stays(own: Rig) -> None:
    await own.mesh.instance()
    await own.start()
    await served(own, "goes", "stays")
    await own.idle()
    before: Obj = (await own.get("stays"))["status"]
    own.etcd.kill()
    await own.client.delete(INFERENCE_SERVICES, own.namespace, "goes")
    event = await own.event("goes", "RegistryAway")
    assert event["type"] == "Warning" and "'goes' stays registered" in event["message"]
    await own.apply(isvc("comes", own.namespace))
    waiting = await own.status("comes", lambda s: s.get("conditions"))
    assert not is_ready({"status": waiting})
    assert FINALIZER in (await own.get("goes"))["metadata"]["finalizers"]
    assert (await own.get("stays"))["status"] == before
    own.etcd.start()
    await own.gone("goes")
    await own.mesh.registered("comes")
    await own.idle()
    assert set(await own.mesh.aliases()) == {"stays", "comes"}
    assert (await own.get("stays"))["status"] == before


async def test_a_controller_that_starts_without_etcd_says_so_and_waits(own: Rig) -> None:
    own.etcd.kill()
    controller = await own.start()
    await own.apply(isvc("iris", own.namespace))
    await own.status("iris", lambda s: s.get("conditions"))
    assert "registry" in controller.not_ready()
    own.etcd.start()
    await own.mesh.registered("iris")
    assert controller.not_ready() == ""


async def test_a_start_with_etcd_says_nothing_of_its_absence(own: Rig) -> None:
    for number in range(5):
        await own.apply(isvc(f"m{number}", own.namespace))
    await own.start()
    for number in range(5):
        status = await own.status(f"m{number}", lambda s: s.get("conditions"))
        assert "registry" not in str(status)
        assert (await own.get(f"m{number}"))["metadata"]["finalizers"] == [FINALIZER]


async def test_a_lost_registry_is_written_anew(own: Rig) -> None:
    await own.mesh.instance()
    await own.start()
    await served(own, "iris")
    before = await own.mesh.alias("iris")
    assert before is not None
    await own.mesh.clear()
    after = await own.mesh.registered("iris")
    assert after.target_model_id == before.target_model_id and after.awaits_load


async def test_a_finalizer_whose_registry_is_gone_goes(own: Rig) -> None:
    await own.start()
    await own.apply(isvc("iris", own.namespace))
    await own.mesh.registered("iris")
    await own.idle()
    await own.stop()
    await own.mesh.clear()
    await own.client.delete(INFERENCE_SERVICES, own.namespace, "iris")
    assert FINALIZER in (await own.get("iris"))["metadata"]["finalizers"]
    await own.start()
    await own.gone("iris")
    assert await own.mesh.aliases() == {}
