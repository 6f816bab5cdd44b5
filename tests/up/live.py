"""A real `mesh up` as a child process of a test, on free ports."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

WAIT_S = 60.0
REPOSITORY = Path(__file__).parents[2]


class LiveMesh:
    """Started at construction; ``ready`` waits for the ready line."""

    def __init__(self, data_dir: Path, *flags: str) -> None:
        self.data_dir = data_dir
        self._out = data_dir.with_suffix(".out")
        self._err = data_dir.with_suffix(".err")
        ports = ("--grpc-port", "0", "--rest-port", "0", "--metrics-port", "0")
        command = (*(sys.executable, "-m", "mesh.cli", "up"), "--data-dir", str(data_dir))
        with self._out.open("w") as out, self._err.open("w") as err:
            self.process = subprocess.Popen(
                (*command, *ports, *flags), stdout=out, stderr=err, cwd=REPOSITORY
            )

    @property
    def out(self) -> str:
        return self._out.read_text()

    @property
    def err(self) -> str:
        return self._err.read_text()

    @property
    def state(self) -> dict[str, Any]:
        state: dict[str, Any] = json.loads((self.data_dir / "state.json").read_text())
        return state

    @property
    def address(self) -> str:
        return str(self.state["grpc"])

    def ready(self) -> LiveMesh:
        self.until(lambda: "mesh is ready" in self.out, "the ready line")
        return self

    def until(self, condition: Callable[[], bool], what: str) -> None:
        """Ask again and again, within a bound: what is waited for happens in other processes."""
        end = time.monotonic() + WAIT_S
        while not condition():
            assert self.process.poll() is None, f"mesh up has ended: {self.err}"
            assert time.monotonic() < end, f"no sign of {what}: {self.out}{self.err}"
            time.sleep(0.05)

    def mesh(self, *args: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "mesh.cli", "--address", self.address, *args],
            input=stdin,
            capture_output=True,
            text=True,
            cwd=REPOSITORY,
            timeout=WAIT_S,
        )

    def children(self) -> dict[str, int]:
        """Process ids by name: ``etcd``, ``router-1``, ``instance-1``."""
        pid = self.process.pid
        found: dict[str, int] = {}
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            try:
                argv = Path(f"/proc/{child}/cmdline").read_bytes().decode().split("\0")
            except (FileNotFoundError, ProcessLookupError):
                continue  # it has just ended
            if Path(argv[0]).name == "etcd":
                found["etcd"] = int(child)
            elif "--name" in argv:
                found[argv[argv.index("--name") + 1]] = int(child)
        return found

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Signal it and wait until it and all of its children have ended; the exit status."""
        if self.process.poll() is not None:
            return int(self.process.returncode)
        watched = [os.pidfd_open(pid) for pid in self.children().values()]
        try:
            self.process.send_signal(number)
            status = self.process.wait(WAIT_S)
            end = time.monotonic() + WAIT_S
            for watch in watched:
                left_s = max(0.0, end - time.monotonic())
                assert select.select([watch], [], [], left_s)[0], "a child outlives mesh up"
        finally:
            for watch in watched:
                os.close(watch)
        return status
