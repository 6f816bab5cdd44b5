"""Several processes on one cache folder, and what a killed one leaves."""

from __future__ import annotations

import asyncio
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from mesh.core.errors import LoadFailed
from tests.puller.conftest import AWS_KEYS, OpenPuller, entries, leftovers, owners, request
from tests.puller.fakes import WAIT_S, FakeStore, content
from tests.puller.servers import Relay, relaying

ROOT = Path(__file__).parents[2]

# Fetches one artifact, says so, holds it until its standard input ends.
FETCHER = """
import asyncio, json, sys
from pathlib import Path
from mesh.artifacts import ArtifactRequest
from puller.puller import Puller, PullerSettings

async def main() -> None:
    cache_dir, uri, env = sys.argv[1:]
    puller = Puller(PullerSettings(
        cache_dir=Path(cache_dir), cache_capacity_bytes=300_000, store_env=json.loads(env),
        part_bytes=10_000, chunk_bytes=1_000, parallelism=2, fsync=False,
    ))
    def progress(done, total):
        if done:
            print("PROGRESS", flush=True)
    artifact = await puller.fetch(ArtifactRequest("m", uri, "", "onnx"), progress)
    print("FETCHED", artifact.cached, artifact.path, flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await puller.close()

asyncio.run(main())
"""


class Fetcher:
    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    @classmethod
    async def start(cls, cache_dir: Path, uri: str, env: str) -> Fetcher:
        return cls(
            await asyncio.create_subprocess_exec(
                *(sys.executable, "-c", FETCHER, str(cache_dir), uri, env),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                cwd=ROOT,
            )
        )

    async def line(self, beginning: str) -> list[str]:
        assert self._process.stdout is not None
        async with asyncio.timeout(WAIT_S):
            while line := (await self._process.stdout.readline()).decode():
                if line.startswith(beginning):
                    return line.split()
        raise AssertionError(f"the process ended without {beginning}")

    async def kill(self) -> None:
        if self._process.returncode is None:
            self._process.kill()
        await self._process.wait()


def sha256(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def env(endpoint: str) -> str:
    return json.dumps({**AWS_KEYS, "AWS_ENDPOINT_URL": endpoint})


async def test_two_processes_download_once_and_share_the_entry(
    s3: Any, bucket: str, moto_endpoint: str, cache_dir: Path
) -> None:
    s3.put_object(Bucket=bucket, Key="m", Body=content(200_000))
    uri = f"s3://{bucket}/m"
    fetchers = [await Fetcher.start(cache_dir, uri, env(moto_endpoint)) for _ in range(2)]
    try:
        said = [await fetcher.line("FETCHED") for fetcher in fetchers]
        assert sorted(words[1] for words in said) == ["False", "True"]
        assert said[0][2] == said[1][2]
        assert sha256(said[0][2]) == hashlib.sha256(content(200_000)).hexdigest()
    finally:
        for fetcher in fetchers:
            await fetcher.kill()


async def test_a_hold_lasts_as_long_as_its_process(
    open_puller: OpenPuller, s3: Any, bucket: str, moto_endpoint: str, cache_dir: Path
) -> None:
    s3.put_object(Bucket=bucket, Key="m", Body=content(200_000))
    other = FakeStore({"n": content(200_000)})
    puller = open_puller(other, cache_capacity_bytes=300_000)
    fetcher = await Fetcher.start(cache_dir, f"s3://{bucket}/m", env(moto_endpoint))
    try:
        await fetcher.line("FETCHED")
        held = entries(cache_dir)
        with pytest.raises(LoadFailed, match="in use"):
            await puller.fetch(request("s3://bucket/n"))
        assert entries(cache_dir) == held != []
    finally:
        await fetcher.kill()
    await puller.fetch(request("s3://bucket/n"))
    assert not set(held) & set(entries(cache_dir))


async def test_what_a_killed_process_left_is_removed_at_the_next_start(
    open_puller: OpenPuller, s3: Any, bucket: str, moto_endpoint: str, cache_dir: Path
) -> None:
    s3.put_object(Bucket=bucket, Key="m", Body=content(200_000))
    uri = f"s3://{bucket}/m"

    class Stuck(Relay):
        """Lets a part of the object through and then nothing."""

        async def serve(self, reader: Any, writer: Any) -> None:
            if self.cuts_left > 0:
                self.cuts_left -= 1
                await super().serve(reader, writer)
            else:
                await reader.read()

    # The listing and the head go through, and one read; the second read hangs.
    relay = Stuck(moto_endpoint, cut_after_bytes=1 << 30, cuts=3)
    async with relaying(relay) as endpoint:
        fetcher = await Fetcher.start(cache_dir, uri, env(endpoint))
        try:
            await fetcher.line("PROGRESS")
            assert len(leftovers(cache_dir)) == 1
            bystander = open_puller(FakeStore({"x": b"x"}), cache_capacity_bytes=300_000)
            await bystander.start()
            assert len(leftovers(cache_dir)) == 1  # a living process's part stays
        finally:
            await fetcher.kill()
    assert len(leftovers(cache_dir)) == 1
    puller = open_puller(FakeStore({"n": content(200_000)}), cache_capacity_bytes=300_000)
    await puller.start()
    assert leftovers(cache_dir) == entries(cache_dir) == []
    assert len(owners(cache_dir)) == 2
    await puller.fetch(request("s3://bucket/n"))  # nothing of the dead one is reserved
