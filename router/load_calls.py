"""What this router asks of an instance: to load a model, to unload it.

One call each, and the view is told what came of it: a placement counts as pending while its Load is
under way, a copy becomes routable at once, a failure is known before the store tells of it. What
follows from an answer is decided elsewhere (``mesh.core.loads``, the leader).

``load`` raises nothing: whatever goes wrong on the way is an ``Unreachable``. Its bound is the
model's load time-out plus ``Policy.queue_timeout_ms``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import assert_never

from mesh.core import loads as core
from mesh.core.errors import Code, MeshError
from mesh.core.policy import Policy
from mesh.core.types import LoadPriority
from mesh.core.view import ClusterView
from mesh.internal_calls import (
    LOAD_PATH,
    UNLOAD_PATH,
    UNLOAD_TIMEOUT_S,
    load_request,
    load_timeout_ms,
)
from mesh.metrics import RouterMetrics
from protos import mesh_internal_pb2 as internal
from router.peers import Peers

log = logging.getLogger(__name__)


class LoadCalls:
    """``now_ms`` is the wall clock's reading; ``use_score`` is ``mesh.core.usage``'s measure of how
    much a model was used through this router."""

    def __init__(
        self,
        view: ClusterView,
        peers: Peers,
        metrics: RouterMetrics,
        *,
        policy: Policy,
        now_ms: Callable[[], int],
        use_score: Callable[[str], float],
    ) -> None:
        self._view = view
        self._peers = peers
        self._metrics = metrics
        self._policy = policy
        self._now_ms = now_ms
        self._use_score = use_score

    def use_policy(self, policy: Policy) -> None:
        self._policy = policy

    def timeout_ms(self, model_id: str) -> int:
        """What a load may take, its wait in the instance's queue included."""
        return load_timeout_ms(self._view.models.get(model_id), self._policy)

    async def load(
        self,
        model_id: str,
        instance_id: str,
        *,
        size_bytes: int | None,
        last_used_at_ms: int,
        priority: LoadPriority,
        pin: bool,
        reason: str,
    ) -> core.Answer:
        """One Load. ``size_bytes`` is None for a load that somebody else has claimed already."""
        now_ms = self._now_ms()
        view = self._view
        if size_bytes is not None:
            view.add_pending(model_id, instance_id, size_bytes=size_bytes, now_ms=now_ms)
        request = load_request(
            model_id,
            view.models.get(model_id),
            revision=view.revision,
            last_used_at_ms=last_used_at_ms or now_ms,
            priority=priority,
            pin=pin,
            use_score=self._use_score(model_id),
            reason=reason,
        )
        try:
            channel = self._peers.channel(instance_id)
            reply = await channel.unary(
                LOAD_PATH,
                request,
                timeout_s=self.timeout_ms(model_id) / 1_000,
            )
            answer = internal.LoadResponse.FromString(reply.message)
            outcome = self._outcome(model_id, instance_id, answer)
        except MeshError as error:
            outcome = core.Unreachable(instance_id, error.message)
        except ValueError as error:  # protobuf's DecodeError is one
            outcome = core.Unreachable(instance_id, f"its answer cannot be read: {error}")
        finally:
            view.drop_pending(model_id, instance_id)
        self._metrics.counter("loads_requested", _label(outcome))
        log.info("load %s on %s: %s", model_id, instance_id, outcome)
        return outcome

    def _outcome(
        self, model_id: str, instance_id: str, answer: internal.LoadResponse
    ) -> core.Answer:
        now_ms = self._now_ms()
        match answer.outcome:
            case internal.LoadResponse.LOADED:
                self._view.mark_loaded(
                    model_id,
                    instance_id,
                    size_bytes=answer.size_bytes,
                    copy_revision=answer.copy_revision,
                    now_ms=now_ms,
                )
                return core.Loaded(instance_id)
            case internal.LoadResponse.CLAIMED_ELSEWHERE:
                return core.ClaimedElsewhere(instance_id, answer.claimed_instance_id)
            case internal.LoadResponse.FAILED:
                known = answer.code in Code._value2member_map_ and answer.code != Code.OK
                code = Code(answer.code) if known else Code.UNAVAILABLE
                # Of a model that is not registered nothing is remembered: under the same name it
                # may be registered anew at any time.
                if code is not Code.NOT_FOUND:
                    self._view.put_failure(
                        core.failure_record(
                            model_id,
                            instance_id,
                            code,
                            answer.message,
                            now_ms=now_ms,
                            policy=self._policy,
                        )
                    )
                return core.Failed(instance_id, code, answer.message)
            case internal.LoadResponse.REJECTED:
                return core.Rejected(instance_id, answer.message)
            case _:
                return core.Unreachable(instance_id, f"unknown outcome {answer.outcome}")

    async def unload(self, model_id: str, instance_id: str, reason: str) -> bool:
        """Drop one copy once its requests have ended; whether it was there. Raises MeshError."""
        request = internal.UnloadRequest(model_id=model_id, reason=reason)
        reply = await self._peers.channel(instance_id).unary(
            UNLOAD_PATH, request.SerializeToString(), timeout_s=UNLOAD_TIMEOUT_S
        )
        self._view.delete_copy(model_id, instance_id)
        return bool(internal.UnloadResponse.FromString(reply.message).was_here)


def _label(outcome: core.Answer) -> str:
    match outcome:
        case core.Loaded():
            return "loaded"
        case core.ClaimedElsewhere():
            return "claimed_elsewhere"
        case core.Failed():
            return "failed"
        case core.Rejected():
            return "rejected"
        case core.Unreachable():
            return "unreachable"
        case _:
            assert_never(outcome)
