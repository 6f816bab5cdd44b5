"""The list of all Prometheus series: names, labels, buckets and units stand here and nowhere else.

Names, labels, buckets and units are ModelMesh's where it has the series (``modelmesh_*``,
milliseconds, counters without ``_total``: its users' dashboards query them so), ours start with
``mesh_``. Nothing is recorded here: ``mesh.metrics`` does that.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Final

MS_BUCKETS: Final = (
    0.5, 1, 2, 5, 10, 20, 50, 75, 100, 200, 500, 1_000, 2_000, 5_000, 10_000, 20_000, 60_000,
    120_000, 300_000,
)  # fmt: skip
# 30 s, 5 min, 15 min, 1 h, 4 h, 12 h, 1 d, 7 d, 30 d, 90 d.
AGE_MS_BUCKETS: Final = tuple(
    seconds * 1_000
    for seconds in (
        30, 300, 900, 3_600, 14_400, 43_200, 86_400, 604_800, 2_592_000, 7_776_000,
    )
)  # fmt: skip
MESSAGE_BYTES_BUCKETS: Final = tuple(128 * 4**n for n in range(8))
BATCH_BUCKETS: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
MODEL_BYTES_BUCKETS: Final = tuple(256 * 1024 * 4**n for n in range(8))


class Kind(Enum):
    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


class Role(Enum):
    ROUTER = "router"
    INSTANCE = "instance"
    CONTROLLER = "controller"


_ROUTER: Final = frozenset({Role.ROUTER})
_INSTANCE: Final = frozenset({Role.INSTANCE})
_BOTH: Final = _ROUTER | _INSTANCE
_CONTROLLER: Final = frozenset({Role.CONTROLLER})
_ALL: Final = frozenset(Role)


@dataclass(frozen=True, slots=True)
class Series:
    """One series. ``key`` is what code records under, ``name`` what stands on the page."""

    key: str
    name: str
    kind: Kind
    help: str
    roles: frozenset[Role]
    labels: tuple[str, ...] = ()
    unit: str = ""
    buckets: tuple[float, ...] = ()
    # Gets ``modelId`` and ``vModelId`` when per-model metrics are on (ModelMesh's rule: its
    # histograms do, its counters and gauges do not).
    per_model: bool = False


def _timing(
    key: str, name: str, text: str, roles: frozenset[Role], labels: tuple[str, ...] = ()
) -> Series:
    return Series(
        key, name, Kind.HISTOGRAM, text, roles, labels, "milliseconds", MS_BUCKETS, per_model=True
    )


def _bytes(
    key: str,
    name: str,
    text: str,
    roles: frozenset[Role],
    buckets: tuple[float, ...],
    labels: tuple[str, ...] = (),
) -> Series:
    return Series(key, name, Kind.HISTOGRAM, text, roles, labels, "bytes", buckets, per_model=True)


def _count(
    key: str, name: str, text: str, roles: frozenset[Role], labels: tuple[str, ...] = ()
) -> Series:
    return Series(key, name, Kind.COUNTER, text, roles, labels)


def _gauge(key: str, name: str, text: str, roles: frozenset[Role], unit: str = "") -> Series:
    return Series(key, name, Kind.GAUGE, text, roles, unit=unit)


_REQUEST: Final = ("method", "code")

SERIES: Final[tuple[Series, ...]] = (
    # ModelMesh's, requests.
    _timing("api_request", "modelmesh_api_request_milliseconds",
            "Time from a client's request to the end of its answer", _ROUTER, _REQUEST),
    _bytes("request_size", "modelmesh_request_size_bytes", "Size of a request's messages",
           _ROUTER, MESSAGE_BYTES_BUCKETS, _REQUEST),
    _bytes("response_size", "modelmesh_response_size_bytes", "Size of a response's messages",
           _ROUTER, MESSAGE_BYTES_BUCKETS, _REQUEST),
    _timing("invoke_model", "modelmesh_invoke_model_milliseconds",
            "Time that an instance took to answer an inference request", _INSTANCE, _REQUEST),
    _timing("cache_miss", "modelmesh_cache_miss_milliseconds",
            "Time that a request waited because its model was not loaded", _BOTH),
    _timing("req_queue_delay", "modelmesh_req_queue_delay_milliseconds",
            "Time that a request waited for a concurrency slot of its copy", _INSTANCE),
    # ModelMesh's, copies.
    _timing("loadmodel", "modelmesh_loadmodel_milliseconds",
            "Time taken to load a model, pulling included", _INSTANCE),
    _timing("unloadmodel", "modelmesh_unloadmodel_milliseconds",
            "Time taken to unload a model", _INSTANCE),
    _timing("loading_queue_delay", "modelmesh_loading_queue_delay_milliseconds",
            "Time that a load waited for a slot and for memory", _INSTANCE),
    _timing("model_sizing", "modelmesh_model_sizing_milliseconds",
            "Time taken to measure a loaded model's size", _INSTANCE),
    _bytes("loaded_model_size", "modelmesh_loaded_model_size_bytes",
           "Measured size of a model when it had loaded", _INSTANCE, MODEL_BYTES_BUCKETS),
    Series("age_at_eviction", "modelmesh_age_at_eviction_milliseconds", Kind.HISTOGRAM,
           "Time since the last use of a model when it was evicted", _INSTANCE,
           unit="milliseconds", buckets=AGE_MS_BUCKETS, per_model=True),
    _count("loadmodel_failure", "modelmesh_loadmodel_failure", "Loads that failed", _INSTANCE),
    _count("unloadmodel_failure", "modelmesh_unloadmodel_failure",
           "Unloads that failed, several attempts counted once", _INSTANCE),
    _count("unloadmodel_attempt_failure", "modelmesh_unloadmodel_attempt_failure",
           "Attempts to unload that failed", _INSTANCE),
    # ModelMesh's, of the whole mesh: only the elected leader exposes them.
    _gauge("models_loaded", "modelmesh_models_loaded_total",
           "Models with at least one loaded copy", _ROUTER),
    _gauge("models_with_failure", "modelmesh_models_with_failure_total",
           "Models with at least one load failure that has not expired", _ROUTER),
    _gauge("models_managed", "modelmesh_models_managed_total", "Registered models", _ROUTER),
    # ModelMesh's, of one instance.
    _gauge("lru_seconds", "modelmesh_instance_lru_seconds",
           "Last use (Unix epoch) of the model that would be evicted first", _INSTANCE, "seconds"),
    _gauge("lru_age_seconds", "modelmesh_instance_lru_age_seconds",
           "Time since the last use of the model that would be evicted first", _INSTANCE,
           "seconds"),
    _gauge("capacity_bytes", "modelmesh_instance_capacity_bytes",
           "Memory for models", _INSTANCE, "bytes"),
    _gauge("used_bytes", "modelmesh_instance_used_bytes",
           "Memory that models use or are promised, until they are really gone", _INSTANCE,
           "bytes"),
    _gauge("used_bps", "modelmesh_instance_used_bps",
           "Share of the capacity in use, in basis points", _INSTANCE),
    _gauge("models_total", "modelmesh_instance_models_total", "Loaded copies", _INSTANCE),
    # Ours, the router.
    _count("hits", "mesh_hits_total", "Requests whose model had a loaded copy", _ROUTER),
    _count("misses", "mesh_misses_total", "Requests that had to wait for a load", _ROUTER),
    _count("retries", "mesh_retries_total",
           "Attempts that were made again elsewhere, by what went wrong", _ROUTER, ("failure",)),
    _count("placements", "mesh_placements_total",
           "Decisions where to load, by their reason", _ROUTER, ("reason",)),
    _count("errors", "mesh_errors_total",
           "Requests that the router itself answered with an error, by reason", _ROUTER,
           ("reason",)),
    _count("loads_requested", "mesh_loads_requested_total",
           "Loads asked of instances, by outcome", _ROUTER, ("outcome",)),
    _count("retries_refused", "mesh_retries_refused_total",
           "Attempts that were not made again because the retry budget was used up", _ROUTER),
    _gauge("retry_budget", "mesh_retry_budget", "Retries that the budget allows now", _ROUTER),
    _gauge("ejected", "mesh_ejected_instances",
           "Instances that the router passes over because they do not answer", _ROUTER),
    _gauge("shortfall", "mesh_shortfall_copies",
           "Copies that minimums lack, told by the elected leader only", _ROUTER),
    _gauge("waiting", "mesh_waiting_requests",
           "Requests that wait for a load, or for an instance to answer again", _ROUTER),
    _gauge("route_models", "mesh_route_table_models", "Models in the route table", _ROUTER),
    _gauge("route_copies", "mesh_route_table_copies", "Loaded copies in the route table", _ROUTER),
    _gauge("instances", "mesh_instances", "Instances that the router knows", _ROUTER),
    _gauge("view_revision", "mesh_view_revision",
           "Store revision that the view of the mesh stands at", _ROUTER),
    _gauge("leader", "mesh_leader", "1 on the elected leader, else 0", _ROUTER),
    _gauge("buffered_bytes", "mesh_buffered_bytes",
           "Bytes of requests and replies that are held", _ROUTER, "bytes"),
    # Ours, the instance.
    _count("loads", "mesh_loads_total", "Loads that ended, by format and outcome", _INSTANCE,
           ("model_type", "outcome")),
    _count("evictions", "mesh_evictions_total", "Copies that were dropped, by reason", _INSTANCE,
           ("reason",)),
    _gauge("loading", "mesh_loading_models", "Loads under way", _INSTANCE),
    _gauge("queued", "mesh_queued_requests", "Requests that wait for a concurrency slot",
           _INSTANCE),
    Series("batch_size", "mesh_batch_size", Kind.HISTOGRAM,
           "Rows of one run of a model whose requests are joined", _INSTANCE,
           buckets=BATCH_BUCKETS, per_model=True),
    # Ours, both.
    _count("decisions", "mesh_decisions_total",
           "Decisions, by what was decided and why (mesh explain --decisions)", _BOTH,
           ("kind", "reason")),
    _gauge("inflight", "mesh_inflight_requests", "Requests in flight", _BOTH),
    _gauge("connections", "mesh_connections", "Open client connections", _BOTH),
    _gauge("store_connected", "mesh_store_connected",
           "1 while the store answers, 0 while the process works from its last view", _ALL),
    # Ours, the controller.
    _count("reconciles", "mesh_controller_reconciles_total",
           "Objects that were reconciled, by kind and outcome", _CONTROLLER, ("kind", "outcome")),
    _count("actions", "mesh_controller_actions_total",
           "Actions that were carried out, by what they were", _CONTROLLER, ("action",)),
    _gauge("api_writes", "mesh_controller_api_writes_total",
           "Writes sent to the API server", _CONTROLLER),
    _gauge("queue", "mesh_controller_queue_depth",
           "Objects that wait to be reconciled, or are being", _CONTROLLER),
    _gauge("backing_off", "mesh_controller_delayed_objects",
           "Objects that are looked at again at a later time", _CONTROLLER),
    _gauge("services", "mesh_controller_services", "InferenceServices and Predictors known",
           _CONTROLLER),
    _gauge("meshes", "mesh_controller_meshes", "Namespaces with a mesh", _CONTROLLER),
    _gauge("controller_leader", "mesh_controller_leader",
           "1 on the elected controller, else 0", _CONTROLLER),
)  # fmt: skip

BUILD: Final = Series(
    "build_info", "mesh_build_info", Kind.GAUGE, "1, with the software's version and the role",
    _ALL, ("version", "role"),
)  # fmt: skip

# What ``ProcessCollector`` adds, so that the check of dashboards and rules knows these names too.
PROCESS_SERIES: Final = frozenset(
    {
        "process_virtual_memory_bytes", "process_resident_memory_bytes",
        "process_start_time_seconds", "process_cpu_seconds_total", "process_open_fds",
        "process_max_fds",
    }
)  # fmt: skip


def exposed_names() -> frozenset[str]:
    """Every sample name that a scrape of any process can hold; ``up`` is Prometheus's own."""
    names = set(PROCESS_SERIES) | {BUILD.name}
    for series in SERIES:
        if series.kind is Kind.HISTOGRAM:
            names |= {series.name + suffix for suffix in ("_bucket", "_sum", "_count")}
        else:
            names.add(series.name)
    return frozenset(names)
