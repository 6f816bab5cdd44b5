"""What a name means: an alias of that name first, then a model of that id."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from mesh.core.types import ModelRecord, VModelRecord


@dataclass(frozen=True, slots=True)
class Resolved:
    """``name`` means ``model``; ``via`` tells whether through an alias or directly."""

    name: str
    model_id: str
    via: Literal["vmodel", "model"]
    model: ModelRecord


@dataclass(frozen=True, slots=True)
class Unresolved:
    """No such name. ``reason``: ``unknown_name`` or ``dangling_alias``."""

    name: str
    reason: Literal["unknown_name", "dangling_alias"]
    detail: str


def resolve(
    name: str, models: Mapping[str, ModelRecord], vmodels: Mapping[str, VModelRecord]
) -> Resolved | Unresolved:
    vmodel = vmodels.get(name)
    if vmodel is None:
        model = models.get(name)
        if model is None:
            return Unresolved(name, "unknown_name", f"model not found: {name!r}")
        return Resolved(name, name, "model", model)
    model = models.get(vmodel.active_model_id)
    if model is None:
        detail = (
            f"model not found: {name!r} names model {vmodel.active_model_id!r}, "
            "which is not registered"
        )
        return Unresolved(name, "dangling_alias", detail)
    return Resolved(name, model.model_id, "vmodel", model)
