"""Which kind of nothing a placement has found: final, or to be tried again, and what is missing."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Final

from mesh.core import demand as why
from mesh.core.demand import Demand, refusal
from mesh.core.errors import RETRYABLE, Code, LoadFailed, MeshError
from mesh.core.view import ClusterView

# Comes back this soon when what is missing may appear any moment (an instance that starts).
RETRY_SOON_MS: Final = 1_000
# The reason when pods that could take it are started on demand.
RUNTIME_STARTING: Final = "runtime_starting"


@dataclass(frozen=True, slots=True)
class NoPlacement:
    """Nowhere. ``reason``: ``no_instances``, ``runtime_starting``, ``instances_starting``,
    ``no_runtime``, ``no_label``, ``too_large``, ``load_failed``, ``draining`` or
    ``all_excluded``. ``detail`` is
    for a person and is the message of the error that a client gets."""

    reason: str
    detail: str
    code: Code
    retry_after_ms: int | None = None

    @property
    def retryable(self) -> bool:
        return self.code in RETRYABLE

    def error(self) -> MeshError:
        """What a request that waits for this gets."""
        kind = LoadFailed if self.reason == "load_failed" else MeshError
        return kind(self.detail, code=self.code, retry_after_ms=self.retry_after_ms)


def nowhere(view: ClusterView, demand: Demand, now_ms: int) -> NoPlacement:
    """Name the kind of nothing, the most final one that explains all refusals. At least one
    instance would have to fit for there to be none."""
    refusals = Counter(refusal(slot, demand) for slot in view.instances.values())
    total = sum(refusals.values())
    what = f"model {demand.model.model_id!r} cannot be loaded"
    final = sum(refusals[r] for r in (why.FORMAT_UNSUPPORTED, why.LABELS_MISSING, why.TOO_SMALL))
    if final == total and not refusals[why.TOO_SMALL]:
        runtime = view.runtime_for(demand.model.model_type, demand.required)
        if runtime is not None:
            detail = f"{what} yet: no pod of the runtime {runtime.name!r} is running"
            return NoPlacement(RUNTIME_STARTING, detail, Code.UNAVAILABLE, RETRY_SOON_MS)
    if total == 0:
        detail = f"{what}: no serving instance is running"
        return NoPlacement("no_instances", detail, Code.UNAVAILABLE, RETRY_SOON_MS)
    if final == total:
        return _final(view, demand, refusals, what)
    if refusals[why.STARTING] + final == total:
        detail = f"{what}: {refusals[why.STARTING]} instance(s) are still starting"
        return NoPlacement("instances_starting", detail, Code.UNAVAILABLE, RETRY_SOON_MS)
    tried = refusals[why.EXCLUDED] + refusals[why.ASKED_ALREADY]
    if refusals[why.FAILED_HERE] and not tried:
        return load_failed(demand, now_ms)
    if refusals[why.DRAINING] and not (refusals[why.EXCLUDED] or refusals[why.HAS_COPY]):
        detail = f"{what}: the instances that could hold it are draining"
        return NoPlacement("draining", detail, Code.UNAVAILABLE, RETRY_SOON_MS)
    said = ", ".join(sorted(f"{count} {reason}" for reason, count in refusals.items()))
    detail = f"{what}: no instance is left to try ({said})"
    if demand.failures:
        detail += f"; last failure: {demand.failures[0].message}"
    return NoPlacement("all_excluded", detail, Code.UNAVAILABLE, RETRY_SOON_MS)


def load_failed(demand: Demand, now_ms: int) -> NoPlacement:
    """The last failure's cause and code; it may be tried again when the first one expires."""
    last = demand.failures[0]
    code = Code.__members__.get(last.code, Code.FAILED_PRECONDITION)
    wait_ms = max(1, min(f.expires_at_ms for f in demand.failures) - now_ms)
    model_id = demand.model.model_id
    detail = f"model {model_id!r} failed to load on {last.instance_id}: {last.message}"
    return NoPlacement(
        "load_failed", detail, code, retry_after_ms=wait_ms if code in RETRYABLE else None
    )


def _final(
    view: ClusterView, demand: Demand, refusals: Counter[str | None], what: str
) -> NoPlacement:
    """No instance that runs could ever hold it: what the mesh lacks, the least of it."""
    model_type = demand.model.model_type
    able = [s for s in view.instances.values() if model_type in s.record.model_types]
    if refusals[why.TOO_SMALL]:
        fit = [s.record.capacity_bytes for s in able if demand.required <= s.labels]
        detail = (
            f"{what}: its size of {demand.size_bytes} bytes is more than the capacity of any "
            f"instance (the largest that runs {model_type!r}{_with(demand)} has {max(fit)} bytes)"
        )
        return NoPlacement("too_large", detail, Code.FAILED_PRECONDITION)
    if refusals[why.LABELS_MISSING]:
        labels = sorted({label for slot in able for label in slot.labels})
        detail = (
            f"{what}: no instance that runs {model_type!r} has all the labels that are required: "
            f"{', '.join(sorted(demand.required))}; labels of those that run: "
            f"{', '.join(labels) or 'none'}"
        )
        return NoPlacement("no_label", detail, Code.FAILED_PRECONDITION)
    formats = sorted({t for s in view.instances.values() for t in s.record.model_types})
    detail = (
        f"{what}: no instance can run the format {model_type!r}; "
        f"formats that instances run: {', '.join(formats) or 'none'}"
    )
    return NoPlacement("no_runtime", detail, Code.FAILED_PRECONDITION)


def _with(demand: Demand) -> str:
    return f" with {', '.join(sorted(demand.required))}" if demand.required else ""
