"""The supervisor with real processes: small Python programs that do what the test says."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

import pytest

from mesh.up.child import ChildCommand
from mesh.up.plan import RestartPolicy
from mesh.up.supervisor import Supervisor
from tests.up.recording import WAIT_S, Recorder

QUICK = RestartPolicy(first_delay_ms=10, max_delay_ms=50, stop_grace_ms=10_000)

# Tells that it is ready by a file, and leaves politely when asked to.
POLITE = """
import pathlib, signal, sys
def leave(*_):
    print("drained", flush=True)
    sys.exit(0)
signal.signal(signal.SIGTERM, leave)
pathlib.Path(sys.argv[1]).touch()
while True:
    signal.pause()
"""
STUBBORN = """
import pathlib, signal, sys
signal.signal(signal.SIGTERM, lambda *_: print("no", flush=True))
pathlib.Path(sys.argv[1]).touch()
while True:
    signal.pause()
"""
# Dies the first time, with words; stays the second time.
DIES_ONCE = (
    """
import pathlib, sys
been = pathlib.Path(sys.argv[1] + ".been")
if not been.exists():
    been.touch()
    print("ERROR boom", file=sys.stderr)
    sys.exit(7)
"""
    + POLITE
)


def child(
    tmp_path: Path, name: str, program: str, *, start_stage: int = 0, stop_stage: int = 0
) -> ChildCommand:
    flag = tmp_path / f"{name}.ready"

    async def ready() -> bool:
        return flag.exists()

    return ChildCommand(
        name=name,
        argv=(sys.executable, "-I", "-c", program, str(flag)),
        ready=ready,
        log_path=tmp_path / f"{name}.log",
        start_stage=start_stage,
        stop_stage=stop_stage,
    )


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


async def finish(run: asyncio.Task[bool]) -> bool:
    async with asyncio.timeout(WAIT_S):
        return await run


async def test_starts_in_stages_stops_in_order_and_keeps_the_logs(tmp_path: Path) -> None:
    seen = Recorder()
    supervisor = Supervisor(
        [
            child(tmp_path, "store", POLITE, start_stage=0, stop_stage=1),
            child(tmp_path, "worker", POLITE, start_stage=1, stop_stage=0),
        ],
        seen,
        QUICK,
    )
    run = asyncio.create_task(supervisor.run())
    await seen.until(lambda: seen.of("all ready") == [(False,)])
    assert supervisor.ready.is_set()
    pids = [supervisor.pid("store"), supervisor.pid("worker")]
    supervisor.ask_stop()
    assert await finish(run) is True
    assert seen.of("started") == [("store", 0), ("worker", 0)]
    assert seen.told.index(("ready", "store")) < seen.told.index(("started", "worker", 0))
    assert seen.of("stopping") == [("worker",), ("store",)]
    assert (tmp_path / "worker.log").read_text() == "drained\n"
    assert all(pid is not None and not alive(pid) for pid in pids)


async def test_a_child_that_dies_is_told_with_its_last_words_and_started_again(
    tmp_path: Path,
) -> None:
    seen = Recorder()
    supervisor = Supervisor([child(tmp_path, "worker", DIES_ONCE)], seen, QUICK)
    run = asyncio.create_task(supervisor.run())
    await seen.until(lambda: bool(seen.of("all ready")))
    assert seen.of("died") == [("worker", 7, ("ERROR boom",))]
    assert seen.of("started") == [("worker", 0), ("worker", 1)]
    supervisor.ask_stop()
    assert await finish(run) is True


async def test_a_child_that_is_killed_comes_back(tmp_path: Path) -> None:
    seen = Recorder()
    supervisor = Supervisor([child(tmp_path, "worker", POLITE)], seen, QUICK)
    run = asyncio.create_task(supervisor.run())
    await seen.until(lambda: bool(seen.of("all ready")))
    first = supervisor.pid("worker")
    assert first is not None
    os.kill(first, signal.SIGKILL)
    await seen.until(lambda: seen.of("all ready") == [(False,), (True,)])
    assert seen.of("died") == [("worker", -signal.SIGKILL, ())]
    assert supervisor.pid("worker") not in (None, first)
    supervisor.ask_stop()
    assert await finish(run) is True


async def test_the_second_request_kills_what_does_not_want_to_leave(tmp_path: Path) -> None:
    seen = Recorder()
    supervisor = Supervisor([child(tmp_path, "worker", STUBBORN)], seen, QUICK)
    run = asyncio.create_task(supervisor.run())
    await seen.until(lambda: bool(seen.of("all ready")))
    supervisor.ask_stop()
    await seen.until(lambda: ("worker", "no") in seen.of("line"))
    supervisor.ask_kill()
    assert await finish(run) is True
    assert seen.of("killed") == [("worker", "asked for twice")]


async def test_a_child_that_ignores_the_stop_is_killed_after_its_grace(tmp_path: Path) -> None:
    seen = Recorder()
    policy = RestartPolicy(stop_grace_ms=1)
    supervisor = Supervisor([child(tmp_path, "worker", STUBBORN)], seen, policy)
    run = asyncio.create_task(supervisor.run())
    await seen.until(lambda: bool(seen.of("all ready")))
    supervisor.ask_stop()
    assert await finish(run) is True
    assert [name for name, _ in seen.of("killed")] == ["worker"]


async def test_wrong_settings_end_it_all_without_a_restart(tmp_path: Path) -> None:
    seen = Recorder()
    wrong = "import sys; print('error: --capacity: no'); sys.exit(2)"
    supervisor = Supervisor(
        [child(tmp_path, "good", POLITE), child(tmp_path, "bad", wrong)], seen, QUICK
    )
    assert await finish(asyncio.create_task(supervisor.run())) is False
    assert seen.of("died") == []
    tail = ("error: --capacity: no",)
    assert seen.of("gave up") == [("bad", 2, "its settings are wrong", tail)]


async def test_a_program_that_is_not_there_is_told_and_tried_again(tmp_path: Path) -> None:
    seen = Recorder()

    async def never() -> bool:
        return False

    command = ChildCommand("etcd", ("/does/not/exist",), never, tmp_path / "etcd.log")
    supervisor = Supervisor([command], seen, QUICK)
    run = asyncio.create_task(supervisor.run())
    await seen.until(lambda: len(seen.of("died")) >= 2)
    supervisor.ask_stop()
    assert await finish(run) is True
    tail = "cannot start /does/not/exist: No such file or directory"
    assert seen.of("died")[0] == ("etcd", 127, (tail,))


async def test_a_cancelled_run_leaves_no_process(tmp_path: Path) -> None:
    seen = Recorder()
    supervisor = Supervisor([child(tmp_path, "worker", POLITE)], seen, QUICK)
    run = asyncio.create_task(supervisor.run())
    await seen.until(lambda: bool(seen.of("all ready")))
    pid = supervisor.pid("worker")
    run.cancel()
    with pytest.raises(asyncio.CancelledError):
        await finish(run)
    assert pid is not None and not alive(pid)


SUPERVISING = """
import asyncio, sys
from pathlib import Path
from mesh.up.child import ChildCommand
from mesh.up.supervisor import Supervisor
from mesh.up.terminal import Terminal

flag = Path(sys.argv[1])
async def ready():
    return flag.exists()

async def main():
    command = ChildCommand("worker", (sys.executable, "-I", "-c", sys.argv[2], str(flag)),
                           ready, flag.with_suffix(".log"))
    supervisor = Supervisor([command], Terminal())
    run = asyncio.create_task(supervisor.run())
    await supervisor.ready.wait()
    print(supervisor.pid("worker"), flush=True)
    await run

asyncio.run(main())
"""


async def test_children_do_not_outlive_a_supervisor_that_is_killed(tmp_path: Path) -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-c", SUPERVISING, str(tmp_path / "flag"), STUBBORN),
        stdout=asyncio.subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    )
    assert process.stdout is not None
    async with asyncio.timeout(WAIT_S):
        pid = int(await process.stdout.readline())
        # A pidfd becomes readable when the process has ended, also when it is not our child.
        ended = asyncio.Event()
        watch = os.pidfd_open(pid)
        asyncio.get_running_loop().add_reader(watch, ended.set)
        try:
            process.kill()
            await process.wait()
            await ended.wait()
        finally:
            asyncio.get_running_loop().remove_reader(watch)
            os.close(watch)
