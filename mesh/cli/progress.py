"""Progress on stderr: a bar where that is a terminal. Of bytes, else a line from time to time."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any, Final

from mesh.cli.quantities import format_progress

_LINE_EVERY_S: Final = 10.0  # where it is a log that people read later


class Bar:
    """``with Bar("loading", 300) as bar: bar.update(done)``."""

    def __init__(self, title: str, total: int) -> None:
        self._title = title
        self._total = total
        self._progress: Any = None
        self._task: Any = None

    def __enter__(self) -> Bar:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import (
                BarColumn,
                MofNCompleteColumn,
                Progress,
                TextColumn,
                TimeElapsedColumn,
            )

            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                console=Console(stderr=True),
                transient=True,
            )
            self._progress.start()
            self._task = self._progress.add_task(self._title, total=self._total)
        return self

    def update(self, done: int) -> None:
        if self._progress is not None:
            self._progress.update(self._task, completed=done)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._progress is not None:
            self._progress.stop()


class Bytes:
    """``with Bytes("pulling") as bar: bar.update(done, total)``; the total may be unknown."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._progress: Any = None
        self._task: Any = None
        self._told_at_s = time.monotonic()

    def __enter__(self) -> Bytes:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn
            from rich.progress import TransferSpeedColumn as Speed

            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                DownloadColumn(binary_units=True),
                Speed(),
                console=Console(stderr=True),
                transient=True,
            )
            self._progress.start()
            self._task = self._progress.add_task(self._title, total=None)
        return self

    def update(self, done_bytes: int, total_bytes: int | None) -> None:
        if self._progress is not None:
            self._progress.update(self._task, completed=done_bytes, total=total_bytes)
        elif time.monotonic() - self._told_at_s >= _LINE_EVERY_S:
            self._told_at_s = time.monotonic()
            print(f"{self._title}: {format_progress(done_bytes, total_bytes)}", file=sys.stderr)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._progress is not None:
            self._progress.stop()
