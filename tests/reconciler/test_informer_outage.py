"""An API server that hangs, dies and comes back, and one that comes back as it was long ago.

One server of its own, since the others' tests go on meanwhile; a restart is three seconds.
"""

from __future__ import annotations

import asyncio

import pytest

from mesh.reconciler.informer import Informer
from mesh.reconciler.kube import ApiAway, Kube, Limits, Obj
from mesh.reconciler.kube_resources import CONFIG_MAPS
from tests.etcd_server import EtcdServer
from tests.instance.fakes import until
from tests.kube_server import KubeNotFound, KubeServer

pytestmark = pytest.mark.kube

NAMESPACE = "default"


def config_map(name: str) -> Obj:
    return {"metadata": {"name": name, "namespace": NAMESPACE}}


async def wait_for(informer: Informer, *names: str) -> None:
    await until(lambda: {name for _, name in informer.store} == set(names))


async def in_thread(call: object) -> None:
    """The server's own calls block, and the informer must run meanwhile."""
    assert callable(call)
    await asyncio.to_thread(call)


async def test_a_server_that_hangs_then_dies_then_forgets() -> None:
    try:
        server = KubeServer()
    except KubeNotFound as error:
        pytest.skip(str(error))
    with server:
        limits = Limits(call_timeout_s=0.5)
        async with (
            await Kube.connect(server.kubeconfig()) as client,
            await Kube.connect(server.kubeconfig(), limits=limits) as hasty,
        ):
            informer = Informer(client, CONFIG_MAPS, NAMESPACE)
            task = asyncio.create_task(informer.run())
            try:
                await client.create(CONFIG_MAPS, config_map("a"))
                await wait_for(informer, "a")

                # It hangs: calls end with their time-out, and the watch goes on afterwards.
                server.pause()
                with pytest.raises(ApiAway, match="no answer within"):
                    await hasty.create(CONFIG_MAPS, config_map("late"))
                server.resume()
                await client.create(CONFIG_MAPS, config_map("b"))
                await client.delete(CONFIG_MAPS, NAMESPACE, "late")
                await wait_for(informer, "a", "b")
                assert (informer.lists_total, informer.watches_total) == (1, 1)

                # It dies. What it remembers of versions begins anew: Expired, and a list.
                server.kill()
                await in_thread(server.start)
                await client.delete(CONFIG_MAPS, NAMESPACE, "a")
                await client.create(CONFIG_MAPS, config_map("c"))
                await wait_for(informer, "b", "c")
                assert informer.error is None

                # Its etcd is put back to before all that: versions that were seen are to come.
                lists = informer.lists_total
                server.kill()
                server.etcd.close()
                server.etcd = EtcdServer()
                await in_thread(server.start)
                await wait_for(informer)
                assert informer.lists_total == lists + 1
                await client.create(CONFIG_MAPS, config_map("d"))
                await wait_for(informer, "d")
            finally:
                task.cancel()
                await asyncio.wait([task])
