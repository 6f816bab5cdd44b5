"""``mesh.admin.v1.Admin``'s rpcs about live settings: the policy, and constraints of formats.

What is wrong is refused here, before it stands in the store: a policy is judged on top of what this
router was started with. Reads answer from the view and from this process's own policy.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Final

import orjson

from mesh import admin_views as views
from mesh.core.errors import InvalidArgument
from mesh.core.live_config import POLICY, TYPE_CONSTRAINTS, type_constraints
from mesh.core.policy import Policy, known_only, overridden
from mesh.core.view import ClusterView
from mesh.live_policy import LivePolicy
from mesh.policy_reasons import thresholds
from protos import mesh_admin_pb2 as pb
from router.live_settings import Config, LiveSettings
from router.rpc import Rpcs

log = logging.getLogger(__name__)

# Given once: a lease when an instance joins, its memory of evicted models with the order.
_AT_START: Final = frozenset({"instance_lease_ttl_ms", "evicted_remembered_max"})
_NAMES: Final = frozenset(item.name for item in fields(Policy))


@dataclass(frozen=True, slots=True)
class SettingsAdmin:
    view: ClusterView
    settings: LiveSettings
    live: LivePolicy

    def rpcs(self) -> Rpcs:
        return {
            "GetPolicy": (pb.GetPolicyRequest, self.get_policy),
            "SetPolicy": (pb.SetPolicyRequest, self.set_policy),
            "GetTypeConstraints": (pb.GetTypeConstraintsRequest, self.get_type_constraints),
            "SetTypeConstraints": (pb.SetTypeConstraintsRequest, self.set_type_constraints),
        }

    async def get_policy(self, request: pb.GetPolicyRequest) -> pb.PolicyResponse:
        return self._policy()

    async def set_policy(self, request: pb.SetPolicyRequest) -> pb.PolicyResponse:
        overrides = _object(request.overrides_json or "{}", "overrides_json")
        unset = set(request.unset)
        if both := sorted(unset & overrides.keys()):
            raise InvalidArgument(f"policy.{both[0]}: both set and unset")

        def changed(config: Config) -> Config:
            for name in (overrides.keys() | unset - config.keys()) - _NAMES:
                overridden(self.live.base, {name: 0})  # says what it could have meant
            kept = {name: value for name, value in config.items() if name not in unset}
            wanted = kept | overrides
            overridden(self.live.base, known_only(wanted)[0])  # others may stand there already
            return wanted

        wanted = await self.settings.change(POLICY, changed, reset=request.reset)
        log.info("config/policy is now %s", orjson.dumps(wanted).decode())
        late = sorted(_AT_START & (overrides.keys() | unset))
        return self._policy(f"{name} takes effect when an instance starts next" for name in late)

    def _policy(self, warnings: Iterable[str] = ()) -> pb.PolicyResponse:
        live, default = self.live, Policy()
        rows = []
        for threshold in thresholds():
            name = threshold.name
            if name in live.overrides:
                source = "live"
            else:
                same = getattr(live.base, name) == getattr(default, name)
                source = "default" if same else "flag"
            row = views.PolicyRow(
                name=name,
                value=getattr(live.policy, name),
                default=threshold.default,
                source=source,
                unit=threshold.unit,
                expected=threshold.expected,
                group=threshold.group,
                reason=threshold.reason,
            )
            rows.append(row)
        told = [*warnings, *(f"this router knows no {name}; passed over" for name in live.unknown)]
        view = views.PolicyView(tuple(rows), live.refused, tuple(told))
        return pb.PolicyResponse(json=views.encode(view))

    async def get_type_constraints(
        self, request: pb.GetTypeConstraintsRequest
    ) -> pb.TypeConstraintsResponse:
        return _constraints(self.view.config.get(TYPE_CONSTRAINTS, {}))

    async def set_type_constraints(
        self, request: pb.SetTypeConstraintsRequest
    ) -> pb.TypeConstraintsResponse:
        wanted = _object(request.json, "json")
        type_constraints(wanted)  # raises where it makes no sense
        await self.settings.change(TYPE_CONSTRAINTS, lambda _: wanted, reset=True)
        log.info("config/type_constraints is now %s", orjson.dumps(wanted).decode())
        return _constraints(wanted)


def _constraints(config: Mapping[str, object]) -> pb.TypeConstraintsResponse:
    return pb.TypeConstraintsResponse(json=orjson.dumps(dict(config)).decode())


def _object(text: str, field: str) -> Config:
    try:
        found = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise InvalidArgument(f"{field}: not JSON: {error}") from error
    if not isinstance(found, dict):
        raise InvalidArgument(f"{field}: expected a JSON object; found {text:.80}")
    return found
