"""`mesh pull` that is killed, interrupted or slowed, and folders that cannot be renamed over."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from aiohttp import web

from mesh.cli import pull as command
from mesh.cli.pull import RECORD, Target
from tests.cli.test_pull import names, pull
from tests.puller.fakes import WAIT_S
from tests.puller.http_server import FileServer

SIZE_BYTES = 40 << 20  # three parts
HELD_FROM = 27 << 20  # in the third
Range = tuple[int, int]


@dataclass
class Holding(FileServer):
    """Holds back every range that ends behind ``HELD_FROM`` while ``holds``."""

    holds: bool = True
    held: asyncio.Event = field(default_factory=asyncio.Event)
    ranges_asked: list[Range] = field(default_factory=list)

    async def handle(self, request: web.Request) -> web.StreamResponse:
        first, _, last = request.headers["Range"].removeprefix("bytes=").partition("-")
        if last != "0":  # not the first look
            self.ranges_asked.append((int(first), int(last) + 1))
            if self.holds and int(last) >= HELD_FROM:
                self.held.set()
                await asyncio.Event().wait()
        return await super().handle(request)


@pytest.fixture
async def server() -> AsyncIterator[tuple[Holding, str]]:
    server = Holding({"/m": random.Random(1).randbytes(1 << 20) * (SIZE_BYTES >> 20)})
    async with server.serving() as url:
        yield server, f"{url}/m"


@contextlib.asynccontextmanager
async def pulling(url: str, target: Path) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "mesh.cli", "pull", url, str(target)),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        # Tests that a shell runs in the background have SIGINT ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


def journal_of(work: Path) -> list[Range]:
    found = [path.read_text() for path in work.glob("staging/*/*/journal")]
    lines = found[0].splitlines()[1:] if found else []
    return sorted((start, end) for _, start, end in map(json.loads, lines))


def noted_bytes(work: Path) -> int:
    return sum(end - start for start, end in journal_of(work))


async def test_a_killed_pull_goes_on_with_only_what_is_missing(
    server: tuple[Holding, str], tmp_path: Path
) -> None:
    store, url = server
    target, work = tmp_path / "target", tmp_path / ".target.mesh-pull"
    async with pulling(url, target) as process, asyncio.timeout(WAIT_S):
        await store.held.wait()
        while noted_bytes(work) < SIZE_BYTES // 2:  # another process writes it
            assert process.returncode is None
            await asyncio.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        await process.wait()
    assert not target.exists()
    here = journal_of(work)
    store.holds = False
    store.ranges_asked.clear()
    async with pulling(url, target) as process:
        _, err = await asyncio.wait_for(process.communicate(), WAIT_S)
    assert process.returncode == 0, err
    assert (target / "m").read_bytes() == store.files["/m"]
    for start, end in store.ranges_asked:
        assert all(end <= a or b <= start for a, b in here), (here, store.ranges_asked)
    asked_bytes = sum(end - start for start, end in store.ranges_asked)
    assert asked_bytes == SIZE_BYTES - sum(end - start for start, end in here)
    assert names(tmp_path) == ["target"]


async def test_ctrl_c_leaves_nothing_and_ends_with_130(
    server: tuple[Holding, str], tmp_path: Path
) -> None:
    store, url = server
    async with pulling(url, tmp_path / "target") as process, asyncio.timeout(WAIT_S):
        await store.held.wait()
        process.send_signal(signal.SIGINT)
        _, err = await process.communicate()
    assert process.returncode == 130
    assert err.decode() == "interrupted\n"
    assert names(tmp_path) == []


async def test_a_rate_is_kept(tmp_path: Path) -> None:
    server = FileServer({"/m": b"x" * 300_000})
    async with server.serving() as url:
        began_s = time.monotonic()
        done = await asyncio.to_thread(
            pull, f"{url}/m", tmp_path / "target", "--pull-rate", "300KiB"
        )
        took_s = time.monotonic() - began_s
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "target/m").stat().st_size == 300_000
    assert took_s >= 300_000 / (300 << 10) - 0.1  # never sooner, however quick the machine is


def test_a_mount_point_is_filled_and_filled_again(tmp_path: Path) -> None:
    if subprocess.run(["unshare", "-rm", "true"], check=False, capture_output=True).returncode:
        pytest.skip("no mount may be made here")
    site = tmp_path / "site"
    site.mkdir()
    for name in ("a", "b"):
        (site / name).write_text(name)
    target = tmp_path / "target"
    target.mkdir()
    script = (
        'mount -t tmpfs none "$1" && "$2" -m mesh.cli pull "file://$3/a" "$1" && ls -A "$1" &&'
        ' "$2" -m mesh.cli pull "file://$3/b" "$1" && ls -A "$1" && cat "$1/b"'
    )
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script, "sh", str(target), sys.executable, str(site)],
        check=False, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if not line.startswith(str(target))]
    assert lines == [RECORD, "a", RECORD, "b", "b"]
    assert names(tmp_path) == ["site", "target"]  # nothing beside the mount point


def content_of(target: Target, text: str) -> Path:
    content = target.work / "content"
    content.mkdir(parents=True)
    (content / "m").write_text(text)
    return content


def test_a_folder_that_is_replaced_is_never_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "target").mkdir()
    (tmp_path / "target/m").write_text("old")
    target = Target.of(tmp_path / "target")
    content = content_of(target, "new")

    def no_rename(*_: object) -> None:
        raise AssertionError("in two steps")

    monkeypatch.setattr(Path, "rename", no_rename)
    target.put(content, {"version": "1"})
    assert (tmp_path / "target/m").read_text() == "new"
    target.tidy()
    assert names(tmp_path) == ["target"]


def test_a_kill_between_two_renames_is_made_good_by_the_next_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the file system exchanges no folders."""
    (tmp_path / "target").mkdir()
    (tmp_path / "target/m").write_text("old")
    target = Target.of(tmp_path / "target")
    content = content_of(target, "new")
    monkeypatch.setattr(command, "exchange", lambda *_: False)
    if (pid := os.fork()) == 0:
        rename = Path.rename

        def killed(self: Path, to: Path) -> Path:
            if self == content:
                os.kill(os.getpid(), signal.SIGKILL)
            return rename(self, to)

        Path.rename = killed  # type: ignore[method-assign, assignment]
        target.put(content, {"version": "1"})
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
    assert not (tmp_path / "target").exists()
    done = pull(f"file://{tmp_path}/nothing", tmp_path / "target")
    assert done.returncode == 1
    assert (tmp_path / "target/m").read_text() == "old"
    assert names(tmp_path) == ["target"]


@pytest.mark.parametrize("record", [True, False])
def test_a_move_into_a_mount_point_counts_when_its_record_is_there(
    tmp_path: Path, record: bool
) -> None:
    """Killed just before it was told that the move is over, or before its last step."""
    (tmp_path / "target").mkdir()
    target = Target(tmp_path / "target", tmp_path / "target/.mesh-pull", inside=True)
    target.put(content_of(target, "new"), {"version": "1"})
    (target.work / "moving").touch()
    if not record:
        (tmp_path / "target" / RECORD).unlink()
    target.tidy()
    assert names(tmp_path / "target") == ([RECORD, "m"] if record else [])


def test_an_exchange_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        command.exchange(tmp_path / "a", tmp_path / "b")
    assert caught.value.errno == errno.ENOENT
