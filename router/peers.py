"""The router's connections to instances: one relay upstream and one channel each, made when needed.

An instance's id is fresh at each start, so a connection belongs to an id for good. ``prune`` closes
those of instances that have left the view; calls in flight on them finish. ``generation`` tells
holders of an upstream (the dispatcher's table) that some upstream was closed, because an instance
that lost its lease may come back under its old id.
"""

from __future__ import annotations

from collections.abc import Callable

from mesh.core.errors import Unavailable
from mesh.core.view import ClusterView
from mesh.wire.client import Channel
from mesh.wire.relay import Upstream


class Peers:
    """``make_upstream`` and ``make_channel`` take an address; they must not block."""

    def __init__(
        self,
        view: ClusterView,
        *,
        make_upstream: Callable[[str], Upstream] = Upstream,
        make_channel: Callable[[str], Channel] = Channel,
    ) -> None:
        self._view = view
        self._make_upstream = make_upstream
        self._make_channel = make_channel
        self._upstreams: dict[str, Upstream] = {}
        self._channels: dict[str, Channel] = {}
        self.generation = 0

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
