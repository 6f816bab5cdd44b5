"""What was decided, kept for a while: the value behind `mesh explain --decisions`.

One ``Decision`` is what the log line, the metric label, a test's assertion and the command show:
``reason`` is the label, ``detail`` the sentence. ``Decisions`` is a bounded list of the last ones;
it decides nothing and has no clock.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Decision:
    """``kind``: ``place`` (where to load), ``wait`` (no place yet), ``give_up``, ``reject`` (an
    instance does not take a load), ``evict``, ``unload``, ``scale_up``, ``scale_down``, ``keep``
    (a copy is asked hard, and there cannot be one more), ``move`` (of a drain), ``minimum``,
    ``pin``, ``proactive``, ``eject`` and ``readmit`` (of an instance), ``repair``, ``policy``,
    ``batch`` (whether requests for a copy are joined)."""

    at_ms: int
    kind: str
    reason: str
    model_id: str = ""
    instance_id: str = ""
    runner_up: str = ""
    detail: str = ""


class Decisions:
    """The last ``kept`` decisions, oldest first."""

    def __init__(self, kept: int) -> None:
        self._kept: deque[Decision] = deque(maxlen=kept)

    def add(self, decision: Decision) -> None:
        self._kept.append(decision)

    def keep(self, kept: int) -> None:
        """So many from now on; the oldest go first."""
        if kept != self._kept.maxlen:
            self._kept = deque(self._kept, maxlen=kept)

    def recent(self, limit: int, *, model_id: str = "", since_ms: int = 0) -> tuple[Decision, ...]:
        """The last ``limit`` (of one model when named, not before ``since_ms``), latest first."""
        found: list[Decision] = []
        for decision in self._latest_first():
            if len(found) >= limit or decision.at_ms < since_ms:
                break
            if not model_id or decision.model_id == model_id:
                found.append(decision)
        return tuple(found)

    def _latest_first(self) -> Iterator[Decision]:
        return reversed(self._kept)

    def __len__(self) -> int:
        return len(self._kept)
