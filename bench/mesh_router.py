"""Our router in front of one back end: ``python -m bench.mesh_router LISTEN_PORT BACKEND_PORT``.

The router's own parts, composed with a view that is written here instead of read from etcd: the
relay with its limits, names, routes, retries and retained bytes, and the metrics.
"""

from __future__ import annotations

import asyncio
import gc
import random
import signal
import sys
import time

import uvloop

from bench.payload import INFER_PATH
from mesh.core.policy import Policy
from mesh.core.types import CopyRecord, CopyState, InstanceRecord, InstanceState, ModelRecord
from mesh.core.view import ClusterView
from mesh.metrics import RouterMetrics
from mesh.store.memory import MemoryStore
from mesh.wire.limits import PUBLIC
from mesh.wire.relay import Relay
from mesh.wire.server import Server
from router.dispatch import Dispatcher
from router.loads import Loads
from router.names import NameLookup
from router.peers import Peers

MODEL = "bench-model"
INSTANCE = "bench-instance"


def view_of(backend: int) -> ClusterView:
    """A cluster of one instance, the back end, that holds one loaded copy of one model."""
    now_ms = int(time.time() * 1_000)
    view = ClusterView()
    view.put_instance(
        InstanceRecord(
            instance_id=INSTANCE,
            address=f"127.0.0.1:{backend}",
            state=InstanceState.READY,
            capacity_bytes=1 << 30,
            model_types=("onnx",),
        )
    )
    view.put_model(ModelRecord(model_id=MODEL, model_type="onnx", created_at_ms=now_ms))
    view.put_copy(
        CopyRecord(MODEL, INSTANCE, CopyState.LOADED, size_bytes=1_000, loaded_at_ms=now_ms), 1
    )
    view.advance(1)
    return view


async def serve(port: int, backend: int) -> None:
    view, metrics, policy = view_of(backend), RouterMetrics(), Policy()
    peers = Peers(view)
    loads = Loads(view, peers, metrics, policy=policy, now_ms=lambda: int(time.time() * 1_000))
    names = NameLookup(MemoryStore(), view, clock=time.monotonic)
    dispatcher = Dispatcher(
        view, peers, loads, names, metrics, policy=policy, draw=random.random
    )  # fmt: skip
    paths = frozenset({INFER_PATH})
    relay = Relay(dispatcher, peek=paths, idempotent=paths, limits=PUBLIC)
    server = Server({}, limits=PUBLIC, fallback=relay)
    await server.start("127.0.0.1", port)
    gc.collect()
    gc.freeze()
    stopped = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopped.set)
    await stopped.wait()
    await server.close()


if __name__ == "__main__":
    uvloop.run(serve(int(sys.argv[1]), int(sys.argv[2])))
