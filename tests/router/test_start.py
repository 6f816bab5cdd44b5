"""When a router says that it is ready."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from tests.router.mesh_rig import MeshRig, mesh


@pytest.mark.parametrize("port", ["grpc_port", "rest_port"])
async def test_a_router_is_not_ready_before_it_listens(tmp_path: Path, port: str) -> None:
    """Whoever replaces routers one by one ends the next one when this one is ready."""
    async with mesh(tmp_path, routers=0, pods=0) as rig:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            with pytest.raises(OSError, match=r"cannot listen|in use"):
                await rig.add_router(**{port: taken.getsockname()[1]})
            assert not was_ready(rig)
        await rig.add_router()
        assert was_ready(rig)


def was_ready(rig: MeshRig) -> bool:
    return rig.routers[-1].readiness.ready
