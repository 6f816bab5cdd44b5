"""Elects one leader among controllers by a Lease object, as client-go does and among its own.

Two may believe for a moment that they lead (a paused process): what a leader writes compares.
"""

from __future__ import annotations

from collections.abc import Callable

from mesh.reconciler.kube import Kube


class LeaseElection:
    """One candidate. Run ``run()`` as a task; ``close()`` resigns, so that another takes over."""

    def __init__(
        self,
        kube: Kube,
        namespace: str,
        name: str,
        identity: str,
        *,
        duration_s: float = 15.0,
        renew_deadline_s: float = 10.0,
        retry_s: float = 2.0,
        on_change: Callable[[bool], None] | None = None,
    ) -> None:
        raise NotImplementedError

    @property
    def is_leader(self) -> bool:
        """Ask before each act: it is also a matter of time."""
        raise NotImplementedError

    @property
    def leader_id(self) -> str:
        """Who leads as far as is known here; "" for nobody."""
        raise NotImplementedError

    async def run(self) -> None:
        """Until cancelled or closed."""
        raise NotImplementedError

    async def close(self) -> None:
        raise NotImplementedError
