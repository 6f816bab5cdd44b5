"""Every Prometheus series of the mesh, declared once; the only importer of prometheus_client.

``SERIES`` is the whole list: name, labels, buckets and unit stand there and nowhere else, and a
series that is not in it cannot be recorded (KeyError that names what there is). Names, labels,
buckets and units are ModelMesh's where it has the series (``modelmesh_*``, milliseconds, counters
without ``_total``: its users' dashboards query them so), ours start with ``mesh_``.

The hit path records into plain ints and lists: no lock, no prometheus_client object. One thread
(the event loop) records; ``render`` runs in the same thread and turns the cells into families.

What bounds it: label values come from the client only as method names (unknown ones become
``other``) and, where per-model labels are switched on, as model names (``max_models`` pairs, then
``other``); any other label is capped at ``MAX_LABEL_SETS`` combinations a series. Recording never
fails for a label's value; it fails for a name or a number of labels that is not declared.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import accumulate
from typing import Final

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.exposition import generate_latest
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from mesh.core.errors import Code

OTHER: Final = "other"

# The text format that every Prometheus reads.
CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"

# Label combinations of one series beyond which everything else is counted as ``other``: reasons,
# outcomes and model types are short closed lists, so that reaching this is a defect elsewhere.
MAX_LABEL_SETS: Final = 256

# Request label sets that are found by one look-up; a client can invent prefixes of known method
# names, so that this is bounded. What does not fit is resolved again at each request.
MAX_FAST_KEYS: Final = 4_096

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
MODEL_BYTES_BUCKETS: Final = tuple(256 * 1024 * 4**n for n in range(8))

# Short names of the methods that have a ``method`` label of their own.
KNOWN_METHODS: Final = frozenset(
    {
        "ServerLive", "ServerReady", "ModelReady", "ServerMetadata", "ModelMetadata", "ModelInfer",
        "ModelStreamInfer", "ModelConfig", "ModelStatistics", "RepositoryIndex",
        "RepositoryModelLoad", "RepositoryModelUnload",
        "registerModel", "unregisterModel", "getModelStatus", "ensureLoaded", "setVModel",
        "deleteVModel", "getVModelStatus",
        "Check", "Watch", "ServerReflectionInfo",
        "Load", "Unload", "Describe", "Rest", "predict",
    }
)  # fmt: skip


class Kind(Enum):
    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


class Role(Enum):
    ROUTER = "router"
    INSTANCE = "instance"


_ROUTER: Final = frozenset({Role.ROUTER})
_INSTANCE: Final = frozenset({Role.INSTANCE})
_BOTH: Final = frozenset(Role)


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
           "Memory for models, without the unload buffer", _INSTANCE, "bytes"),
    _gauge("used_bytes", "modelmesh_instance_used_bytes",
           "Memory that models use or are promised", _INSTANCE, "bytes"),
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
    # Ours, both.
    _count("decisions", "mesh_decisions_total",
           "Decisions, by what was decided and why (mesh explain --decisions)", _BOTH,
           ("kind", "reason")),
    _gauge("inflight", "mesh_inflight_requests", "Requests in flight", _BOTH),
    _gauge("connections", "mesh_connections", "Open client connections", _BOTH),
    _gauge("store_connected", "mesh_store_connected",
           "1 while the store answers, 0 while the process works from its last view", _BOTH),
)  # fmt: skip

_BUILD: Final = Series(
    "build_info", "mesh_build_info", Kind.GAUGE, "1, with the software's version and the role",
    _BOTH, ("version", "role"),
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
    names = set(PROCESS_SERIES) | {_BUILD.name}
    for series in SERIES:
        if series.kind is Kind.HISTOGRAM:
            names |= {series.name + suffix for suffix in ("_bucket", "_sum", "_count")}
        else:
            names.add(series.name)
    return frozenset(names)


class Histogram:
    """Fixed buckets, no lock, one thread. ``observe`` is a bisect and two additions."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    @property
    def count(self) -> int:
        return sum(self.counts)

    def cumulative(self) -> list[tuple[str, float]]:
        """Prometheus's buckets: (upper bound as text, observations up to it), ``+Inf`` last."""
        texts = [repr(float(bound)) for bound in self.bounds]
        return list(zip([*texts, "+Inf"], accumulate(self.counts), strict=True))


_Labels = tuple[str, ...]


class _Recorder(Collector):
    """The cells of one process. Subclasses give the names that their process records."""

    role: Role
    request_histograms: tuple[str, ...]  # keys of those with ``method`` and ``code``

    def __init__(
        self,
        *,
        version: str = "",
        per_model: bool = False,
        max_models: int = 1_000,
        methods: Iterable[str] = (),
    ) -> None:
        """``methods``: further paths that get a ``method`` label (their short name) of their own.
        ``per_model``: ``modelId`` and ``vModelId`` on the histograms, ``max_models`` pairs of them.
        ``version``: the software's, for ``mesh_build_info``."""
        self._version = version
        self._per_model = per_model
        self._max_models = max_models
        self._known_methods = KNOWN_METHODS | {_short(name) for name in methods}
        self._models: set[tuple[str, str]] = set()
        self._request_cells: dict[tuple[str | int, ...], tuple[Histogram, ...]] = {}
        mine = [series for series in SERIES if self.role in series.roles]
        self._series = {series.key: series for series in mine}
        self._counters: dict[str, dict[_Labels, float]] = {}
        self._gauges: dict[str, float | Callable[[], float | None]] = {}
        self._histograms: dict[str, dict[_Labels, Histogram]] = {}
        for series in mine:
            if series.kind is Kind.COUNTER:
                # A counter without labels is there from the start, or its first increase is lost.
                self._counters[series.key] = {} if series.labels else {(): 0}
            elif series.kind is Kind.HISTOGRAM:
                empty = series.labels or per_model
                self._histograms[series.key] = {} if empty else {(): Histogram(series.buckets)}
        self._registry = CollectorRegistry()
        self._registry.register(self)
        ProcessCollector(registry=self._registry)

    # Recording.

    def counter(self, name: str, *labels: str) -> None:
        """Add 1 to a declared counter; ``labels`` are its label values in declared order."""
        try:
            self._counters[name][labels] += 1
        except KeyError:
            self._first_count(name, labels, 1)

    def add(self, name: str, amount: float, *labels: str) -> None:
        """Add ``amount`` (not negative) to a declared counter."""
        if amount < 0:
            raise ValueError(f"counter {name!r} cannot go down (amount {amount})")
        try:
            self._counters[name][labels] += amount
        except KeyError:
            self._first_count(name, labels, amount)

    def _first_count(self, name: str, labels: _Labels, amount: float) -> None:
        series = self._declared(name, Kind.COUNTER)
        if len(labels) != len(series.labels):
            raise ValueError(f"counter {name!r} has the labels {series.labels}, got {labels!r}")
        cells = self._counters[name]
        if len(cells) >= MAX_LABEL_SETS:
            labels = (OTHER,) * len(labels)
        cells[labels] = cells.get(labels, 0) + amount

    def observe(self, name: str, value: float, model_id: str = "", vmodel_id: str = "") -> None:
        """Record one value of a histogram without request labels (ms, or bytes as declared)."""
        labels: _Labels = self._model_labels(model_id, vmodel_id) if self._per_model else ()
        series = self._declared(name, Kind.HISTOGRAM)
        if series.labels:
            raise ValueError(f"histogram {name!r} has the labels {series.labels}: not for observe")
        self._histogram(series, labels).observe(value)

    def gauge(self, name: str, value: float | None) -> None:
        """Set a gauge; None takes it off the page (a leader that is one no more)."""
        self._declared(name, Kind.GAUGE)
        if value is None:
            self._gauges.pop(name, None)
        else:
            self._gauges[name] = value

    def gauge_source(self, name: str, read: Callable[[], float | None]) -> None:
        """Have ``read`` called at each scrape: costs the hit path nothing. None hides the gauge."""
        self._declared(name, Kind.GAUGE)
        self._gauges[name] = read

    # Reading.

    def render(self) -> tuple[bytes, str]:
        """(body, content type) of ``/metrics``, ``process_*`` included."""
        body = generate_latest(self._registry)
        for series in self._series.values():
            if series.kind is Kind.COUNTER and not series.name.endswith("_total"):
                # prometheus_client writes ``_total`` into the two header lines of any counter.
                for line in (b"# HELP ", b"# TYPE "):
                    bare = line + series.name.encode()
                    body = body.replace(bare + b"_total ", bare + b" ", 1)
        return body, CONTENT_TYPE

    def value(self, name: str, *labels: str) -> float:
        """What a counter, a gauge or a histogram's count stands at (0 when never recorded)."""
        kind = self._series[name].kind if name in self._series else None
        if kind is Kind.COUNTER:
            return self._counters[name].get(labels, 0)
        if kind is Kind.HISTOGRAM:
            found = self._histograms[name].get(labels)
            return 0 if found is None else found.count
        self._declared(name, Kind.GAUGE)
        return self._gauge_value(name) or 0.0

    def collect(self) -> Iterator[Metric]:
        build = GaugeMetricFamily(_BUILD.name, _BUILD.help, labels=_BUILD.labels)
        build.add_metric((self._version, self.role.value), 1)
        yield build
        for series in self._series.values():
            match series.kind:
                case Kind.COUNTER:
                    yield self._counter_family(series)
                case Kind.GAUGE:
                    value = self._gauge_value(series.key)
                    if value is not None:
                        yield GaugeMetricFamily(series.name, series.help, value=value)
                case Kind.HISTOGRAM:
                    yield self._histogram_family(series)

    def describe(self) -> Iterator[Metric]:
        """Nothing: registering must not call ``collect`` and with it the gauge sources."""
        return iter(())

    def _counter_family(self, series: Series) -> Metric:
        cells = self._counters[series.key]
        if series.name.endswith("_total"):
            family = CounterMetricFamily(series.name, series.help, labels=series.labels)
            for labels, value in cells.items():
                family.add_metric(labels, value)
            return family
        bare = Metric(series.name, series.help, "counter")
        for labels, value in cells.items():
            bare.add_sample(series.name, dict(zip(series.labels, labels, strict=True)), value)
        return bare

    def _histogram_family(self, series: Series) -> Metric:
        names = series.labels
        if self._per_model and series.per_model:
            names = (*names, "modelId", "vModelId")
        family = HistogramMetricFamily(series.name, series.help, labels=names)
        for labels, histogram in self._histograms[series.key].items():
            family.add_metric(labels, histogram.cumulative(), histogram.total)
        return family

    def _gauge_value(self, name: str) -> float | None:
        source = self._gauges.get(name)
        return source() if callable(source) else source

    def _declared(self, name: str, kind: Kind) -> Series:
        series = self._series.get(name)
        if series is None or series.kind is not kind:
            known = ", ".join(s.key for s in self._series.values() if s.kind is kind)
            raise KeyError(f"no {kind.value} {name!r} in a {self.role.value}; declared: {known}")
        return series

    # Labels.

    def _histogram(self, series: Series, labels: _Labels) -> Histogram:
        cells = self._histograms[series.key]
        found = cells.get(labels)
        if found is None:
            found = cells[labels] = Histogram(series.buckets)
        return found

    def _request_cell(
        self, method: str, code: int, model_id: str, vmodel_id: str
    ) -> tuple[Histogram, ...]:
        """The histograms of one label set, together: one look-up a request."""
        key = (method, code, model_id, vmodel_id) if self._per_model else (method, code)
        cell = self._request_cells.get(key)
        if cell is None:
            ids = self._model_labels(model_id, vmodel_id) if self._per_model else ()
            labels = (self._method_label(method), _code_label(code), *ids)
            cell = tuple(
                self._histogram(self._series[name], labels) for name in self.request_histograms
            )
            if len(self._request_cells) < MAX_FAST_KEYS:
                self._request_cells[key] = cell
        return cell

    def _method_label(self, method: str) -> str:
        short = _short(method)
        return short if short in self._known_methods else OTHER

    def _model_labels(self, model_id: str, vmodel_id: str) -> tuple[str, str]:
        pair = (model_id, vmodel_id)
        if pair not in self._models:
            if len(self._models) >= self._max_models:
                return (OTHER, OTHER)
            self._models.add(pair)
        return pair


def _short(method: str) -> str:
    return method.rpartition("/")[2]


def _code_label(code: int) -> str:
    try:
        return Code(code).name
    except ValueError:
        return Code.UNKNOWN.name


class RouterMetrics(_Recorder):
    """Series of a router process. Counters: hits, misses, retries (failure), retries_refused,
    placements (reason), errors (reason), loads_requested (outcome), decisions (kind, reason).
    Histogram for ``observe``: cache_miss (ms)."""

    role = Role.ROUTER
    request_histograms = ("api_request", "request_size", "response_size")

    def request_done(
        self,
        method: str,
        code: int,
        duration_ms: float,
        request_bytes: int,
        response_bytes: int,
        model_id: str = "",
        vmodel_id: str = "",
    ) -> None:
        """A client's request is over. ``method``: path or short name, ``code``: gRPC status."""
        duration, request, response = self._request_cell(method, code, model_id, vmodel_id)
        # ``observe`` three times, written out: this runs once a request on the router's one core.
        duration.counts[bisect_left(duration.bounds, duration_ms)] += 1
        duration.total += duration_ms
        request.counts[bisect_left(request.bounds, request_bytes)] += 1
        request.total += request_bytes
        response.counts[bisect_left(response.bounds, response_bytes)] += 1
        response.total += response_bytes


class InstanceMetrics(_Recorder):
    """Series of an instance process. Histograms for ``observe``: loadmodel, unloadmodel,
    req_queue_delay, loading_queue_delay, model_sizing, cache_miss (ms), loaded_model_size (bytes),
    age_at_eviction (ms). Counters: loads (model_type, outcome), evictions (reason), decisions
    (kind, reason), loadmodel_failure, unloadmodel_failure, unloadmodel_attempt_failure.
    ``used_bps`` follows from ``used_bytes`` and ``capacity_bytes``."""

    role = Role.INSTANCE
    request_histograms = ("invoke_model",)

    def invoke_done(
        self, method: str, code: int, duration_ms: float, model_id: str = "", vmodel_id: str = ""
    ) -> None:
        """An inference request is over. ``method``: path or short name, ``code``: gRPC status."""
        self.invoke_histogram(method, code, model_id, vmodel_id).observe(duration_ms)

    def invoke_histogram(
        self, method: str, code: int, model_id: str = "", vmodel_id: str = ""
    ) -> Histogram:
        """What ``invoke_done`` observes into, for who records the same thing very often."""
        return self._request_cell(method, code, model_id, vmodel_id)[0]

    def _gauge_value(self, name: str) -> float | None:
        if name != "used_bps":
            return super()._gauge_value(name)
        used, capacity = super()._gauge_value("used_bytes"), super()._gauge_value("capacity_bytes")
        return round(used * 10_000 / capacity) if used is not None and capacity else None
