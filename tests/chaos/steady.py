"""Steady load on a mesh from a process of its own, and what came of it."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, Self

from tests.up.live import REPOSITORY

# Generous: machines may be slow and loaded. Nothing passes by time running out.
WAIT_S = 90.0
FAILURES_TOLD = 5


class Steady:
    """Asks from ``with`` on to its end, where the last requests are waited for.

    ``failures`` are those of requests that did not get a right answer: time, model, code, text.
    """

    def __init__(self, address: str, names: list[str], **wanted: Any) -> None:
        self.answers = 0
        self.waiting = 0
        self.failures: list[dict[str, Any]] = []
        self.figures: dict[str, Any] = {}
        self._wanted = {"address": address, "names": names, **wanted}
        self._began = 0.0

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.chaos.steady_client", json.dumps(self._wanted)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=REPOSITORY,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        return self

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            told = json.loads(line)
            self.answers, self.waiting = told["answers"], told["waiting"]
            self.failures += told["failures"]
            if told.get("done"):
                self.figures = told

    def until(self, condition: Callable[[], bool], what: str, within_s: float = WAIT_S) -> None:
        """Ask again and again, within a bound, while the load goes on."""
        end = time.monotonic() + within_s
        while not condition():
            assert self._process.poll() is None, "the client process has ended"
            assert time.monotonic() < end, f"no sign of {what}; {self.told()}"
            time.sleep(0.02)

    def more(self, count: int) -> None:
        """Until so many further answers have come."""
        target = self.answers + count
        self.until(lambda: self.answers >= target, f"{count} more answers")

    def for_seconds(self, seconds: float) -> None:
        """The length of a fault that is defined by it."""
        end = time.monotonic() + seconds
        self.until(lambda: time.monotonic() >= end, "the time to pass", seconds + WAIT_S)

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(WAIT_S)
        finally:
            self._process.kill()
            self._process.wait()
            self._reader.join()

    def told(self) -> str:
        """For a person: how many, and the first of them."""
        text = f"{len(self.failures)} failed, {self.answers} answered, {self.waiting} waiting"
        for one in self.failures[:FAILURES_TOLD]:
            text += f"\n  {one['name']} {one['code']} after {one['ms']} ms: {one['text'][:300]}"
        return text

    def assert_none_failed(self, least: int = 100) -> None:
        """Nor is it no failure because nothing was asked."""
        assert not self.failures, self.told()
        assert self.answers >= least, self.told()
        figures = {k: v for k, v in self.figures.items() if k.endswith("_ms")}
        print(f"{self.answers} answered, none failed, {figures}")
