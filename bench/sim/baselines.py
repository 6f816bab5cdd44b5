"""What placement is compared with: other ways to choose among the instances that fit.

Hard filters are production's (``mesh.core.demand``), and all else of the mesh too: only the choice
is another one. ``placing_by`` puts a choice in place of ``place`` wherever the core calls it, for
the runs inside it; a process simulates one mesh at a time.
"""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Final, Protocol

from mesh.core import placement
from mesh.core.demand import demand_of, fitting
from mesh.core.placement import NoPlacement, Placement
from mesh.core.policy import Policy
from mesh.core.slots import InstanceSlot
from mesh.core.types import ModelRecord
from mesh.core.view import ClusterView

_MASK: Final = (1 << 64) - 1


class Place(Protocol):
    """``mesh.core.placement.place``."""

    def __call__(
        self,
        view: ClusterView,
        model: ModelRecord,
        *,
        now_ms: int,
        policy: Policy,
        exclude: Collection[str] = (),
        avoid: Collection[str] = (),
    ) -> Placement | NoPlacement: ...


Choose = Callable[[ModelRecord, Sequence[InstanceSlot]], InstanceSlot]


def by(choose: Choose, reason: str) -> Place:
    def place(
        view: ClusterView,
        model: ModelRecord,
        *,
        now_ms: int,
        policy: Policy,
        exclude: Collection[str] = (),
        avoid: Collection[str] = (),
    ) -> Placement | NoPlacement:
        demand = demand_of(view, model, now_ms=now_ms, policy=policy, exclude=exclude)
        pool = fitting(view, demand)
        if not pool or len(demand.failures) >= policy.max_load_failures:
            return placement.place(
                view, model, now_ms=now_ms, policy=policy, exclude=exclude, avoid=avoid
            )
        slot = choose(model, [s for s in pool if s.record.instance_id not in avoid] or pool)
        return Placement(
            instance_id=slot.record.instance_id,
            reason=reason,
            runner_up=None,
            size_bytes=demand.size_bytes,
            full=slot.effective_free_bytes < demand.size_bytes,
            detail=reason,
        )

    return place


def at_random(seed: int) -> Choose:
    draw = random.Random(seed)
    return lambda model, pool: pool[int(draw.random() * len(pool))]


def least_loaded(model: ModelRecord, pool: Sequence[InstanceSlot]) -> InstanceSlot:
    """Fewest loads in progress, then least memory in use."""
    return min(
        pool, key=lambda slot: (slot.loads_in_progress, -slot.effective_free_bytes, slot.salt)
    )


def rendezvous(model: ModelRecord, pool: Sequence[InstanceSlot]) -> InstanceSlot:
    """The same instance for a model each time, as long as it is there."""
    key = random.Random(model.model_id).getrandbits(64) | 1
    return min(pool, key=lambda slot: (slot.salt * key) & _MASK)


# Names of placements, and what makes them from a seed. None: production's.
PLACEMENTS: Final[Mapping[str, Callable[[int], Place] | None]] = {
    "production": None,
    "random": lambda seed: by(at_random(seed), "random"),
    "least-loaded": lambda seed: by(least_loaded, "least_loaded"),
    "rendezvous": lambda seed: by(rendezvous, "rendezvous"),
}


@contextlib.contextmanager
def placing_by(place: Place | None) -> Iterator[None]:
    if place is None:
        yield
        return
    callers = [
        module
        for name, module in sorted(sys.modules.items())
        if name.startswith("mesh.core.") and getattr(module, "place", None) is placement.place
    ]
    callers.remove(placement)
    for caller in callers:
        caller.place = place  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for caller in callers:
            caller.place = placement.place  # type: ignore[attr-defined]
