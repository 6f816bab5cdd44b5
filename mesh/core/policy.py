"""Every threshold of the mesh in one place, with its unit and its reason."""

from __future__ import annotations

from dataclasses import dataclass


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
    # Copies that one request is sent to before its error is final (ModelMesh: 8 iterations).
    hops_max: int = 4
    # Instances on which a failing model is tried before the failure is final until it expires.
    max_load_failures: int = 3
    # A recorded failure keeps a model off that instance for so long (ModelMesh: 15 min).
    load_failure_expiry_ms: int = 900_000
    # The same when the world was at fault (store unreachable, disk full): it may heal soon.
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
    # What one sweep of the leader deletes or unloads at most: one transaction of the store.
    repair_batch_max: int = 100
    # Loads that one sweep of the leader starts at most: it must not fill every load slot.
    repair_loads_max: int = 16
    # An auto-delete model without an alias is left alone for so long: its alias may be on its way.
    orphan_grace_ms: int = 60_000
    # The leader looks at aliases on their way and at what is to be repaired this often.
    leader_sweep_ms: int = 5_000

    # ---- waiting for a place ------------------------------------------------------------------
    # A request for which there is no place right now (no instance is ready, all memory is busy)
    # waits at most so long for one before it is refused: an instance restarts in less.
    placement_wait_ms: int = 10_000
    # ... and looks again after so long at first, then twice as long each time, when nothing has
    # changed in the view before.
    placement_retry_ms: int = 50
    placement_retry_max_ms: int = 1_000

    # ---- placement ----------------------------------------------------------------------------
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
    # A second copy, against the loss of the first, for a model in regular use: used now, and before
    # that between these ages ago.
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
    # "frequency" or "lru": see mesh/core/eviction.py. The simulator decided (bench/results/sim).
    eviction_order: str = "lru"
    # Uses are forgotten by half in this time.
    use_half_life_ms: int = 3_600_000

    # ---- housekeeping -------------------------------------------------------------------------
    # An instance compares what stands in the store under its lease with what should, this often.
    audit_ms: int = 60_000
    # Decisions that a process remembers for `mesh explain --decisions`.
    decisions_kept: int = 1_000
