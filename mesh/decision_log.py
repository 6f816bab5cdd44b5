"""Notes a process's decisions: kept for `mesh explain --decisions`, logged and counted in the same
words.

Not for the hit path: a plain hit is no decision that anybody asks about.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Final

from mesh.core.decisions import Decision, Decisions
from mesh.core.policy import Policy

log = logging.getLogger("mesh.decisions")

# Characters: a thousand decisions are kept, and a cause can be the text of a foreign error.
DETAIL_MAX: Final = 1_000


class DecisionLog:
    """``counted(kind, reason)`` is called for each; ``now_ms`` is the wall clock's reading."""

    def __init__(
        self,
        *,
        now_ms: Callable[[], int],
        counted: Callable[[str, str], None] = lambda kind, reason: None,
        kept: int = 1_000,
    ) -> None:
        self._now_ms = now_ms
        self._counted = counted
        self.decisions = Decisions(kept)

    def use_policy(self, policy: Policy) -> None:
        self.decisions.keep(policy.decisions_kept)

    def note(
        self,
        kind: str,
        reason: str,
        *,
        model_id: str = "",
        instance_id: str = "",
        runner_up: str = "",
        detail: str = "",
        level: int = logging.INFO,
    ) -> None:
        if len(detail) > DETAIL_MAX:
            detail = detail[: DETAIL_MAX - 3] + "..."
        decision = Decision(self._now_ms(), kind, reason, model_id, instance_id, runner_up, detail)
        self.decisions.add(decision)
        self._counted(kind, reason)
        if log.isEnabledFor(level):
            log.log(level, "%s %s on %s: %s%s", kind, model_id or "-", instance_id or "-", reason,
                    f" ({detail})" if detail else "")  # fmt: skip
