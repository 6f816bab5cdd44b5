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
