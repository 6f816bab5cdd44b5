"""Copies that come and go at a steady rate, written to an etcd: ``python -m bench.copy_events``.

Each event is a transaction of its own, as instances write them: a claim, LOADED, and the removal.
Prints how many events it has written and in how many seconds.
"""

from __future__ import annotations

import asyncio
import random
import sys
import time
from collections import deque
from collections.abc import Iterator

from mesh.core.types import CopyRecord, CopyState
from mesh.registry import copy_key, encode
from mesh.store.api import Delete, Put
from mesh.store.etcd import EtcdStore
from mesh.store.etcd_options import EtcdOptions

# Transactions under way at once: enough for any rate asked for here.
_AT_ONCE = 32
_MADE_AT_MS = 1_700_000_000_000


def model_id(number: int) -> str:
    return f"model-{number:06}__isvc-0123456789"


def instance_id(number: int) -> str:
    return f"instance-{number:04}-7d9f8c6b5d-x2x4z"


def events(models: int, instances: int, seed: int) -> Iterator[Put | Delete]:
    """Of copies of models drawn evenly: LOADING, LOADED, later gone."""
    rng = random.Random(seed)
    loaded: deque[str] = deque()  # the oldest goes: no transaction under way is of the same key
    there: set[str] = set()
    while True:
        model, instance = model_id(rng.randrange(models)), instance_id(rng.randrange(instances))
        key = copy_key(model, instance)
        if key in there:
            continue
        there.add(key)
        claim = CopyRecord(model, instance, CopyState.LOADING, 50 << 20, _MADE_AT_MS)
        yield Put(key, encode(claim))
        copy = CopyRecord(model, instance, CopyState.LOADED, 51 << 20, _MADE_AT_MS, _MADE_AT_MS)
        yield Put(key, encode(copy))
        loaded.append(key)
        if len(loaded) > instances:
            gone = loaded.popleft()
            there.remove(gone)
            yield Delete(gone)


async def write(endpoint: str, namespace: str, rate: float, seconds: float, span: int) -> None:
    store = EtcdStore(EtcdOptions((endpoint,)), namespace=namespace)
    await store.wait_ready()
    source = events(span, 1_000, seed=1)
    room = asyncio.Semaphore(_AT_ONCE)
    started_s = time.perf_counter()
    total = int(rate * seconds)

    async def one(operation: Put | Delete) -> None:
        try:
            await store.txn([], [operation])
        finally:
            room.release()

    async with asyncio.TaskGroup() as tasks:
        for number in range(total):
            await asyncio.sleep(max(0.0, started_s + number / rate - time.perf_counter()))
            await room.acquire()
            tasks.create_task(one(next(source)))
    print(total, time.perf_counter() - started_s, flush=True)
    await store.close()


if __name__ == "__main__":
    asyncio.run(
        write(sys.argv[1], sys.argv[2], float(sys.argv[3]), float(sys.argv[4]), int(sys.argv[5]))
    )
