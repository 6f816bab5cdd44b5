"""What a leaving instance does with its copies: which it has loaded elsewhere first, and where.

Pure. ``worth_moving`` names the copies and their order once; ``next_move`` says of one of them, as
the view stands at that moment, where it goes or why it needs to go nowhere. The shell
(``mesh.instance.drainer``) carries a move out and asks again where it failed, with the instance
excluded that did not take it. Nothing here is kept between two calls.

An instance that drains too is no target, and its copy is no reason to stay.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from mesh.core.placement import NoPlacement, place
from mesh.core.policy import Policy
from mesh.core.types import CopyState, ModelRecord
from mesh.core.view import ClusterView


@dataclass(frozen=True, slots=True)
class Held:
    """A LOADED copy on the leaving instance. ``pinned``: it is the one of a pinned model."""

    record: ModelRecord
    last_used_at_ms: int
    pinned: bool = False

    @property
    def model_id(self) -> str:
        return self.record.model_id


@dataclass(frozen=True, slots=True)
class Move:
    """Have it loaded on ``instance_id``. ``reason``: the placement's, or ``joins_load``."""

    instance_id: str
    reason: str
    runner_up: str | None
    size_bytes: int
    detail: str


@dataclass(frozen=True, slots=True)
class Stay:
    """Nothing is to be done. ``reason``: ``held_elsewhere``, or that of a NoPlacement."""

    reason: str
    detail: str


def worth_moving(held: Iterable[Held], *, now_ms: int, policy: Policy) -> tuple[Held, ...]:
    """Copies used within ``drain_recent_ms``, the latest first; those of pinned models and of
    models with a minimum whenever they were used: somebody has said that they matter."""
    wanted = [
        copy
        for copy in held
        if copy.record.pinned
        or copy.record.min_copies >= 2
        or (copy.last_used_at_ms and now_ms - copy.last_used_at_ms <= policy.drain_recent_ms)
    ]
    wanted.sort(key=lambda copy: (-copy.last_used_at_ms, copy.model_id))
    return tuple(wanted)


def anybody_there(view: ClusterView, own_id: str) -> bool:
    """Whether there is an instance that could take anything at all."""
    return any(slot.ready for name, slot in view.instances.items() if name != own_id)


def next_move(
    view: ClusterView,
    held: Held,
    *,
    own_id: str,
    now_ms: int,
    policy: Policy,
    exclude: Collection[str] = (),
) -> Move | Stay:
    """``view`` holds the model's copies as they are now; ``exclude`` did not take it."""
    others = [
        copy
        for copy in view.copies_of(held.model_id)
        if copy.instance_id != own_id and view.instances[copy.instance_id].ready
    ]
    for copy in others:
        if copy.state is CopyState.LOADED:
            return Stay("held_elsewhere", f"{copy.instance_id} has a copy")
    for copy in others:  # it may still come to nothing: whoever asks there hears of it
        if copy.instance_id not in exclude:
            detail = f"{copy.instance_id} is loading it"
            return Move(copy.instance_id, "joins_load", None, copy.size_bytes, detail)
    placed = place(view, held.record, now_ms=now_ms, policy=policy, exclude={own_id, *exclude})
    if isinstance(placed, NoPlacement):
        return Stay(placed.reason, placed.detail)
    return Move(
        placed.instance_id, placed.reason, placed.runner_up, placed.size_bytes, placed.detail
    )
