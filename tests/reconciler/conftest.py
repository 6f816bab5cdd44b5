"""A namespace of the session's API server for each test, and an etcd for the mesh."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest

from tests.etcd_server import EtcdServer
from tests.kube_server import KubeServer
from tests.reconciler.rig import Rig, rig_of


@pytest.fixture
def namespace(kube: KubeServer) -> str:
    return kube.create_namespace()


@pytest.fixture(scope="session")
def mesh_etcd() -> Iterator[EtcdServer]:
    with EtcdServer() as etcd:
        yield etcd


@pytest.fixture
async def rig(kube: KubeServer, mesh_etcd: EtcdServer, namespace: str) -> AsyncIterator[Rig]:
    async with rig_of(kube, mesh_etcd, namespace) as rig:
        yield rig
