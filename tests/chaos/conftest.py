"""One mesh that all scenarios harm in turn: each waits until it is whole before it begins."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from mesh.samples import make_samples
from mesh.store.etcd_binary import EtcdNotFound, find_etcd
from tests.chaos.proxies import ThreadedProxy
from tests.chaos.rig import CAPACITY, INSTANCES, ROUTERS, SAMPLES, Rig
from tests.etcd_server import EtcdServer
from tests.up.live import LiveMesh


@pytest.fixture(scope="session")
def chaos_samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chaos-samples")
    make_samples(folder, SAMPLES)
    return folder


@pytest.fixture(scope="session")
def sound_etcd() -> Iterator[EtcdServer]:
    """Not one that can lose what it has confirmed: then a failure would tell nothing of the mesh.

    What the chaos is about is in etcd's data when it is killed.
    """
    try:
        binary = find_etcd()
    except EtcdNotFound as error:
        pytest.skip(str(error))
    if binary.caution:
        pytest.skip(f"chaos needs an etcd to trust: {binary.caution}")
    with EtcdServer(binary=binary) as server:
        yield server


@pytest.fixture(scope="session")
def shared_rig(
    sound_etcd: EtcdServer, chaos_samples: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Rig]:
    folder = tmp_path_factory.mktemp("chaos")
    with contextlib.ExitStack() as stack:
        proxy = stack.enter_context(ThreadedProxy(sound_etcd.endpoint))
        mesh = LiveMesh(
            folder / "data",
            *("--etcd", proxy.endpoint, "--file-root", str(chaos_samples)),
            *("--routers", str(ROUTERS), "--instances", str(INSTANCES), "--capacity", CAPACITY),
        )
        stack.callback(mesh.stop)
        rig = Rig(sound_etcd, proxy, mesh.ready())
        rig.register(chaos_samples)
        yield rig


@pytest.fixture
def rig(shared_rig: Rig) -> Rig:
    shared_rig.proxy.mend()
    shared_rig.proxy.delay(0.0)
    shared_rig.whole()
    return shared_rig
