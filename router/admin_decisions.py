"""``mesh.admin.v1.Admin/Decisions``: the last decisions of all routers and of all instances.

They are asked side by side, ``ASKED_AT_ONCE`` at a time and for ``TIMEOUT_S`` altogether; who has
not answered by then is named. Other routers are asked at their metrics listener (``router.roster``)
for what ``own`` tells.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Coroutine, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Final

from mesh import admin_views as views
from mesh.core.decisions import Decision, Decisions
from mesh.core.errors import InvalidArgument, MeshError
from mesh.core.view import ClusterView
from mesh.internal_calls import DECISIONS_PATH
from protos import mesh_admin_pb2 as pb
from protos import mesh_internal_pb2 as internal
from router.peers import Peers
from router.roster import Roster
from router.rpc import Rpcs

# At the metrics listener of a router.
PATH: Final = "/decisions"
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
    roster: Roster

    def rpcs(self) -> Rpcs:
        return {"Decisions": (pb.DecisionsRequest, self.list_decisions)}

    async def list_decisions(self, request: pb.DecisionsRequest) -> pb.DecisionsResponse:
        limit = _limit(request.limit)
        about, since_ms = request.name, request.since_ms
        answers = await self._ask(about, limit, since_ms)
        unreachable = {who: said for who, said in answers.items() if isinstance(said, str)}
        rows = list(self._own_rows(about, limit, since_ms))
        for said in answers.values():
            if not isinstance(said, str):
                rows += (row for row in said if row.at_ms >= since_ms)
        rows.sort(key=lambda row: row.at_ms, reverse=True)
        asked = 1 + len(answers) - len(unreachable)
        view = views.DecisionList(tuple(rows[:limit]), unreachable, asked)
        return pb.DecisionsResponse(json=views.encode(view))

    def own(self, query: Mapping[str, str]) -> bytes:
        """This router's alone, as another one asks for them. Raises InvalidArgument."""
        try:
            limit, since_ms = int(query.get("limit", "0")), int(query.get("since_ms", "0"))
        except ValueError as error:
            raise InvalidArgument(f"limit and since_ms: expected whole numbers: {error}") from error
        rows = self._own_rows(query.get("name", ""), _limit(limit), since_ms)
        return views.encode(rows).encode()

    def _own_rows(self, name: str, limit: int, since_ms: int) -> tuple[views.DecisionRow, ...]:
        _, models = self._meant(name)
        rows = (
            _row(decision, self.router_id)
            for decision in self.decisions.recent(LIMIT_MAX, since_ms=since_ms)
            if _is_about(decision, name, models)
        )
        return tuple(islice(rows, limit))

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

    async def _ask(self, name: str, limit: int, since_ms: int) -> dict[str, Answer]:
        """By instance and by router: what it decided, or why that is not known."""
        turn = asyncio.Semaphore(ASKED_AT_ONCE)
        instances, models = self._meant(name)
        asking: dict[str, Coroutine[None, None, Answer]] = {
            one: self._ask_instance(one, models, limit, turn) for one in instances
        }
        query = {"name": name, "limit": str(limit), "since_ms": str(since_ms)}
        asking |= {
            one: self._ask_router(one, query, turn) for one in self.roster.others.keys() - asking
        }
        tasks = {one: asyncio.ensure_future(question) for one, question in asking.items()}
        if not tasks:
            return {}
        try:
            _, late = await asyncio.wait(tasks.values(), timeout=TIMEOUT_S)
        finally:
            for task in tasks.values():
                task.cancel()
        return {
            one: f"no answer within {TIMEOUT_S:g} s" if task in late else task.result()
            for one, task in tasks.items()
        }

    async def _ask_router(
        self, router_id: str, query: Mapping[str, str], turn: asyncio.Semaphore
    ) -> Answer:
        async with turn:
            try:
                text = await self.roster.ask(router_id, PATH, query)
                return views.decode_list(views.DecisionRow, text)
            except MeshError as error:
                return error.message

    async def _ask_instance(
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


def _limit(asked: int) -> int:
    if not 0 <= asked <= LIMIT_MAX:
        raise InvalidArgument(f"limit: expected 1 to {LIMIT_MAX}; found {asked}")
    return asked or LIMIT


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
