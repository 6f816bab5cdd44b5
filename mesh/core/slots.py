"""One instance as a view sees it: its record, the copies on it, and what was asked of it.

Sums are kept as copies come and go, so that placement reads an instance in constant time. Only
``mesh.core.view`` writes a slot; everyone else reads.
"""

from __future__ import annotations

from dataclasses import dataclass

from mesh.core.types import CopyRecord, CopyState, InstanceRecord, InstanceState


@dataclass(frozen=True, slots=True)
class PendingLoad:
    """A load that this router asked an instance for and has not seen in the view yet."""

    size_bytes: int
    asked_at_ms: int


class InstanceSlot:
    """See the module's docstring. All sizes are bytes."""

    __slots__ = ("copies", "copies_bytes", "loading", "pending", "pending_bytes", "record")

    def __init__(self, record: InstanceRecord) -> None:
        self.record = record
        self.copies: dict[str, CopyRecord] = {}  # by model id
        self.copies_bytes = 0
        self.loading = 0  # copies in state LOADING
        self.pending: dict[str, PendingLoad] = {}  # by model id
        self.pending_bytes = 0

    @property
    def ready(self) -> bool:
        """It takes requests and loads."""
        return self.record.state is InstanceState.READY

    @property
    def effective_used_bytes(self) -> int:
        """The larger of what it advertised and what its copies add up to, and what is on its way.

        An advert is up to ``advert_min_interval_ms`` old: trusting it alone makes routers herd.
        """
        return max(self.record.used_bytes, self.copies_bytes) + self.pending_bytes

    @property
    def effective_free_bytes(self) -> int:
        # Written out, not through effective_used_bytes: a placement reads it of every instance.
        record, copies_bytes = self.record, self.copies_bytes
        used_bytes = record.used_bytes if record.used_bytes > copies_bytes else copies_bytes
        free_bytes = record.capacity_bytes - used_bytes - self.pending_bytes
        return free_bytes if free_bytes > 0 else 0

    @property
    def loads_in_progress(self) -> int:
        return max(self.record.loading_count, self.loading) + len(self.pending)

    def add_copy(self, copy: CopyRecord) -> None:
        """Add or replace."""
        self.remove_copy(copy.model_id)
        self.copies[copy.model_id] = copy
        self.copies_bytes += copy.size_bytes
        self.loading += copy.state is CopyState.LOADING

    def remove_copy(self, model_id: str) -> None:
        copy = self.copies.pop(model_id, None)
        if copy is not None:
            self.copies_bytes -= copy.size_bytes
            self.loading -= copy.state is CopyState.LOADING

    def add_pending(self, model_id: str, pending: PendingLoad) -> None:
        """Add or replace."""
        self.remove_pending(model_id)
        self.pending[model_id] = pending
        self.pending_bytes += pending.size_bytes

    def remove_pending(self, model_id: str) -> bool:
        """Returns whether there was one."""
        pending = self.pending.pop(model_id, None)
        if pending is None:
            return False
        self.pending_bytes -= pending.size_bytes
        return True

    def __repr__(self) -> str:
        return (
            f"InstanceSlot({self.record.instance_id} {self.record.state.value} "
            f"copies={len(self.copies)} loading={self.loading} pending={len(self.pending)} "
            f"free={self.effective_free_bytes}/{self.record.capacity_bytes})"
        )
