"""Which instances are about to be replaced: those of an older generation of their deployment.

A rolling update starts instances of a new replica set and stops those of the old one, one by one.
What is loaded onto an old one in that time is loaded again a little later, so placement passes it
over (``mesh.core.placement``) while anybody else is left.

``ReplicaSets`` is the index that a view keeps: it is told of every instance's record and knows the
newest replica set of each group. An instance that drains no longer counts as a member: when an
update is taken back, the old set is the newest again as soon as the new one's instances leave. It
has no clock; ``arriving_sets`` judges with the caller's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from mesh.core.policy import Policy
from mesh.core.types import InstanceRecord, InstanceState


@dataclass(frozen=True, slots=True)
class NewestSet:
    """The replica set of a group whose first instance came last."""

    replica_set: str
    began_at_ms: int


@dataclass(slots=True)
class _Generation:
    began_at_ms: int  # the earliest start told while it has had a member
    members: set[str] = field(default_factory=set)


class ReplicaSets:
    """See the module's docstring. Told of the same record twice it changes nothing."""

    def __init__(self) -> None:
        # Groups with two or more replica sets only: empty while nothing is being replaced.
        self.newest: dict[str, NewestSet] = {}
        self._groups: dict[str, dict[str, _Generation]] = {}

    def put(self, record: InstanceRecord, before: InstanceRecord | None) -> None:
        """``before`` is what the same instance's record said last."""
        if before is not None:
            if _standing(before) == _standing(record):
                return  # nearly all: an advert
            if (before.group, before.replica_set) != (record.group, record.replica_set):
                self.remove(before)
        if record.state is InstanceState.DRAINING:
            self.remove(record)
            return
        if not record.group:
            return
        sets = self._groups.setdefault(record.group, {})
        generation = sets.setdefault(record.replica_set, _Generation(record.started_at_ms))
        generation.began_at_ms = min(generation.began_at_ms, record.started_at_ms)
        generation.members.add(record.instance_id)
        self._find_newest(record.group)

    def remove(self, record: InstanceRecord) -> None:
        sets = self._groups.get(record.group)
        generation = sets.get(record.replica_set) if sets else None
        if sets is None or generation is None:
            return
        generation.members.discard(record.instance_id)
        if not generation.members:
            del sets[record.replica_set]
        if not sets:
            del self._groups[record.group]
        self._find_newest(record.group)

    def _find_newest(self, group: str) -> None:
        sets = self._groups.get(group, {})
        if len(sets) < 2:
            self.newest.pop(group, None)
            return
        # Of two that came at once the name decides, so that all who look agree.
        began_at_ms, name = max((g.began_at_ms, name) for name, g in sets.items())
        self.newest[group] = NewestSet(name, began_at_ms)


def _standing(record: InstanceRecord) -> tuple[str, str, InstanceState, int]:
    return record.group, record.replica_set, record.state, record.started_at_ms


def arriving_sets(newest: Mapping[str, NewestSet], now_ms: int, policy: Policy) -> dict[str, str]:
    """By group the replica set that came within ``Policy.replacement_window_ms``: the instances of
    that group's other sets are about to be replaced."""
    return {
        group: found.replica_set
        for group, found in newest.items()
        if now_ms - found.began_at_ms < policy.replacement_window_ms
    }
