"""Where a model is to be loaded: hard filters, then an order, and the reason of both.

``place`` is a pure function of the view, the model and the clock's reading. It never names an
instance that is not READY, that cannot run the format, that could not hold the model even when
empty, that failed to load it lately, that holds it already, or that the caller excludes. When
nothing is left it says which kind of nothing: final (``FAILED_PRECONDITION``) or to be tried
again (``UNAVAILABLE``).

Order: not full first; then most free bytes; then fewest loads in progress. Among full ones: the
one whose load slots are least behind, then the one whose least recently used model is oldest
(evicting it costs least), then fewest loads. Ties break by a keyed hash of model and instance, so
that neither the order of input nor the names decide. Labels, zones and outliers will be further
filters and terms of ``_rank``; nothing else needs to change for them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from hashlib import blake2b
from typing import Final, NamedTuple

from mesh.core.errors import RETRYABLE, Code, LoadFailed, MeshError
from mesh.core.policy import Policy
from mesh.core.slots import InstanceSlot
from mesh.core.types import FailureRecord, InstanceState, ModelRecord
from mesh.core.view import ClusterView

# Why an instance cannot take a model; the words of `mesh explain`.
STARTING: Final = "starting"
DRAINING: Final = "draining"
FORMAT_UNSUPPORTED: Final = "format_unsupported"
TOO_SMALL: Final = "too_small"
FAILED_HERE: Final = "failed_here"
HAS_COPY: Final = "has_copy"
ASKED_ALREADY: Final = "asked_already"
EXCLUDED: Final = "excluded"

# Comes back this soon when what is missing may appear any moment (an instance that starts).
RETRY_SOON_MS: Final = 1_000


@dataclass(frozen=True, slots=True)
class Placement:
    """Load it on ``instance_id``.

    ``reason`` is the first term of the order that parted it from ``runner_up``:
    ``only_candidate``, ``not_full``, ``most_free``, ``slots_free``, ``oldest_lru``,
    ``fewest_loads`` or ``tie_hash``. ``full`` tells that something has to be evicted for it.
    """

    instance_id: str
    reason: str
    runner_up: str | None
    size_bytes: int
    full: bool
    detail: str


@dataclass(frozen=True, slots=True)
class NoPlacement:
    """Nowhere. ``reason``: ``no_instances``, ``instances_starting``, ``no_runtime``,
    ``too_large``, ``load_failed``, ``draining`` or ``all_excluded``. ``detail`` is for a person
    and is the message of the error that a client gets."""

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


@dataclass(frozen=True, slots=True)
class Candidate:
    """How one instance looks to a placement. ``refusal`` is None for one that may be chosen."""

    instance_id: str
    refusal: str | None
    full: bool
    free_bytes: int
    loads_in_progress: int
    lru_at_ms: int


def predict_size_bytes(model: ModelRecord, policy: Policy) -> int:
    """Measured by the last load, else stated by the user, else the default."""
    return model.size_bytes_measured or model.size_bytes_stated or policy.default_model_size_bytes


def place(
    view: ClusterView,
    model: ModelRecord,
    *,
    now_ms: int,
    policy: Policy,
    exclude: Collection[str] = (),
    avoid: Collection[str] = (),
) -> Placement | NoPlacement:
    """Choose the instance that is to load one more copy of ``model``."""
    failures = view.failures_of(model.model_id, now_ms)
    if len(failures) >= policy.max_load_failures:
        return _load_failed(model, failures, now_ms)
    size_bytes = predict_size_bytes(model, policy)
    failed_on = {failure.instance_id for failure in failures}
    refusals: Counter[str] = Counter()
    ranked: list[tuple[_Rank, str]] = []
    for instance_id, slot in view.instances.items():
        refusal = _refusal(slot, model, size_bytes, exclude, failed_on)
        if refusal is None:
            ranked.append((_rank(slot, size_bytes, now_ms), instance_id))
        else:
            refusals[refusal] += 1
    if avoid:
        ranked = [item for item in ranked if item[1] not in avoid] or ranked
    if not ranked:
        return _nowhere(view, model, size_bytes, refusals, failures, now_ms)
    best, winner, second, runner_up = _best_two(ranked, model.model_id)
    reason = "only_candidate" if second is None else _parting(best, second)
    return Placement(
        instance_id=winner,
        reason=reason,
        runner_up=runner_up,
        size_bytes=size_bytes,
        full=best.full,
        detail=_detail(view, winner, runner_up, reason, size_bytes),
    )


def candidates(
    view: ClusterView,
    model: ModelRecord,
    *,
    now_ms: int,
    policy: Policy,
    exclude: Collection[str] = (),
    avoid: Collection[str] = (),
) -> tuple[Candidate, ...]:
    """Every instance as ``place`` sees it, best first, refused ones last."""
    size_bytes = predict_size_bytes(model, policy)
    failed_on = {failure.instance_id for failure in view.failures_of(model.model_id, now_ms)}

    def look(slot: InstanceSlot) -> Candidate:
        return Candidate(
            instance_id=slot.record.instance_id,
            refusal=_refusal(slot, model, size_bytes, exclude, failed_on),
            full=slot.effective_free_bytes < size_bytes,
            free_bytes=slot.effective_free_bytes,
            loads_in_progress=slot.loads_in_progress,
            lru_at_ms=slot.record.lru_at_ms,
        )

    def order(slot: InstanceSlot) -> tuple[bool, _Rank, int]:
        refused = _refusal(slot, model, size_bytes, exclude, failed_on) is not None
        tie = _tie_hash(model.model_id, slot.record.instance_id)
        return refused, _rank(slot, size_bytes, now_ms), tie

    return tuple(look(slot) for slot in sorted(view.instances.values(), key=order))


class _Rank(NamedTuple):
    """Smaller is better, term by term. ``slots_behind`` and ``lru_at_ms`` are 0 when not full,
    ``lacking_bytes`` is 0 when full."""

    full: bool
    lacking_bytes: int  # minus the free bytes, when not full
    slots_behind: int
    lru_at_ms: int
    loads: int


def _rank(slot: InstanceSlot, size_bytes: int, now_ms: int) -> _Rank:
    free_bytes = slot.effective_free_bytes
    loads = slot.loads_in_progress
    if free_bytes >= size_bytes:
        return _Rank(False, -free_bytes, 0, 0, loads)
    # Without waves of loads on the one instance whose advert still says "oldest": an instance
    # with an idle load slot goes before one that would queue the load.
    behind = loads // max(1, slot.record.load_slots)
    # 0 is "empty": nothing can be evicted there, its space is taken by loads under way.
    lru_at_ms = slot.record.lru_at_ms or now_ms
    return _Rank(True, 0, behind, lru_at_ms, loads)


def _parting(best: _Rank, second: _Rank) -> str:
    if best.full != second.full:
        return "not_full"
    if best.lacking_bytes != second.lacking_bytes:
        return "most_free"
    if best.slots_behind != second.slots_behind:
        return "slots_free"
    if best.lru_at_ms != second.lru_at_ms:
        return "oldest_lru"
    if best.loads != second.loads:
        return "fewest_loads"
    return "tie_hash"


def _best_two(
    ranked: list[tuple[_Rank, str]], model_id: str
) -> tuple[_Rank, str, _Rank | None, str | None]:
    """The two best. Hashes are taken only of those that tie."""
    best = min(rank for rank, _ in ranked)
    tied = sorted((i for rank, i in ranked if rank == best), key=lambda i: _tie_hash(model_id, i))
    if len(tied) > 1:
        return best, tied[0], best, tied[1]
    rest = [(rank, i) for rank, i in ranked if i != tied[0]]
    if not rest:
        return best, tied[0], None, None
    second = min(rank for rank, _ in rest)
    runner_up = min((i for rank, i in rest if rank == second), key=lambda i: _tie_hash(model_id, i))
    return best, tied[0], second, runner_up


def _tie_hash(model_id: str, instance_id: str) -> int:
    digest = blake2b(instance_id.encode(), digest_size=8, key=_hash_key(model_id)).digest()
    return int.from_bytes(digest, "big")


def _hash_key(model_id: str) -> bytes:
    return blake2b(model_id.encode(), digest_size=16).digest()


def _refusal(
    slot: InstanceSlot,
    model: ModelRecord,
    size_bytes: int,
    exclude: Collection[str],
    failed_on: Collection[str],
) -> str | None:
    """The first reason why not. What will not change by itself comes before what may, so that
    ``_nowhere`` can tell a final refusal; STARTING first, as such an advert is not yet whole."""
    record = slot.record
    if record.state is InstanceState.STARTING:
        return STARTING
    if model.model_type not in record.model_types:
        return FORMAT_UNSUPPORTED
    if record.capacity_bytes < size_bytes:
        return TOO_SMALL
    if not slot.ready:
        return DRAINING
    if model.model_id in slot.copies:
        return HAS_COPY
    if record.instance_id in failed_on:
        return FAILED_HERE
    if record.instance_id in exclude:
        return EXCLUDED
    if model.model_id in slot.pending:
        return ASKED_ALREADY
    return None


def _nowhere(
    view: ClusterView,
    model: ModelRecord,
    size_bytes: int,
    refusals: Counter[str],
    failures: tuple[FailureRecord, ...],
    now_ms: int,
) -> NoPlacement:
    """Name the kind of nothing, the most final one that explains all refusals."""
    what = f"model {model.model_id!r} cannot be loaded"
    total = sum(refusals.values())
    if total == 0:
        detail = f"{what}: no serving instance is running"
        return NoPlacement("no_instances", detail, Code.UNAVAILABLE, RETRY_SOON_MS)
    if refusals[STARTING] and total == sum(
        refusals[r] for r in (STARTING, FORMAT_UNSUPPORTED, TOO_SMALL)
    ):
        detail = f"{what}: {refusals[STARTING]} instance(s) are still starting"
        return NoPlacement("instances_starting", detail, Code.UNAVAILABLE, RETRY_SOON_MS)
    if refusals[FORMAT_UNSUPPORTED] == total:
        formats = sorted({t for s in view.instances.values() for t in s.record.model_types})
        detail = (
            f"{what}: no instance can run the format {model.model_type!r}; "
            f"formats that instances run: {', '.join(formats) or 'none'}"
        )
        return NoPlacement("no_runtime", detail, Code.FAILED_PRECONDITION)
    if refusals[FORMAT_UNSUPPORTED] + refusals[TOO_SMALL] == total:
        able = (
            s.record for s in view.instances.values() if model.model_type in s.record.model_types
        )
        largest = max(record.capacity_bytes for record in able)
        detail = (
            f"{what}: its size of {size_bytes} bytes is more than the capacity of any instance "
            f"(the largest that runs {model.model_type!r} has {largest} bytes)"
        )
        return NoPlacement("too_large", detail, Code.FAILED_PRECONDITION)
    if refusals[FAILED_HERE] and not (refusals[EXCLUDED] or refusals[ASKED_ALREADY]):
        return _load_failed(model, failures, now_ms)
    if refusals[DRAINING] and not (refusals[EXCLUDED] or refusals[HAS_COPY]):
        detail = f"{what}: the instances that could hold it are draining"
        return NoPlacement("draining", detail, Code.UNAVAILABLE, RETRY_SOON_MS)
    said = ", ".join(f"{count} {reason}" for reason, count in sorted(refusals.items()))
    detail = f"{what}: no instance is left to try ({said})"
    if failures:
        detail += f"; last failure: {failures[0].message}"
    return NoPlacement("all_excluded", detail, Code.UNAVAILABLE, RETRY_SOON_MS)


def _load_failed(
    model: ModelRecord, failures: tuple[FailureRecord, ...], now_ms: int
) -> NoPlacement:
    """The last failure's cause and code; it may be tried again when the first one expires."""
    last = failures[0]
    code = Code.__members__.get(last.code, Code.FAILED_PRECONDITION)
    wait_ms = max(1, min(f.expires_at_ms for f in failures) - now_ms)
    detail = f"model {model.model_id!r} failed to load on {last.instance_id}: {last.message}"
    return NoPlacement(
        "load_failed", detail, code, retry_after_ms=wait_ms if code in RETRYABLE else None
    )


def _detail(
    view: ClusterView, winner: str, runner_up: str | None, reason: str, size_bytes: int
) -> str:
    def tell(instance_id: str) -> str:
        slot = view.instances[instance_id]
        return (
            f"{instance_id} ({slot.effective_free_bytes} of {slot.record.capacity_bytes} bytes "
            f"free, {slot.loads_in_progress} loading)"
        )

    told = f"{tell(winner)} for {size_bytes} bytes by {reason}"
    return told if runner_up is None else f"{told}; next {tell(runner_up)}"
