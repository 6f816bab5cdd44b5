"""A store of each kind, and for etcd a server that the tests of one file share."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Callable, Iterator

import pytest

from mesh.store.api import KVStore
from mesh.store.etcd import EtcdStore
from mesh.store.etcd_binary import EtcdNotFound
from mesh.store.etcd_options import EtcdOptions
from mesh.store.memory import MemoryServer, MemoryStore
from tests.etcd_server import EtcdServer

OpenStore = Callable[[], KVStore]


@pytest.fixture(scope="module")
def etcd() -> Iterator[EtcdServer]:
    try:
        server = EtcdServer()
    except EtcdNotFound as error:
        pytest.skip(str(error))
    with server:
        yield server


@pytest.fixture(params=["memory", pytest.param("etcd", marks=pytest.mark.etcd)])
async def open_store(request: pytest.FixtureRequest) -> AsyncIterator[OpenStore]:
    """Opens clients of one and the same store; each test has a namespace of its own."""
    opened: list[KVStore] = []
    namespace = uuid.uuid4().hex
    if request.param == "memory":
        memory = MemoryServer()
    else:
        endpoint = request.getfixturevalue("etcd").endpoint

    def open_one() -> KVStore:
        store: KVStore
        if request.param == "memory":
            store = MemoryStore(memory)
        else:
            store = EtcdStore(EtcdOptions((endpoint,)), namespace=namespace)
        opened.append(store)
        return store

    yield open_one
    for store in opened:
        await store.close()


@pytest.fixture
def store(open_store: OpenStore) -> KVStore:
    return open_store()
