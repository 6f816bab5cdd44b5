"""How many requests may be sent again: a share of those that came, so that retries are no storm.

When an instance dies its calls go elsewhere; when everything is slow or overloaded, sending each
request several times makes it worse. So retries are at most ``Policy.retry_budget_share`` of the
requests of the last ``retry_budget_window_ms``, and ``retry_budget_min`` in any case.

Only work that an instance may have been given twice is charged (the caller decides): an attempt
that was never delivered costs nobody anything. No clock and no I/O; a step of a call is O(1).
"""

from __future__ import annotations

from mesh.core.policy import Policy

# The window moves in steps of a tenth.
STEPS = 10


class RetryBudget:
    """``requests`` is a count that only grows: of all requests so far. ``now_ms`` is of any steady
    clock."""

    def __init__(self, policy: Policy, now_ms: int) -> None:
        self._policy = policy
        self._requests_at = [0] * STEPS  # the count when each step of the window began
        self._retries_in = [0] * STEPS
        self._retries = 0  # in the window
        self._step_ms = max(1, policy.retry_budget_window_ms // STEPS)
        self._step = now_ms // self._step_ms

    def use_policy(self, policy: Policy) -> None:
        """What is charged stays charged; a window of another length begins to move anew."""
        self._policy = policy
        step_ms = max(1, policy.retry_budget_window_ms // STEPS)
        if step_ms != self._step_ms:
            now_ms = self._step * self._step_ms
            at = self._step % STEPS
            self._step_ms, self._step = step_ms, now_ms // step_ms
            shift = at - self._step % STEPS
            self._requests_at = [self._requests_at[(i + shift) % STEPS] for i in range(STEPS)]
            self._retries_in = [self._retries_in[(i + shift) % STEPS] for i in range(STEPS)]

    def left(self, requests: int, now_ms: int) -> int:
        """Retries that are allowed now."""
        self.note(requests, now_ms)
        policy = self._policy
        # The oldest step of the window is the one behind the present in the ring.
        came = requests - self._requests_at[(self._step + 1) % STEPS]
        allowed = policy.retry_budget_min + int(policy.retry_budget_share * came)
        return max(0, allowed - self._retries)

    def take(self, requests: int, now_ms: int) -> bool:
        """Charge one retry; False, and nothing charged, when the budget is used up."""
        if self.left(requests, now_ms) < 1:
            return False
        self._retries_in[self._step % STEPS] += 1
        self._retries += 1
        return True

    def note(self, requests: int, now_ms: int) -> None:
        """Move the window on. To be called now and then also when nothing is retried, or requests
        that are long past are counted into the window."""
        step = now_ms // self._step_ms
        for later in range(max(self._step + 1, step - STEPS + 1), step + 1):
            at = later % STEPS
            self._retries -= self._retries_in[at]
            self._retries_in[at] = 0
            self._requests_at[at] = requests
        self._step = max(self._step, step)
