"""The options that more than one server command has: one flag, one variable, one help text.

Every flag of the two servers has a variable MESH_<FLAG>, which `variable` names. It decides
nothing; a value that cannot be read is a usage error.
"""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from mesh.cli.quantities import parse_duration_ms, parse_size


class LogLevel(str, Enum):  # noqa: UP042 - typer shows the values of a str enum
    debug = "debug"
    info = "info"
    warning = "warning"
    error = "error"


def size_bytes(text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def duration_ms(text: str) -> int:
    try:
        return parse_duration_ms(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def variable(name: str) -> str:
    return f"MESH_{name}"


EtcdOption = Annotated[
    list[str] | None,
    typer.Option(
        "--etcd", envvar=variable("ETCD"), metavar="HOST:PORT,...", help="etcd's endpoints."
    ),
]
PrefixOption = Annotated[
    str, typer.Option(envvar=variable("PREFIX"), help="First part of every key in etcd.")
]
NamespaceOption = Annotated[
    str, typer.Option(envvar=variable("NAMESPACE"), help="Second part: one mesh each.")
]
MetricsHostOption = Annotated[
    str, typer.Option(envvar=variable("METRICS_HOST"), help="Where /metrics and /readyz listen.")
]
MetricsPortOption = Annotated[
    int, typer.Option(min=0, max=65_535, envvar=variable("METRICS_PORT"), help="0: any free port.")
]
LogLevelOption = Annotated[LogLevel, typer.Option(envvar=variable("LOG_LEVEL"))]
TlsCertOption = Annotated[
    Path | None,
    typer.Option(
        "--tls-cert", envvar=variable("SERVER_TLS_CERT"), metavar="FILE", help="Listen with TLS."
    ),
]
TlsKeyOption = Annotated[
    Path | None, typer.Option("--tls-key", envvar=variable("SERVER_TLS_KEY"), metavar="FILE")
]
TlsClientCaOption = Annotated[
    Path | None,
    typer.Option(
        "--tls-client-ca",
        envvar=variable("SERVER_TLS_CLIENT_CA"),
        metavar="FILE",
        help="Only clients with a certificate of these authorities.",
    ),
]
CapacityOption = Annotated[
    Any,
    typer.Option(
        parser=size_bytes, metavar="SIZE", envvar=variable("CAPACITY"), help="Memory for models."
    ),
]
FileRootOption = Annotated[
    list[Path] | None,
    typer.Option(
        "--file-root",
        metavar="DIR",
        help="file:// URIs are allowed below this folder; repeatable.",
    ),
]
AllowPickleOption = Annotated[
    bool,
    typer.Option(
        "--allow-pickle",
        envvar=variable("ALLOW_PICKLE"),
        help="Load joblib and pickle files. They can run any code: only from who you trust.",
    ),
]
AllowPythonOption = Annotated[
    bool,
    typer.Option(
        "--allow-python",
        envvar=variable("ALLOW_PYTHON"),
        help="Load models that are a model.py. They are code: only from who you trust.",
    ),
]
IsolationOption = Annotated[
    list[str] | None,
    typer.Option(
        "--isolation",
        envvar=variable("ISOLATION"),
        metavar="FORMAT=process|none,...",
        help="Whether models of a format run in processes of their own; repeatable. Pickles, "
        "python and tensorflow do unless told otherwise.",
    ),
]
WorkerMemoryOption = Annotated[
    Any,
    typer.Option(
        "--worker-memory",
        parser=size_bytes,
        metavar="SIZE",
        envvar=variable("WORKER_MEMORY"),
        help="What the process of an isolated model may use; as much as --capacity unless told.",
    ),
]
ModelThreadsOption = Annotated[
    int,
    typer.Option(
        "--model-threads",
        min=1,
        max=1024,
        envvar=variable("MODEL_THREADS"),
        help="Threads of one inference, where the model does not say.",
    ),
]
DeviceOption = Annotated[
    str,
    typer.Option(
        "--device",
        envvar=variable("DEVICE"),
        metavar="cpu|cuda[:N]",
        help="Where PyTorch models run; --capacity is then that device's memory for models.",
    ),
]
ServingRuntimeOption = Annotated[
    Path | None,
    typer.Option(
        "--serving-runtime",
        envvar=variable("SERVING_RUNTIME"),
        metavar="FILE",
        help="A KServe ServingRuntime: the formats that are served, and the runtime behind it.",
    ),
]
AdapterOption = Annotated[
    str,
    typer.Option(
        "--adapter",
        envvar=variable("ADAPTER"),
        metavar="mlserver|triton",
        help="Serve models in such a server beside the pod, by its repository API.",
    ),
]
RuntimeEndpointOption = Annotated[
    str,
    typer.Option(
        "--runtime-endpoint",
        envvar=variable("RUNTIME_ENDPOINT"),
        metavar="unix:/PATH|HOST:PORT",
        help="An external runtime, if it is not where its ServingRuntime says.",
    ),
]
RuntimeDataEndpointOption = Annotated[
    str,
    typer.Option(
        "--runtime-data-endpoint",
        envvar=variable("RUNTIME_DATA_ENDPOINT"),
        metavar="unix:/PATH|HOST:PORT",
        help="Where its inference is.",
    ),
]
StorageConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--storage-config",
        envvar=variable("STORAGE_CONFIG"),
        metavar="DIR",
        help="KServe's storage-config: a folder with one JSON file a storage key.",
    ),
]
CacheSizeOption = Annotated[
    Any,
    typer.Option(
        parser=size_bytes,
        metavar="SIZE",
        envvar=variable("CACHE_SIZE"),
        help="Disk for fetched artifacts.",
    ),
]
DataplaneOption = Annotated[
    str,
    typer.Option(
        "--dataplane-config",
        envvar=[
            variable("DATAPLANE_CONFIG"),
            "MM_DATAPLANE_CONFIG",
            "MM_DATAPLANE_CONFIG_PATH",
        ],
        metavar="FILE",
        help="ModelMesh's DataplaneApiConfig: the methods of clients, and where they name a model.",
    ),
]
PullRateOption = Annotated[
    Any,
    typer.Option(
        "--pull-rate",
        parser=size_bytes,
        metavar="SIZE",
        envvar=variable("PULL_RATE"),
        help="Bytes a second that all fetches together may read, such as 100MiB; no limit unless "
        "told.",
    ),
]
PerModelMetricsOption = Annotated[
    bool,
    typer.Option(
        "--per-model-metrics",
        envvar=variable("PER_MODEL_METRICS"),
        help="A label with the model's name on the metrics: costs memory with many models.",
    ),
]
MessageSizeOption = Annotated[
    Any,
    typer.Option(
        "--max-message-size",
        parser=size_bytes,
        metavar="SIZE",
        envvar=variable("MAX_MESSAGE_SIZE"),
        help="The largest request or reply.",
    ),
]
FailureExpiryOption = Annotated[
    Any,
    typer.Option(
        "--failure-expiry",
        parser=duration_ms,
        metavar="DURATION",
        envvar=variable("FAILURE_EXPIRY"),
        help="A model that failed to load is tried again after so long; after 30s at most where "
        "the store or the disk was at fault.",
    ),
]
PolicyOption = Annotated[
    list[str] | None,
    typer.Option(
        "--policy",
        envvar=variable("POLICY"),
        metavar="NAME=VALUE,...",
        help="Set a threshold for this process; repeatable. `mesh policy -o wide` lists them with "
        "their reasons; `mesh policy set` changes them in a running mesh and wins.",
    ),
]
