"""What `mesh up` says to the person at the terminal: lines on stderr, the ready block on stdout."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from mesh.folder_sync import Applied
from mesh.up.child import describe_exit

# What a child writes when something is wrong, in the forms of our own logs, of Python, of etcd;
# and what everybody waits for, or nobody would know why there is no ready line.
_ALARM: Final = re.compile(
    r'\b(ERROR|CRITICAL|FATAL)\b|"level":"(error|fatal|panic|dpanic)"|^Traceback |^\w*Error: '
    r"|\bwaiting for etcd\b"
)
# Problems said one by one in one scan of the folder; the rest is in the count.
_PROBLEMS_SHOWN: Final = 20


def is_alarm(text: str) -> bool:
    return _ALARM.search(text) is not None


def to_stderr(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


@dataclass(slots=True)
class Terminal:
    """Implements ``Reporter`` of the supervisor and ``SyncReporter`` of the folder."""

    verbose: bool = False
    write: Callable[[str], None] = to_stderr
    stopping_said: bool = False
    applied_count: int = 0
    problem_count: int = 0
    on_progress: Callable[[int, int], None] | None = None
    _restarted: set[str] = field(default_factory=set)
    _last_words: dict[str, Sequence[str]] = field(default_factory=dict)

    def started(self, name: str, pid: int, attempt: int) -> None:
        if self.verbose or attempt:
            self.write(f"{name} started{' again' if attempt else ''} (pid {pid})")
        if attempt:
            self._restarted.add(name)

    def ready(self, name: str) -> None:
        if self.verbose or name in self._restarted:
            self.write(f"{name} is ready")

    def line(self, name: str, text: str) -> None:
        if self.verbose or (is_alarm(text) and not self.stopping_said):
            self.write(f"[{name}] {text}")

    def died(self, name: str, status: int | None, restart_in_ms: int, tail: Sequence[str]) -> None:
        again = f"starting it again in {restart_in_ms / 1000:g} s"
        self.write(f"{name} died ({describe_exit(status)}); {again}")
        self._show_tail(name, tail)

    def gave_up(self, name: str, status: int | None, reason: str, tail: Sequence[str]) -> None:
        self.write(f"{name} died ({describe_exit(status)}); {reason}: stopping")
        self._show_tail(name, tail)

    def _show_tail(self, name: str, tail: Sequence[str]) -> None:
        """The end of its output; of the same end once more, only the last line."""
        again = self._last_words.get(name) == tuple(tail[-1:])
        self._last_words[name] = tuple(tail[-1:])
        for text in tail[-1:] if again else tail:
            self.write(f"  [{name}] {text}")

    def stopping(self, name: str) -> None:
        if not self.stopping_said:
            self.stopping_said = True
            self.write("stopping: requests in flight are finished (Ctrl-C again: at once)")
        if self.verbose:
            self.write(f"stopping {name}")

    def killed(self, name: str, reason: str) -> None:
        self.write(f"killed {name}: {reason}")

    def all_ready(self, again: bool) -> None:
        if again:
            self.write("the mesh is complete again")

    def applied(self, source: str, result: Applied) -> None:
        self.applied_count += 1
        if result.action != "unchanged" and self.verbose:
            self.write(f"models: {result.name} {result.action} ({source})")
        for warning in result.warnings:
            self.problem(f"{source}: warning: {warning}")

    def deleted(self, name: str) -> None:
        self.write(f"models: {name} deleted")

    def problem(self, text: str) -> None:
        self.problem_count += 1
        if self.problem_count <= _PROBLEMS_SHOWN or self.verbose:
            self.write(f"models: {text}")
        elif self.problem_count == _PROBLEMS_SHOWN + 1:
            self.write("models: more problems follow; --verbose shows them")

    def progress(self, done: int, total: int) -> None:
        if self.on_progress is not None:
            self.on_progress(done, total)
