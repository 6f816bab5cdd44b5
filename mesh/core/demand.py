"""What a placement asks of an instance, and why one cannot answer it: the hard filters.

``fitting`` is the quick way over all instances, ``refusal`` names what speaks against one. They
agree: an instance fits exactly when nothing is to be said against it. Nothing here chooses.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Final

from mesh.core.policy import Policy
from mesh.core.slots import InstanceSlot
from mesh.core.types import FailureRecord, InstanceState, ModelRecord
from mesh.core.view import ClusterView

# Why an instance cannot take a model; the words of `mesh explain`.
STARTING: Final = "starting"
DRAINING: Final = "draining"
FORMAT_UNSUPPORTED: Final = "format_unsupported"
LABELS_MISSING: Final = "labels_missing"
TOO_SMALL: Final = "too_small"
FAILED_HERE: Final = "failed_here"
HAS_COPY: Final = "has_copy"
ASKED_ALREADY: Final = "asked_already"
EXCLUDED: Final = "excluded"


@dataclass(frozen=True, slots=True)
class Demand:
    """``required`` and ``preferred`` are labels: of the format's constraint and of the model.
    ``failures`` are the model's unexpired ones, the latest first."""

    model: ModelRecord
    size_bytes: int
    required: frozenset[str]
    preferred: frozenset[str]
    failures: tuple[FailureRecord, ...]
    failed_on: frozenset[str]
    exclude: Collection[str]


def known_size_bytes(model: ModelRecord) -> int:
    """What its next load is going to reserve: stated by the user, else measured by the last one; 0
    when nothing is known."""
    return model.size_bytes_stated or model.size_bytes_measured or 0


def predict_size_bytes(model: ModelRecord, policy: Policy) -> int:
    """The same, or the default. Instances reserve by it: a smaller guess would send them loads for
    which they have no room."""
    return known_size_bytes(model) or policy.default_model_size_bytes


def demand_of(
    view: ClusterView,
    model: ModelRecord,
    *,
    now_ms: int,
    policy: Policy,
    exclude: Collection[str] = (),
) -> Demand:
    """What one more copy of ``model`` asks for."""
    failures = view.failures_of(model.model_id, now_ms)
    required, preferred = frozenset(model.required_labels), frozenset(model.preferred_labels)
    if constraint := view.constraint_of(model.model_type):
        required |= frozenset(constraint.required)
        preferred |= frozenset(constraint.preferred)
    return Demand(
        model=model,
        size_bytes=predict_size_bytes(model, policy),
        required=required,
        preferred=preferred - required,
        failures=failures,
        failed_on=frozenset(failure.instance_id for failure in failures),
        exclude=exclude,
    )


def refusal(slot: InstanceSlot, demand: Demand) -> str | None:
    """The first reason why not, or None. What will not change by itself comes before what may, so
    that a final refusal can be told; STARTING first, as such an advert is not yet whole."""
    record, model = slot.record, demand.model
    if record.state is InstanceState.STARTING:
        return STARTING
    if model.model_type not in record.model_types:
        return FORMAT_UNSUPPORTED
    if not demand.required <= slot.labels:
        return LABELS_MISSING
    if record.capacity_bytes < demand.size_bytes:
        return TOO_SMALL
    if not slot.ready:
        return DRAINING
    if model.model_id in slot.copies:
        return HAS_COPY
    if record.instance_id in demand.failed_on:
        return FAILED_HERE
    if record.instance_id in demand.exclude:
        return EXCLUDED
    if model.model_id in slot.pending:
        return ASKED_ALREADY
    return None


def fitting(view: ClusterView, demand: Demand) -> list[InstanceSlot]:
    """The instances with no ``refusal``, in no particular order.

    Comprehensions over attributes, as a placement looks at every instance of the mesh: what is said
    against few (a copy, a failure) is one look-up, and made only when it is said at all.
    """
    size_bytes, model_type, required = demand.size_bytes, demand.model.model_type, demand.required
    found = [
        slot
        for slot in view.instances.values()
        if slot.ready
        and slot.record.capacity_bytes >= size_bytes
        and model_type in slot.record.model_types
    ]
    if required:
        found = [slot for slot in found if required <= slot.labels]
    model_id = demand.model.model_id
    taken = {copy.instance_id for copy in view.copies_of(model_id)}
    taken.update(view.pending_of(model_id), demand.failed_on, demand.exclude)
    if taken:
        found = [slot for slot in found if slot.record.instance_id not in taken]
    return found
