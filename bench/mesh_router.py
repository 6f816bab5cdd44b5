"""Our router in front of one back end: ``python -m bench.mesh_router LISTEN_PORT BACKEND_PORT``.

The complete router of the product (``router.process.Router``: all methods, REST and metrics
listeners, election, view by watch) over a store in memory that holds one model with one loaded
copy, the back end.
"""

from __future__ import annotations

import asyncio
import signal
import sys
import time

import uvloop

from mesh.core.types import CopyRecord, CopyState, InstanceRecord, InstanceState, ModelRecord
from mesh.registry import encode, key_of
from mesh.store.memory import MemoryStore
from router.process import Router
from router.settings import RouterSettings

MODEL = "bench-model"
INSTANCE = "bench-instance"


async def filled_store(backend: int) -> MemoryStore:
    """The records of a mesh of one instance, the back end, with one loaded copy of one model."""
    now_ms = int(time.time() * 1_000)
    store = MemoryStore()
    for record in (
        InstanceRecord(
            instance_id=INSTANCE,
            address=f"127.0.0.1:{backend}",
            state=InstanceState.READY,
            capacity_bytes=1 << 30,
            model_types=("onnx",),
            started_at_ms=now_ms,
        ),
        ModelRecord(model_id=MODEL, model_type="onnx", created_at_ms=now_ms),
        CopyRecord(MODEL, INSTANCE, CopyState.LOADED, size_bytes=1_000, loaded_at_ms=now_ms),
    ):
        await store.put(key_of(record), encode(record))
    return store


async def serve(port: int, backend: int) -> None:
    settings = RouterSettings(
        grpc_port=port, rest_port=0, metrics_port=0, reuse_port=False, drain_notice_ms=0
    )
    router = Router(settings, await filled_store(backend))
    await router.start()
    stopped = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopped.set)
    await stopped.wait()
    await router.close()


if __name__ == "__main__":
    uvloop.run(serve(int(sys.argv[1]), int(sys.argv[2])))
