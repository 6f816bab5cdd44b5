"""What one InferenceService or Predictor asks the registry for, and what forbids it. Pure.

The same for a resource of an API server and for one that `mesh apply` sends to a router: it is
read, a runtime is chosen for it, and its model gets the label of that runtime's instances.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from mesh.core.errors import InvalidArgument
from mesh.kserve_status import INVALID_SPEC, Refusal
from mesh.manifest import AppliedModel, parse_resource
from mesh.runtime_selection import Chosen, NotChosen, RuntimeOffer, choose_runtime


@dataclass(frozen=True, slots=True)
class Desired:
    """``applied`` is None for a resource that cannot be read. ``refusal``: why it is not to be
    registered."""

    applied: AppliedModel | None = None
    chosen: Chosen | None = None
    refusal: Refusal | None = None


def desired_model(
    resource: Mapping[str, Any], offers: Collection[RuntimeOffer], *, now_ms: int
) -> Desired:
    """``offers``: the runtimes that there are for the resource's namespace."""
    try:
        applied = parse_resource(resource, now_ms=now_ms, chooses_runtimes=True)
    except InvalidArgument as error:
        return Desired(refusal=Refusal(INVALID_SPEC, error.message))
    choice = choose_runtime(applied.wish, offers)
    if isinstance(choice, NotChosen):
        return Desired(applied, refusal=Refusal(choice.reason, choice.message))
    return Desired(applied.on_runtime(choice), choice)
