"""One real API server with the project's CRDs for the session, and a namespace for each test.

It is the same server for all: a test that stops it, pauses it or wants other flags starts a
``KubeServer`` of its own. The mesh's etcd is another one, also for the session.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest

from tests.etcd_server import EtcdServer
from tests.kube_server import KubeNotFound, KubeServer
from tests.reconciler.rig import Rig, rig_of


@pytest.fixture(scope="session")
def kube() -> Iterator[KubeServer]:
    try:
        server = KubeServer()
    except KubeNotFound as error:
        pytest.skip(str(error))
    with server:
        server.install_crds()
        yield server


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
