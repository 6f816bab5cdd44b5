"""One pull by one client, timed from the first request to the last byte in its file.

``python -m bench.pull_client CLIENT ENDPOINT BUCKET KEY FOLDER`` prints seconds and bytes. Imports,
and what a client needs once (its connections to nowhere, its event loop), are not counted.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import uvloop

if TYPE_CHECKING:
    import obstore

CHUNK_BYTES = 1 << 20
PART_BYTES = 8 << 20
PARALLEL = 8

Pull = Callable[[str, str, str, Path], Coroutine[None, None, tuple[float, Path]]]


async def by_mesh(endpoint: str, bucket: str, key: str, folder: Path) -> tuple[float, Path]:
    import puller.stores  # noqa: F401 - the back end, which the first fetch would import
    from mesh.artifacts import ArtifactRequest
    from puller.puller import Puller
    from puller.settings import PullerSettings

    environment = {"AWS_ENDPOINT_URL": endpoint}
    pulling = Puller(PullerSettings(cache_dir=folder / "cache", store_env=environment))
    await pulling.start()
    started = time.perf_counter()
    artifact = await pulling.fetch(ArtifactRequest("m", f"s3://{bucket}/{key}", "", "onnx"))
    took_s = time.perf_counter() - started
    kept = folder / "kept"
    os.link(artifact.path, kept)
    await pulling.close()
    return took_s, kept


async def by_obstore(endpoint: str, bucket: str, key: str, folder: Path) -> tuple[float, Path]:
    """Its own best: one request, streamed in large chunks."""
    import obstore

    store = _store(endpoint, bucket)
    path = folder / "object"
    started = time.perf_counter()
    result = await obstore.get_async(store, key)
    with path.open("wb", buffering=0) as file:
        async for chunk in result.stream(min_chunk_size=CHUNK_BYTES):
            file.write(chunk)
    return time.perf_counter() - started, path


async def by_obstore_ranges(
    endpoint: str, bucket: str, key: str, folder: Path
) -> tuple[float, Path]:
    """Eight ranges at once, each written where it belongs."""
    import obstore

    store = _store(endpoint, bucket)
    path = folder / "object"
    started = time.perf_counter()
    meta = await obstore.head_async(store, key)
    starts = iter(range(0, meta["size"], PART_BYTES))
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT)

    async def work() -> None:
        for start in starts:
            end = min(start + PART_BYTES, meta["size"])
            data = await obstore.get_range_async(store, key, start=start, end=end)
            os.pwrite(descriptor, data, start)

    await asyncio.gather(*(work() for _ in range(PARALLEL)))
    os.close(descriptor)
    return time.perf_counter() - started, path


async def by_aiohttp(endpoint: str, bucket: str, key: str, folder: Path) -> tuple[float, Path]:
    import aiohttp

    path = folder / "object"
    async with aiohttp.ClientSession(read_bufsize=CHUNK_BYTES) as session:
        started = time.perf_counter()
        async with session.get(f"{endpoint}/{bucket}/{key}") as reply:
            with path.open("wb", buffering=0) as file:
                async for chunk in reply.content.iter_any():
                    file.write(chunk)
        return time.perf_counter() - started, path


async def by_curl(endpoint: str, bucket: str, key: str, folder: Path) -> tuple[float, Path]:
    path = folder / "object"
    told = subprocess.run(  # noqa: ASYNC221 - it is alone here
        ["curl", "-sf", "-o", str(path), "-w", "%{time_total}", f"{endpoint}/{bucket}/{key}"],
        check=True,
        capture_output=True,
        text=True,
    )
    return float(told.stdout), path


def _store(endpoint: str, bucket: str) -> obstore.store.S3Store:
    from obstore.store import S3Store

    return S3Store(
        bucket,
        config={"endpoint": endpoint, "region": "us-east-1", "skip_signature": True},
        client_options={"allow_http": True, "timeout": timedelta(seconds=600)},
    )


CLIENTS: dict[str, Pull] = {
    "mesh": by_mesh,
    "obstore": by_obstore,
    "obstore, ranges": by_obstore_ranges,
    "aiohttp": by_aiohttp,
    "curl": by_curl,
}


def main(client: str, endpoint: str, bucket: str, key: str, folder: str) -> None:
    # The loop that the serving pod has, for all who have a loop.
    took_s, path = uvloop.run(CLIENTS[client](endpoint, bucket, key, Path(folder)))
    print(f"RESULT {took_s:.6f} {path.stat().st_size}")


if __name__ == "__main__":
    main(*sys.argv[1:])
