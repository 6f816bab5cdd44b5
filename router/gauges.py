"""What a router's gauges tell, read when they are asked.

Those of the whole mesh only the leader tells, so that they are not counted once for each router.
"""

from __future__ import annotations

from collections.abc import Callable

from mesh.core.types import CopyState
from mesh.core.view import ClusterView
from mesh.election import Election
from mesh.metrics import RouterMetrics
from mesh.wire.relay import Relay
from mesh.wire.server import Server
from router.dispatch import Dispatcher
from router.leader import LeaderLoop
from router.loads import Loads
from router.peers import Peers

Source = Callable[[], float | None]


def report(
    metrics: RouterMetrics,
    view: ClusterView,
    *,
    dispatcher: Dispatcher,
    loads: Loads,
    peers: Peers,
    leader: LeaderLoop,
    election: Election,
    relay: Relay,
    server: Server,
    store_connected: Callable[[], bool],
    now_ms: Callable[[], int],
) -> None:
    """Set the source of every gauge of a router."""

    def of_leader(read: Callable[[], float]) -> Source:
        return lambda: read() if election.is_leader else None

    sources: dict[str, Source] = {
        "waiting": lambda: loads.waiting + dispatcher.waiting,
        "route_models": lambda: dispatcher.table_size()[0],
        "route_copies": lambda: dispatcher.table_size()[1],
        "instances": lambda: len(view.instances),
        "view_revision": lambda: view.revision,
        "leader": lambda: float(election.is_leader),
        "buffered_bytes": lambda: relay.budget.used_bytes + relay.budget.queued_bytes,
        "inflight": lambda: dispatcher.inflight,
        "retry_budget": lambda: dispatcher.retries_left,
        "ejected": lambda: len(peers.avoided()),
        "connections": lambda: server.connections,
        "store_connected": lambda: float(store_connected()),
        "shortfall": of_leader(lambda: leader.copies_lacking),
        "models_managed": of_leader(lambda: len(view.models)),
        "models_loaded": of_leader(lambda: _models_loaded(view)),
        "models_with_failure": of_leader(lambda: _models_with_failure(view, now_ms())),
    }
    for name, read in sources.items():
        metrics.gauge_source(name, read)


def _models_loaded(view: ClusterView) -> int:
    return len({copy.model_id for copy in view.all_copies() if copy.state is CopyState.LOADED})


def _models_with_failure(view: ClusterView, now_ms: int) -> int:
    return len({f.model_id for f in view.all_failures() if f.expires_at_ms > now_ms})
