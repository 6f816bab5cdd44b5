"""The policy of a running process: what it was started with, and `config/policy` on top.

``read`` is given what stands in the store, at each change or more often, and tells the process's
parts of a policy that differs. A value that cannot be is said once in the log and changes nothing:
the last good policy stays. (`mesh policy set` refuses such a value; it can come from elsewhere, or
be at odds with what this process alone was started with.) A name that is unknown here is warned
about once and passed over, and the rest holds: a newer version beside this one may know it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Final

from mesh.core.errors import InvalidArgument
from mesh.core.policy import Policy, known_only, overridden
from mesh.decision_log import DecisionLog

log = logging.getLogger(__name__)

_NOTHING: Final[Mapping[str, object]] = {}


class LivePolicy:
    """``apply`` is called with each policy that differs from the one before."""

    def __init__(
        self,
        base: Policy,
        apply: Callable[[Policy], None],
        decisions: DecisionLog | None = None,
    ) -> None:
        self.base = base
        self.policy = base
        self.overrides = _NOTHING  # those that hold now
        self.refused = ""  # why what stands in the store is not acted on
        self.unknown: tuple[str, ...] = ()  # names in the store that this version does not know
        self._apply = apply
        self._decisions = decisions
        self._seen: object = _NOTHING

    def read(self, value: Mapping[str, object] | None) -> None:
        """``value``: the object of ``config/policy``; None where there is none."""
        found = _NOTHING if value is None else value
        if found is self._seen or found == self._seen:
            return
        self._seen = found
        overrides, unknown = known_only(found)
        self._warn_of(unknown)
        try:
            policy = overridden(self.base, overrides)
        except InvalidArgument as error:
            log.error("config/policy is not acted on: %s", error.message)
            self._note("refused", error.message)
            self.refused = error.message
            return
        self.overrides, self.refused = overrides, ""
        if policy == self.policy:
            return
        self.policy = policy
        told = ", ".join(f"{name}={value}" for name, value in sorted(overrides.items()))
        self._note("changed", told or "as the process was started")
        self._apply(policy)

    def _warn_of(self, unknown: tuple[str, ...]) -> None:
        """Once, however often the rest changes."""
        if new := [name for name in unknown if name not in self.unknown]:
            log.warning("config/policy: this version has no threshold %s", ", ".join(new))
        self.unknown = unknown

    def _note(self, reason: str, detail: str) -> None:
        if self._decisions is not None:
            self._decisions.note("policy", reason, detail=detail)
