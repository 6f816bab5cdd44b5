"""What is told of loads that came to nothing: into the store first, then to who waits.

A failure is recorded with its cause and expiry, and a claim is withdrawn, before anybody hears of
it: the next instance that is asked would find the claim otherwise. A store that is away holds
nobody up. Failures are remembered for routers that asked before they could know.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Final

from mesh.core.errors import RETRYABLE, MeshError
from mesh.core.policy import Policy
from mesh.core.types import FailureRecord
from mesh.instance.answers import LoadAnswer
from mesh.instance.clock import Clock
from mesh.instance.publisher import Publisher

log = logging.getLogger(__name__)

# A failure or rejection is told only when the store has it, but a store that is away must not hold
# up the answer.
WITHDRAW_FLUSH_S: Final = 1.0
MAX_FAILURES_REMEMBERED: Final = 1_024


class Failures:
    """Of this instance."""

    def __init__(self, instance_id: str, publisher: Publisher, clock: Clock) -> None:
        self._instance_id = instance_id
        self._publisher = publisher
        self._clock = clock
        self._told: dict[str, tuple[int, LoadAnswer]] = {}  # (revision in the store, answer)

    def known(self, model_id: str, revision: int) -> LoadAnswer | None:
        """The answer for a router that, as of ``revision``, cannot have seen the failure yet."""
        told = self._told.get(model_id)
        return told[1] if told is not None and revision < told[0] else None

    def forget(self, model_id: str) -> None:
        """It is loaded."""
        self._told.pop(model_id, None)

    async def record(self, model_id: str, answer: LoadAnswer, policy: Policy) -> None:
        """Returns when the answer may be given: no router tries again here at once."""
        now_ms = self._clock.now_ms()
        transient = answer.code in RETRYABLE
        expiry_ms = (
            policy.transient_failure_expiry_ms if transient else policy.load_failure_expiry_ms
        )
        self._publisher.put_failure(
            FailureRecord(
                model_id,
                self._instance_id,
                answer.code.name,
                answer.message,
                failed_at_ms=now_ms,
                expires_at_ms=now_ms + expiry_ms,
            )
        )
        if await self.withdrawn(model_id):
            while len(self._told) >= MAX_FAILURES_REMEMBERED:
                del self._told[next(iter(self._told))]
            self._told[model_id] = (self._publisher.revision, answer)

    async def withdrawn(self, model_id: str) -> bool:
        """Returns when the claim has gone from the store; False when the store did not take it."""
        if self._publisher.away:
            return False
        try:
            async with asyncio.timeout(WITHDRAW_FLUSH_S):
                await self._publisher.flush()
        except (MeshError, TimeoutError) as error:
            log.warning("the claim of %s is not withdrawn yet: %s", model_id, error)
            return False
        return True
