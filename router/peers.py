"""The router's connections to instances: one relay upstream and one channel each, made when needed.

An instance's id is fresh at each start, so a connection belongs to an id for good. ``prune`` closes
those of instances that have left the view; calls in flight on them finish. ``generation`` tells
holders of an upstream (the dispatcher's table) that some upstream was closed, because an instance
that lost its lease may come back under its old id, or that another instance is passed over now.

``watch`` asks quiet connections with a PING and carries out what ``mesh.core.outliers`` decides of
instances that do not answer: calls leave them, ``avoided`` names them, each change is a decision
(``eject``, ``readmit``). It decides nothing about calls; nothing here waits or raises.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from time import monotonic
from typing import Final

from mesh.core.errors import Unavailable
from mesh.core.outliers import Outliers, Transition
from mesh.core.policy import Policy
from mesh.core.view import ClusterView
from mesh.decision_log import DecisionLog
from mesh.wire.client import Channel
from mesh.wire.limits import Patience
from mesh.wire.outbound import Outbound
from mesh.wire.peer import NoConnection, Peer
from mesh.wire.relay import Upstream

# Once in so long it is looked whether an instance that is passed over has left the view.
_FORGET_S: Final = 1.0


class Peers:
    """``make_upstream`` and ``make_channel`` take an address; they must not block. ``clock`` is
    ``time.monotonic``, as that of the connections is."""

    def __init__(
        self,
        view: ClusterView,
        *,
        make_upstream: Callable[[str], Upstream] = Upstream,
        make_channel: Callable[[str], Channel] = Channel,
        policy: Policy | None = None,
        decisions: DecisionLog | None = None,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self._view = view
        self._make_upstream = make_upstream
        self._make_channel = make_channel
        self._upstreams: dict[str, Upstream] = {}
        self._channels: dict[str, Channel] = {}
        self._policy = policy or Policy()
        self._set_patience(self._policy)
        self._decisions = decisions
        self._clock = clock
        self.outliers = Outliers(self._policy)
        self.generation = 0
        self._changes_seen = 0
        # Called behind each look of ``watch`` with its time, and at once when an instance is back.
        self.on_watch: Callable[[float], None] = _nothing
        self.on_back: Callable[[str], None] = _nobody
        # With a connection that is silent, or none in time: since when.
        self._silent: dict[str, float] = {}
        self._connecting: set[str] = set()  # asked for a connection, to see whether it is back
        self._forgot_s = 0.0

    def use_policy(self, policy: Policy) -> None:
        self._policy = policy
        self._set_patience(policy)
        self.outliers.use_policy(policy)

    def _set_patience(self, policy: Policy) -> None:
        self._patience = Patience(
            ping_after_s=policy.ping_after_ms / 1_000,
            ping_timeout_s=policy.ping_timeout_ms / 1_000,
        )
        # An idle instance is asked over its upstream: once is enough.
        self._patience_of_channels = replace(self._patience, idle_ping_s=math.inf)

    def upstream(self, instance_id: str) -> Upstream:
        """For relayed calls. Raises Unavailable for an instance that is not in the view."""
        upstream = self._upstreams.get(instance_id)
        if upstream is None:
            upstream = self._make_upstream(self.address(instance_id))
            self._upstreams[instance_id] = upstream
        return upstream

    def channel(self, instance_id: str) -> Channel:
        """For this router's own calls. Raises Unavailable as ``upstream`` does."""
        channel = self._channels.get(instance_id)
        if channel is None:
            channel = self._channels[instance_id] = self._make_channel(self.address(instance_id))
        return channel

    def address(self, instance_id: str) -> str:
        slot = self._view.instances.get(instance_id)
        if slot is None:
            raise Unavailable(f"instance {instance_id!r} has left the mesh")
        return slot.record.address

    # ---- instances that do not answer ---------------------------------------------------------

    def avoided(self) -> frozenset[str]:
        """Instances to place nothing on while there are others: they seem not to answer."""
        return self.outliers.avoided

    def connect_failed(self, instance_id: str) -> None:
        if instance_id in self._view.instances:
            self._apply(self.outliers.connect_failed(instance_id, self._now_ms()))

    def attempt_failed(self, instance_id: str) -> None:
        """An attempt ended without an answer of the instance."""
        known = len(self._view.instances)
        if instance_id in self._view.instances:
            self._apply(self.outliers.failed(instance_id, self._now_ms(), known=known))

    def answered(self, instance_id: str) -> None:
        """To be told while ``outliers.standings`` is not empty."""
        self._apply(self.outliers.answered(instance_id, self._now_ms()))

    def watch(self, now_s: float) -> None:
        """Look at every connection; to be called every 100 ms or so."""
        troubled: list[tuple[Peer, Patience]] = []
        # Lists, because what is found out may make another connection.
        for instance_id, upstream in list(self._upstreams.items()):
            if upstream.look_at_s <= now_s:
                self._look(instance_id, upstream, now_s, self._patience, troubled)
        for instance_id, channel in list(self._channels.items()):
            if channel.peer.look_at_s <= now_s:
                patience = self._patience_of_channels
                self._look(instance_id, channel.peer, now_s, patience, troubled)
        for instance_id in tuple(self._silent):
            self._judge(instance_id, now_s)
        self._try_connections()
        self.outliers.tick(self._now_ms())
        self._apply(None)
        if now_s - self._forgot_s >= _FORGET_S:
            self._forgot_s = now_s
            for instance_id in self.outliers.standings.keys() - self._view.instances.keys():
                self.outliers.forget(instance_id)
        # Behind all judgements, so that no call goes from one silent instance to another.
        for peer, patience in troubled:
            peer.relieve(now_s, patience)
        self.on_watch(now_s)

    def _look(
        self,
        instance_id: str,
        peer: Peer,
        now_s: float,
        patience: Patience,
        troubled: list[tuple[Peer, Patience]],
    ) -> None:
        peer.watch(now_s, patience)
        if peer.silent_since_s:
            self._silent.setdefault(instance_id, peer.silent_since_s)
        if peer.look_at_s <= now_s and peer.troubled:
            troubled.append((peer, patience))

    def _judge(self, instance_id: str, now_s: float) -> None:
        """An instance is silent when one of its ways is, and nothing came on the other since."""
        found: list[Peer | None] = [self._upstreams.get(instance_id)]
        if (channel := self._channels.get(instance_id)) is not None:
            found.append(channel.peer)
        ways = [way for way in found if way is not None]
        silent_since_s = max((way.silent_since_s for way in ways), default=0.0)
        heard_s = max((way.heard_s for way in ways), default=0.0)
        if silent_since_s > heard_s:
            quiet_ms = int((now_s - silent_since_s) * 1_000)
            self._apply(self.outliers.fell_silent(instance_id, quiet_ms))
            return
        # What was heard before the silence is no sign of life behind it.
        if heard_s > self._silent.pop(instance_id):
            self._apply(self.outliers.heard(instance_id))
        else:
            self.outliers.lost_sight(instance_id, self._now_ms())
            self._apply(None)

    def _try_connections(self) -> None:
        """See whether those that could not be connected to are back."""
        for instance_id in self.outliers.to_connect(self._now_ms()):
            if instance_id not in self._connecting and instance_id in self._view.instances:
                self._connecting.add(instance_id)
                self._try_connection(instance_id)

    def _try_connection(self, instance_id: str) -> None:
        def on_ready(found: Outbound | NoConnection) -> None:
            self._connecting.discard(instance_id)
            if isinstance(found, NoConnection):
                self.connect_failed(instance_id)
            else:
                self._apply(self.outliers.heard(instance_id))

        self.upstream(instance_id).acquire(on_ready)

    def _apply(self, transition: Transition | None) -> None:
        if self.outliers.changes != self._changes_seen:
            # Whoever remembers a choice of instances has to look again.
            self._changes_seen = self.outliers.changes
            self.generation += 1
            self._view.routes_epoch += 1
        if transition is None:
            return
        if self._decisions is not None:
            self._decisions.note(
                transition.kind,
                transition.reason,
                instance_id=transition.instance_id,
                detail=transition.detail,
            )
        if transition.kind == "readmit":
            self.on_back(transition.instance_id)

    def _now_ms(self) -> int:
        return int(self._clock() * 1_000)

    # ---- ends ---------------------------------------------------------------------------------

    async def prune(self) -> None:
        """Close what leads to instances that are gone."""
        known = self._view.instances
        for instance_id in [i for i in self._upstreams if i not in known]:
            self._upstreams.pop(instance_id).close()
            self.generation += 1
        for instance_id in [i for i in self._channels if i not in known]:
            await self._channels.pop(instance_id).close()

    async def close(self) -> None:
        for upstream in self._upstreams.values():
            upstream.close()
        self._upstreams.clear()
        self.generation += 1
        while self._channels:
            _, channel = self._channels.popitem()
            await channel.close()


def _nothing(now_s: float) -> None:
    """Nobody wants to know."""


def _nobody(instance_id: str) -> None:
    """Nobody waits for it."""
