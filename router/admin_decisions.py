"""``mesh.admin.v1.Admin/Decisions``: the last decisions of this router and of all instances.

The instances are asked side by side, ``ASKED_AT_ONCE`` at a time and for ``TIMEOUT_S`` altogether;
who has not answered by then is named. What other routers decided stands in their own logs and
metrics: they share one address, so that they cannot be asked by name.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Final

from mesh import admin_views as views
from mesh.core.decisions import Decision, Decisions
from mesh.core.errors import InvalidArgument, MeshError
from mesh.core.view import ClusterView
from protos import mesh_admin_pb2 as pb
from protos import mesh_internal_pb2 as internal
from router.peers import Peers
from router.rpc import Rpcs

DECISIONS_PATH: Final = "/mesh.internal.v1.Instance/Decisions"
TIMEOUT_S: Final = 3.0
ASKED_AT_ONCE: Final = 64
LIMIT: Final = 100
LIMIT_MAX: Final = 10_000

Answer = tuple[views.DecisionRow, ...] | str


@dataclass(frozen=True, slots=True)
class DecisionsAdmin:
    router_id: str
    view: ClusterView
    decisions: Decisions
    peers: Peers

    def rpcs(self) -> Rpcs:
        return {"Decisions": (pb.DecisionsRequest, self.list_decisions)}

    async def list_decisions(self, request: pb.DecisionsRequest) -> pb.DecisionsResponse:
        limit = request.limit or LIMIT
        if not 0 < limit <= LIMIT_MAX:
            raise InvalidArgument(f"limit: expected 1 to {LIMIT_MAX}; found {request.limit}")
        instances, models = self._meant(request.name)
        rows = [
            _row(decision, self.router_id)
            for decision in self.decisions.recent(LIMIT_MAX, since_ms=request.since_ms)
            if _is_about(decision, request.name, models)
        ]
        answers = await self._ask(instances, models, limit)
        unreachable = {who: said for who, said in answers.items() if isinstance(said, str)}
        for said in answers.values():
            if not isinstance(said, str):
                rows += (row for row in said if row.at_ms >= request.since_ms)
        rows.sort(key=lambda row: row.at_ms, reverse=True)
        asked = 1 + len(answers) - len(unreachable)
        view = views.DecisionList(tuple(rows[:limit]), unreachable, asked)
        return pb.DecisionsResponse(json=views.encode(view))

    def _meant(self, name: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The instances to ask, and the models to ask about; no models: about anything."""
        if name in self.view.instances:
            return (name,), ()
        everybody = tuple(self.view.instances)
        if not name:
            return everybody, ()
        alias = self.view.vmodels.get(name)
        if alias is None:
            return everybody, (name,)
        return everybody, tuple({alias.active_model_id, alias.target_model_id})

    async def _ask(
        self, instance_ids: Sequence[str], models: Sequence[str], limit: int
    ) -> dict[str, Answer]:
        """By instance: what it decided, or why that is not known."""
        turn = asyncio.Semaphore(ASKED_AT_ONCE)
        tasks = {
            instance_id: asyncio.ensure_future(self._ask_one(instance_id, models, limit, turn))
            for instance_id in instance_ids
        }
        if not tasks:
            return {}
        try:
            _, late = await asyncio.wait(tasks.values(), timeout=TIMEOUT_S)
        finally:
            for task in tasks.values():
                task.cancel()
        return {
            instance_id: f"no answer within {TIMEOUT_S:g} s" if task in late else task.result()
            for instance_id, task in tasks.items()
        }

    async def _ask_one(
        self, instance_id: str, models: Sequence[str], limit: int, turn: asyncio.Semaphore
    ) -> Answer:
        found: list[views.DecisionRow] = []
        async with turn:
            for model_id in models or ("",):
                request = internal.DecisionsRequest(model_id=model_id, limit=limit)
                try:
                    reply = await self.peers.channel(instance_id).unary(
                        DECISIONS_PATH, request.SerializeToString(), timeout_s=TIMEOUT_S
                    )
                    text = internal.DecisionsResponse.FromString(reply.message).json
                    rows = views.decode_list(views.DecisionRow, text)
                except MeshError as error:
                    return error.message
                except ValueError as error:  # protobuf's decode error
                    return f"its answer cannot be read: {error}"
                found += (_said_by(row, instance_id) for row in rows)
        return tuple(found)


def _is_about(decision: Decision, name: str, models: Collection[str]) -> bool:
    if not name:
        return True
    return decision.model_id in models or decision.instance_id == name


def _row(decision: Decision, who: str) -> views.DecisionRow:
    return views.DecisionRow(
        at_ms=decision.at_ms,
        kind=decision.kind,
        reason=decision.reason,
        model_id=decision.model_id,
        instance_id=decision.instance_id,
        runner_up=decision.runner_up,
        detail=decision.detail,
        who=who,
    )


def _said_by(row: views.DecisionRow, instance_id: str) -> views.DecisionRow:
    return replace(row, who=instance_id)
