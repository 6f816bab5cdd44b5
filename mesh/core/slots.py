"""One instance as a view sees it: its record, the copies on it, and what was asked of it.

Sums are kept as copies come and go, and what a placement compares is kept beside them, so that it
reads an instance in constant time and a thousand of them in well under a millisecond. Only
``mesh.core.view`` writes a slot; everyone else reads.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b

from mesh.core.types import CopyRecord, CopyState, InstanceRecord, InstanceState


@dataclass(frozen=True, slots=True)
class PendingLoad:
    """A load that this router asked an instance for and has not seen in the view yet."""

    size_bytes: int
    asked_at_ms: int


class InstanceSlot:
    """See the module's docstring. All sizes are bytes.

    ``ready``: it takes requests and loads. ``effective_free_bytes``: capacity less the larger of
    what it advertised and what its copies add up to, and less what is on its way. An advert is up
    to ``advert_min_interval_ms`` old: trusting it alone makes routers herd.
    ``loads_in_progress`` counts those of others and this router's pending ones;
    ``slots_behind`` is how many rounds of its load slots they fill. ``salt`` is a hash of its id.
    """

    __slots__ = (
        "copies",
        "copies_bytes",
        "effective_free_bytes",
        "labels",
        "loading",
        "loads_in_progress",
        "pending",
        "pending_bytes",
        "ready",
        "record",
        "salt",
        "slots_behind",
    )

    def __init__(self, record: InstanceRecord) -> None:
        self.copies: dict[str, CopyRecord] = {}  # by model id
        self.copies_bytes = 0
        self.loading = 0  # copies in state LOADING
        self.pending: dict[str, PendingLoad] = {}  # by model id
        self.pending_bytes = 0
        digest = blake2b(record.instance_id.encode(), digest_size=8).digest()
        self.salt = int.from_bytes(digest, "big")
        self.labels: frozenset[str] = frozenset()
        self.effective_free_bytes = self.loads_in_progress = self.slots_behind = 0
        self.put_record(record)

    def put_record(self, record: InstanceRecord) -> None:
        """A new advert of the same instance."""
        self.record = record
        self.ready = record.state is InstanceState.READY
        if record.labels or self.labels:
            self.labels = frozenset(record.labels)
        self._refresh()

    def _refresh(self) -> None:
        record, used_bytes, loads = self.record, self.copies_bytes, self.loading
        if record.used_bytes > used_bytes:
            used_bytes = record.used_bytes
        if record.loading_count > loads:
            loads = record.loading_count
        free_bytes = record.capacity_bytes - used_bytes - self.pending_bytes
        self.effective_free_bytes = free_bytes if free_bytes > 0 else 0
        self.loads_in_progress = loads = loads + len(self.pending)
        self.slots_behind = loads // record.load_slots if record.load_slots > 1 else loads

    @property
    def effective_used_bytes(self) -> int:
        """The larger of what it advertised and what its copies add up to, and what is on its
        way."""
        return max(self.record.used_bytes, self.copies_bytes) + self.pending_bytes

    def add_copy(self, copy: CopyRecord) -> None:
        """Add or replace."""
        self._forget_copy(copy.model_id)
        self.copies[copy.model_id] = copy
        self.copies_bytes += copy.size_bytes
        self.loading += copy.state is CopyState.LOADING
        self._refresh()

    def remove_copy(self, model_id: str) -> None:
        self._forget_copy(model_id)
        self._refresh()

    def _forget_copy(self, model_id: str) -> None:
        copy = self.copies.pop(model_id, None)
        if copy is not None:
            self.copies_bytes -= copy.size_bytes
            self.loading -= copy.state is CopyState.LOADING

    def add_pending(self, model_id: str, pending: PendingLoad) -> None:
        """Add or replace."""
        self.remove_pending(model_id)
        self.pending[model_id] = pending
        self.pending_bytes += pending.size_bytes
        self._refresh()

    def remove_pending(self, model_id: str) -> bool:
        """Returns whether there was one."""
        pending = self.pending.pop(model_id, None)
        if pending is None:
            return False
        self.pending_bytes -= pending.size_bytes
        self._refresh()
        return True

    def __repr__(self) -> str:
        return (
            f"InstanceSlot({self.record.instance_id} {self.record.state.value} "
            f"copies={len(self.copies)} loading={self.loading} pending={len(self.pending)} "
            f"free={self.effective_free_bytes}/{self.record.capacity_bytes})"
        )
