from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from puller.range_locks import RangeLocks

HOLDER = """
import sys
from pathlib import Path
from puller.range_locks import RangeLocks
locks = RangeLocks(Path(sys.argv[1]))
print(locks.try_exclusive("x"), locks.try_shared("y"), flush=True)
sys.stdin.read()
"""


def test_shared_and_exclusive(tmp_path: Path) -> None:
    a, b = RangeLocks(tmp_path / "locks"), RangeLocks(tmp_path / "locks")
    assert a.try_shared("x")
    assert b.try_shared("x")
    assert not a.try_exclusive("x")
    assert a.try_exclusive("other")
    b.release("x")
    assert a.try_exclusive("x")
    assert not b.try_shared("x")
    assert a.try_shared("x")  # turned back, without letting go
    assert b.try_shared("x")
    a.release("never held")
    a.close()
    assert b.try_exclusive("x")
    b.close()


def test_a_killed_process_leaves_no_lock(tmp_path: Path) -> None:
    path = tmp_path / "locks"
    locks = RangeLocks(path)
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    ) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "True True\n"
            assert not locks.try_shared("x")
            assert locks.try_shared("y")
            assert not locks.try_exclusive("y")
        finally:
            holder.kill()
            holder.wait()
    assert locks.try_exclusive("x")
    assert locks.try_exclusive("y")
    locks.close()
