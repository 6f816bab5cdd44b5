"""Every threshold of the mesh in one place, with its unit and its reason.

``Policy`` checks itself: a value of the wrong kind, out of range, or at odds with another one
raises ``InvalidArgument`` that names the field, what was found and what is expected. ``overridden``
is how settings and the live ``config/policy`` change some of it. `mesh policy` shows the comments
above the fields (``mesh.policy_reasons`` reads them): they are written for operators.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Final

from mesh.core.errors import InvalidArgument


@dataclass(frozen=True, slots=True)
class Policy:
    """Thresholds. Units end the names; the comment is the reason for the default."""

    # A load that takes longer is recorded as failed: a 10 GB artifact at 100 MB/s and its session.
    load_timeout_ms: int = 180_000
    # How long a waiting request without a deadline waits in the router beyond the load time-out.
    queue_timeout_ms: int = 10_000
    # Requests that may wait for one model's load in one router; each retains up to one window.
    max_waiting_per_model: int = 1_024
    # Requests that may wait for loads in one router altogether (64 KiB each: 512 MiB at worst).
    max_waiting_total: int = 8_192
    # Copies that one request is sent to before its error is final (ModelMesh: 8 iterations), and
    # instances that one load, or one move of a drain, asks before it waits or is given up.
    hops_max: int = 4
    # Instances on which a failing model is tried before the failure is final until it expires.
    max_load_failures: int = 3
    # A recorded failure keeps a model off that instance for so long (ModelMesh: 15 min).
    load_failure_expiry_ms: int = 900_000
    # The same when the world was at fault (store unreachable, disk full): it may heal soon. An
    # instance that did not take a copy that the leader wants there is asked again within so long.
    transient_failure_expiry_ms: int = 30_000
    # An unknown model's size before its artifact has been seen (ModelMesh's adapters: 1 MB).
    default_model_size_bytes: int = 1_000_000
    # Share of capacity kept for models that are still being unloaded.
    unload_buffer_min_share: float = 0.01
    unload_buffer_max_share: float = 0.10
    # A load is rejected when it would evict a copy used within this age; 0 is no guard: a mesh
    # whose working set exceeds its memory is slow, but it answers.
    min_churn_age_ms: int = 0
    # A copy that somebody waited for is not evicted before its first request, for so long: those in
    # use cannot go, so it would be the one to go while its request is on the way.
    first_use_grace_ms: int = 250
    # Loads at once in one instance: fetching overlaps with building a session.
    load_slots: int = 2
    # A model's inference runs in the event loop while it takes at most so long (wire.md).
    inline_max_us: int = 150
    # ... and while the inline total of this turn of the loop stays below.
    inline_turn_max_us: int = 1_000
    # Requests at once on one copy when the model does not say.
    default_max_concurrency: int = 64
    # Requests that may wait for a concurrency slot on one copy before RESOURCE_EXHAUSTED.
    max_queued_per_copy: int = 1_024
    # Rows of the requests that one joined run answers at most, when the model does not say: beyond
    # that a row hardly gets cheaper. 0: requests are never joined.
    batch_rows_max: int = 64
    # A request is held so long for others when the model does not say: by default only what waits
    # anyway is joined.
    batch_wait_max_us: int = 0
    # When a joined run has ended, the next one waits for those who were just answered to ask again,
    # for this share of its time and theirs at most: else clients fall into two halves that take
    # turns, and a run of half the rows takes far more than half the time.
    batch_gather_share: float = 0.10
    # A joined run must save at least this share of a request's time: less is noise.
    batch_gain_min_share: float = 0.10
    # Requests of one trial whether joining pays: each of them waits for all to be run alone.
    batch_trial_requests: int = 8
    # It is tried again whether joining still pays after so many requests, later ever more rarely: a
    # trial costs a second run.
    batch_retrial_requests: int = 4_096
    # An instance's lease: a dead pod's copies vanish after this.
    instance_lease_ttl_ms: int = 10_000
    # An instance publishes itself at most this often, and at least this often when it changed.
    advert_min_interval_ms: int = 500
    advert_max_interval_ms: int = 40_000
    # Last-use instants go to the store in one blob an instance at this period.
    last_used_flush_ms: int = 240_000
    # The blob of an instance that is gone is kept while it tells of a use within this time: a model
    # that rests for longer is as good as unused, and a mesh that restarts daily keeps few blobs.
    last_used_keep_ms: int = 86_400_000
    # What one sweep of the leader deletes, unloads or seeks a place for at most, of each kind: one
    # transaction of the store.
    repair_batch_max: int = 100
    # Loads that one sweep of the leader starts at most: it must not fill every load slot.
    repair_loads_max: int = 16
    # An auto-delete model without an alias is left alone for so long: its alias may be on its way.
    # So are copies whose instance has no record: its lease may only have been lost.
    orphan_grace_ms: int = 60_000
    # The leader looks at aliases on their way and at what is to be repaired this often.
    leader_sweep_ms: int = 5_000

    # ---- waiting for a place ------------------------------------------------------------------
    # A request for which there is no place right now (no instance is ready, all memory is busy)
    # waits at most so long for one before it is refused: an instance restarts in less. A load waits
    # as long for memory of its instance, and is tried elsewhere then.
    placement_wait_ms: int = 10_000
    # ... or so long when pods of a runtime that could serve it are started on demand (from zero):
    # the image is pulled, the framework imported, the model fetched.
    runtime_start_wait_ms: int = 180_000
    # ... and looks again after so long at first, then twice as long each time, when nothing has
    # changed in the view before.
    placement_retry_ms: int = 50
    placement_retry_max_ms: int = 1_000

    # ---- placement ----------------------------------------------------------------------------
    # Instances whose free memory is at least this share of the most are about as good: one of them
    # is drawn. Adverts are half a second old; if every router took the best, all took the same.
    close_free_share: float = 0.75
    # The same for full ones, by the age of what would be evicted ...
    close_lru_share: float = 0.9
    # ... or by its worth, with more slack: where something worthless has just been loaded, the next
    # eviction is the cheapest of the mesh, and few instances would get every load (simulated:
    # 1.3 to 1.7 times the mean at 0.9, up to 1.26 at this; as many hits).
    close_score_share: float = 0.01
    # A replica set is taken for the next one of its group for so long after its first instance
    # came: in that time instances of older sets get new copies only when nobody else can hold them.
    replacement_window_ms: int = 1_200_000
    # An instance is hot when it answers more than so many requests a minute ...
    hot_requests_per_minute: int = 6_000
    # ... and more than so many times as many as the coolest candidate: others go before it.
    hot_factor: float = 1.5

    # ---- number of copies ---------------------------------------------------------------------
    # The instance that has held a model longest looks at its rate this often.
    scale_sweep_ms: int = 10_000
    # Requests a minute on one copy from which on there is one more (ModelMesh's threshold).
    scale_up_requests_per_minute: int = 2_000
    # Mean requests at once on one copy, as a share of its max_concurrency, from which on there is
    # one more: models that are slow rather than popular.
    scale_up_concurrency_share: float = 0.9
    # Nothing is added so soon after the last copy came: its effect has to be seen first.
    scale_up_cooldown_ms: int = 20_000
    # Copies of one model by rate, as a share of the instances that can hold it; two are always
    # fine.
    copies_max_share: float = 0.34
    # Copies that one decision adds at most; it never more than doubles them, since the rate of one
    # copy is a guess about the others.
    scale_up_copies_max: int = 8
    # Models whose copies one instance reads from the store in one look at its rates.
    scale_reads_max: int = 32
    # A second copy, against the loss of the first, for a model in regular use: used now, and before
    # that between these ages ago. Within the longer one every model's copies are counted anew.
    second_copy_min_age_ms: int = 420_000
    second_copy_max_age_ms: int = 2_400_000
    # ... where that costs nobody much: so much of the mesh is free, or what would be evicted has
    # rested for so long.
    second_copy_free_share: float = 0.10
    second_copy_lru_age_ms: int = 72_000_000
    # A copy beyond the first two goes when the others would carry its load at this share of the
    # threshold, and when none came or went for so long.
    scale_down_rate_share: float = 0.66
    scale_down_cooldown_ms: int = 80_000
    # A second copy goes when the model has not been used for so long ...
    second_copy_idle_ms: int = 3_600_000
    # ... or for so long when less than this share of the mesh is free.
    scale_down_free_share: float = 0.05
    second_copy_idle_short_ms: int = 600_000
    # A copy unused for so long is unloaded; 0: memory is used while nobody else wants it.
    idle_unload_ms: int = 0
    # Soft minimums may keep at most this share of the capacity; the most recently used come first.
    min_copies_capacity_share: float = 0.5

    # ---- proactive loading --------------------------------------------------------------------
    # The leader loads the most recently used models into free memory this often ...
    proactive_sweep_ms: int = 30_000
    # ... leaves this share of each instance free for what is asked for ...
    proactive_free_share: float = 0.125
    # ... has so many such loads under way in the whole mesh: the artifact store serves requests ...
    proactive_loads_max: int = 16
    # ... takes models used within this time ...
    proactive_recent_ms: int = 86_400_000
    # ... and none so soon after it has begun to lead: after a restart of everything, awaited loads
    # come first, and instances come back with what they had.
    proactive_quiet_ms: int = 10_000

    # ---- instances that do not answer ---------------------------------------------------------
    # A connection with calls on it that brought nothing for so long is asked by a PING ...
    ping_after_ms: int = 250
    # ... and without an answer in this time its instance is passed over and its calls go elsewhere.
    ping_timeout_ms: int = 750
    # Failures in a row (not answers of the model) after which an instance is passed over.
    outlier_failures: int = 5
    # It is passed over for so long, twice as long each time in a row, then one request is a probe.
    outlier_eject_ms: int = 1_000
    outlier_eject_max_ms: int = 30_000
    # Not more than this share of the instances is passed over for failures: then it is not they.
    outlier_share_max: float = 0.5
    # Retries may be this share of the requests of the last window, and so many in any case:
    # a few hundred calls in flight on one instance that dies, but no storm.
    retry_budget_share: float = 0.2
    retry_budget_min: int = 1_000
    retry_budget_window_ms: int = 10_000

    # ---- drain --------------------------------------------------------------------------------
    # A leaving instance has the copies that were used within this time loaded elsewhere first ...
    drain_recent_ms: int = 3_600_000
    # ... so many at once.
    drain_moves: int = 4

    # ---- eviction -----------------------------------------------------------------------------
    # "frequency" or "lru": see mesh/core/eviction.py. The simulator decided
    # (bench/results/sim-eviction.json): closer to the clairvoyant bound, never worse than LRU.
    eviction_order: str = "frequency"
    # Evicted models whose use an instance remembers: with 100,000 models on 100 instances each sees
    # a few thousand; one takes about half a kilobyte.
    evicted_remembered_max: int = 16_384
    # In the scores that routers send along with loads, uses are forgotten by half in this time; the
    # frequency order finds its own pace.
    use_half_life_ms: int = 3_600_000

    # ---- housekeeping -------------------------------------------------------------------------
    # An instance compares what stands in the store under its lease with what should, this often.
    audit_ms: int = 60_000
    # Decisions that a process remembers for `mesh explain --decisions`.
    decisions_kept: int = 1_000

    def unload_buffer_bytes(self, capacity_bytes: int) -> int:
        """What an instance keeps free by evicting ahead: what may be loading at once, within the
        two shares of its capacity."""
        low = int(capacity_bytes * self.unload_buffer_min_share)
        high = int(capacity_bytes * self.unload_buffer_max_share)
        return min(high, max(low, self.load_slots * self.default_model_size_bytes))

    def __post_init__(self) -> None:
        for item in fields(self):
            _check(item.name, str(item.type), getattr(self, item.name))
        for lower, upper in _ORDERED:
            low, high = getattr(self, lower), getattr(self, upper)
            if low > high:
                raise InvalidArgument(
                    f"policy.{lower}: expected at most {upper}, which is {high}; found {low}"
                )


# What one transaction of the store can hold (etcd's default).
_OPERATIONS_MAX: Final = 128
# Nobody means more: 30 years in milliseconds, a terabyte.
_WHOLE_MAX: Final = 10**12
# (least, most) where it is not what the name says: a share is 0 to 1, the rest at least 1.
_RANGES: Final[dict[str, tuple[float, float]]] = {
    # 0 switches it off, or means "at once" or "never".
    **dict.fromkeys(
        (
            *("queue_timeout_ms", "min_churn_age_ms", "first_use_grace_ms", "orphan_grace_ms"),
            *("load_failure_expiry_ms", "transient_failure_expiry_ms", "advert_min_interval_ms"),
            *("inline_max_us", "inline_turn_max_us", "max_queued_per_copy"),
            *("placement_wait_ms", "replacement_window_ms", "scale_up_cooldown_ms"),
            *("runtime_start_wait_ms",),
            *("second_copy_min_age_ms", "second_copy_max_age_ms", "second_copy_lru_age_ms"),
            *("scale_down_cooldown_ms", "second_copy_idle_ms", "second_copy_idle_short_ms"),
            *("idle_unload_ms", "proactive_recent_ms", "proactive_quiet_ms", "drain_recent_ms"),
            *("repair_loads_max", "proactive_loads_max", "retry_budget_min", "last_used_keep_ms"),
        ),
        (0, _WHOLE_MAX),
    ),
    "hops_max": (1, 64),
    "max_load_failures": (1, 64),
    "load_slots": (1, 64),
    "instance_lease_ttl_ms": (1_000, 3_600_000),  # etcd counts leases in whole seconds
    "batch_rows_max": (0, 4_096),
    "batch_wait_max_us": (0, 60_000_000),
    "batch_trial_requests": (2, 64),
    "repair_batch_max": (1, _OPERATIONS_MAX),
    "hot_factor": (1.0, 1_000.0),
    "drain_moves": (1, 1_000),
    "retry_budget_share": (0.0, 10.0),
    "decisions_kept": (1, 100_000),
}
_CHOICES: Final[dict[str, tuple[str, ...]]] = {"eviction_order": ("lru", "frequency")}
# The first is not above the second. Free memory at which second copies go stays below that at which
# they come: else they would come and go for ever.
_ORDERED: Final = (
    ("unload_buffer_min_share", "unload_buffer_max_share"),
    ("advert_min_interval_ms", "advert_max_interval_ms"),
    ("placement_retry_ms", "placement_retry_max_ms"),
    ("second_copy_min_age_ms", "second_copy_max_age_ms"),
    ("second_copy_idle_short_ms", "second_copy_idle_ms"),
    ("scale_down_free_share", "second_copy_free_share"),
    ("outlier_eject_ms", "outlier_eject_max_ms"),
)


def overridden(base: Policy, overrides: Mapping[str, object]) -> Policy:
    """``base`` with some fields changed. A whole number does for a share. Raises InvalidArgument
    that names the field; ``known_only`` takes away what it does not know."""
    known = {item.name: str(item.type) for item in fields(Policy)}
    changes: dict[str, object] = {}
    for name, value in overrides.items():
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else "`mesh policy` lists what there is"
            raise InvalidArgument(f"policy.{name}: there is no such threshold; {hint}")
        if known[name] == "float" and type(value) is int:
            value = float(value)
        changes[name] = value
    return replace(base, **changes)  # type: ignore[arg-type]  # checked by __post_init__


def known_only(overrides: Mapping[str, object]) -> tuple[dict[str, object], tuple[str, ...]]:
    """What this version knows of ``overrides``, and the other names, sorted: where versions run
    side by side, a newer one may have written them."""
    known = {item.name for item in fields(Policy)}
    taken = {name: value for name, value in overrides.items() if name in known}
    return taken, tuple(sorted(overrides.keys() - known))


def expected(name: str, kind: str) -> str:
    """What a field takes, for a person. ``kind`` is the text of its annotation."""
    if kind == "str":
        return "one of " + ", ".join(_CHOICES[name])
    least, most = _range(name, kind)
    if kind == "float":
        return f"a number from {least:g} to {most:g}"
    if most == _WHOLE_MAX:
        return f"a whole number from {least} to 10^12"
    return f"a whole number from {least} to {most}"


def _range(name: str, kind: str) -> tuple[float, float]:
    if found := _RANGES.get(name):
        return found
    return (0.0, 1.0) if kind == "float" else (1, _WHOLE_MAX)


def _check(name: str, kind: str, value: object) -> None:
    match kind, value:
        case "str", str():
            fits = value in _CHOICES[name]
        case ("int", bool()) | ("float", bool()):
            fits = False
        case ("int", int() as number) | ("float", (int() | float()) as number):
            least, most = _range(name, kind)
            fits = least <= number <= most  # neither nan nor infinity is
        case _:
            fits = False
    if not fits:
        raise InvalidArgument(f"policy.{name}: expected {expected(name, kind)}; found {value!r}")
