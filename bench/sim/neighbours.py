"""What instances know of each other and ask of each other: ``mesh.instance.neighbours``.

In production each has a view of the instances and reads a model's copies when it decides about
them. Here one view, fed by a watch of everything, stands for all of theirs: a hundred views of the
same would differ by milliseconds and cost a hundred times as much.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from bench.sim.messages import Wish
from bench.sim.store import Change, take_in
from bench.sim.world import World
from mesh.core.types import LoadPriority, ModelRecord
from mesh.core.view import ClusterView
from mesh.instance.answers import LoadAnswer, LoadOutcome

# Decided upon every ten seconds, so it may be as much later than the routers' views: fewer batches.
WATCH_TIMES = 8
# Instances number their loads apart from the routers, whose numbers are below.
_NUMBER = 15


class PeerCall:
    """One Load call from instance to instance."""

    __slots__ = ("instance_id", "model_id", "neighbours", "over", "told")

    def __init__(
        self, neighbours: Neighbours, model_id: str, instance_id: str, told: Callable[[bool], None]
    ) -> None:
        self.neighbours = neighbours
        self.model_id = model_id
        self.instance_id = instance_id
        self.told = told
        self.over = False

    def answered(self, said: LoadAnswer) -> None:
        world = self.neighbours.world
        world.engine.after(world.settings.network_ms, self.end, said)

    def end(self, said: LoadAnswer | None = None) -> None:
        """None: the connection was lost, or could not be made."""
        if self.over:
            return
        self.over = True
        world, view = self.neighbours.world, self.neighbours.view
        world.instances[self.instance_id].peer_calls.pop(self, None)
        view.drop_pending(self.model_id, self.instance_id)
        loaded = said is not None and said.outcome is LoadOutcome.LOADED
        if said is not None and loaded:
            view.mark_loaded(
                self.model_id,
                self.instance_id,
                size_bytes=said.size_bytes,
                copy_revision=said.copy_revision,
                now_ms=world.engine.now_ms,
            )
        self.told(loaded)


class Neighbours:
    """One for all instances."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.view = ClusterView()
        self._asked = 0
        world.store.fill(self.view)
        self.watch = world.store.watch(WATCH_TIMES * world.settings.watch_ms, self._take_in)

    def _take_in(self, changes: Sequence[Change]) -> None:
        take_in(self.view, changes)

    def load_on(
        self,
        instance_id: str,
        record: ModelRecord,
        *,
        size_bytes: int,
        last_used_at_ms: int,
        use_score: float,
        pin: bool,
        told: Callable[[bool], None],
    ) -> None:
        """One more copy there; ``told`` hears whether it is there now."""
        world, model_id = self.world, record.model_id
        self._asked += 1
        self.view.add_pending(
            model_id, instance_id, size_bytes=size_bytes, now_ms=world.engine.now_ms
        )
        wish = Wish(
            model_id,
            self.view.revision,
            last_used_at_ms=last_used_at_ms,
            priority=LoadPriority.COPY,
            pin=pin,
            use_score=use_score,
            miss=_NUMBER + self._asked * 16,
            known=record,
        )
        call = PeerCall(self, model_id, instance_id, told)
        instance = world.instances[instance_id]
        if not instance.alive:
            world.engine.after(world.settings.connect_ms, call.end)
            return
        instance.peer_calls[call] = None
        way_ms = world.settings.network_ms
        world.engine.after(way_ms, instance.deliver, instance.load, wish, call.answered)

    def unload_on(self, instance_id: str, model_id: str) -> None:
        instance = self.world.instances[instance_id]
        way_ms = self.world.settings.network_ms
        self.world.engine.after(way_ms, instance.deliver, instance.unload, model_id)
