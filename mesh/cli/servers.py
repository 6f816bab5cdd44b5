"""`mesh up`, `mesh router`, `mesh instance`: command lines turned into settings, and run.

The environment is read here and nowhere else: every flag of the two servers has a variable
MESH_<FLAG>, and the stores' usual ones (AWS_*, AZURE_*, ...) are handed to the puller. Mesh's own
words for a wrong setting become a usage error (exit 2): for `mesh up`, a restart cannot help.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from mesh.cli.etcd_choice import EtcdConnectionOption, choose_etcd
from mesh.cli.exits import CommandError, Exit
from mesh.cli.server_options import (
    AdapterOption,
    AllowPickleOption,
    AllowPythonOption,
    CacheSizeOption,
    CapacityOption,
    DataplaneOption,
    DeviceOption,
    EtcdOption,
    FailureExpiryOption,
    FileRootOption,
    IsolationOption,
    LogLevel,
    LogLevelOption,
    MessageSizeOption,
    MetricsHostOption,
    MetricsPortOption,
    ModelThreadsOption,
    NamespaceOption,
    PerModelMetricsOption,
    PolicyOption,
    PrefixOption,
    PullRateOption,
    RuntimeDataEndpointOption,
    RuntimeEndpointOption,
    ServingRuntimeOption,
    StorageConfigOption,
    TlsCertOption,
    TlsClientCaOption,
    TlsKeyOption,
    WorkerMemoryOption,
    duration_ms,
    size_bytes,
    variable,
)
from mesh.core.errors import MeshError

if TYPE_CHECKING:
    from mesh.core.policy import Policy

COMMANDS: Final = ("up", "router", "instance")


def add_to(app: typer.Typer) -> None:
    app.command()(up)
    app.command()(router)
    app.command()(instance)


def up(
    context: typer.Context,
    instances: Annotated[int, typer.Option(min=1, max=1000, help="Serving pods.")] = 2,
    models: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Keep in step with this folder of manifests, or of models."
        ),
    ] = None,
    data_dir: Annotated[
        Path, typer.Option(metavar="DIR", help="State that outlives a restart, and logs.")
    ] = Path(".mesh"),
    host: Annotated[str, typer.Option(help="Where gRPC, REST and metrics listen.")] = "127.0.0.1",
    grpc_port: Annotated[
        int, typer.Option(min=0, max=65_535, help="The routers' gRPC; 0: any free port.")
    ] = 8033,
    rest_port: Annotated[
        int, typer.Option(min=0, max=65_535, help="The routers' REST; 0: any free port.")
    ] = 8008,
    metrics_port: Annotated[
        int,
        typer.Option(
            min=0,
            max=65_535,
            help="First of the metrics ports: routers, then instances; 0: any free ones.",
        ),
    ] = 2112,
    etcd: Annotated[
        list[str] | None,
        typer.Option("--etcd", metavar="ENDPOINTS", help="Use this etcd; none is started."),
    ] = None,
    etcd_connection: EtcdConnectionOption = None,
    capacity: Annotated[
        Any,
        typer.Option(parser=size_bytes, metavar="SIZE", help="Each instance's memory for models."),
    ] = "1GiB",
    routers: Annotated[
        int, typer.Option(min=1, max=64, help="Router processes, all on the same ports.")
    ] = 1,
    tls_cert: TlsCertOption = None,
    tls_key: TlsKeyOption = None,
    tls_client_ca: TlsClientCaOption = None,
    file_root: FileRootOption = None,
    allow_pickle: AllowPickleOption = False,
    allow_python: AllowPythonOption = False,
    isolation: IsolationOption = None,
    worker_memory: WorkerMemoryOption = None,
    model_threads: ModelThreadsOption = 1,
    device: DeviceOption = "cpu",
    serving_runtime: ServingRuntimeOption = None,
    storage_config: StorageConfigOption = None,
    cache_size: CacheSizeOption = "20GiB",
    pull_rate: PullRateOption = None,
    failure_expiry: FailureExpiryOption = "15m",
    policy: PolicyOption = None,
    max_message_size: MessageSizeOption = "16MiB",
    per_model_metrics: PerModelMetricsOption = False,
    prefix: PrefixOption = "mesh",
    namespace: NamespaceOption = "default",
    log_level: LogLevelOption = LogLevel.info,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Show every line of the children.")
    ] = False,
) -> None:
    """A whole mesh on this machine: etcd, routers and instances, watched over until Ctrl-C."""
    from mesh.cli.up_front import CommandLineFront
    from mesh.up.layout import UpRefused
    from mesh.up.run import run_up
    from mesh.up.settings import UpSettings

    check_tls(tls_cert, tls_key, tls_client_ca)
    check_folders(file_root, storage_config, serving_runtime)
    isolation_of(isolation)
    policy_from(failure_expiry, policy)  # a wrong one is named here, and not by every child
    chosen = None
    if etcd or etcd_connection is not None:
        chosen = choose_etcd(context, etcd, etcd_connection, prefix)
    both_flags = (
        *("--max-message-size", str(max_message_size)),
        *("--failure-expiry", f"{failure_expiry}ms"),
        *(part for text in policy or () for part in ("--policy", text)),
        *(("--per-model-metrics",) if per_model_metrics else ()),
    )
    settings = UpSettings(
        data_dir=data_dir,
        instances=instances,
        routers=routers,
        models=models,
        host=host,
        grpc_port=grpc_port,
        rest_port=rest_port,
        metrics_port=metrics_port,
        etcd=chosen.options.endpoints if chosen is not None else (),
        etcd_connection=chosen.file if chosen is not None else None,
        prefix=prefix,
        namespace=namespace,
        capacity_bytes=capacity,
        file_roots=tuple(file_root or ()),
        storage_config=storage_config,
        router_flags=(
            *_flag("--tls-cert", tls_cert),
            *_flag("--tls-key", tls_key),
            *_flag("--tls-client-ca", tls_client_ca),
            *both_flags,
        ),
        instance_flags=(
            *(("--allow-pickle",) if allow_pickle else ()),
            *(("--allow-python",) if allow_python else ()),
            *(part for text in isolation or () for part in ("--isolation", text)),
            *(("--worker-memory", str(worker_memory)) if worker_memory else ()),
            *("--model-threads", str(model_threads)),
            *("--device", device),
            *_flag("--serving-runtime", serving_runtime),
            *("--cache-size", str(cache_size)),
            *(("--pull-rate", str(pull_rate)) if pull_rate else ()),
            *both_flags,
        ),
        log_level=log_level.value,
        verbose=verbose,
    )
    try:
        status = run_up(
            settings, CommandLineFront(tls_cert, tls_key, mutual=tls_client_ca is not None)
        )
    except UpRefused as error:
        raise CommandError(str(error)) from error
    raise typer.Exit(status)


def router(
    context: typer.Context,
    etcd: EtcdOption = None,
    etcd_connection: EtcdConnectionOption = None,
    host: Annotated[str, typer.Option(envvar=variable("HOST"))] = "127.0.0.1",
    grpc_port: Annotated[int, typer.Option(min=0, max=65_535, envvar=variable("GRPC_PORT"))] = 8033,
    rest_port: Annotated[int, typer.Option(min=0, max=65_535, envvar=variable("REST_PORT"))] = 8008,
    metrics_host: MetricsHostOption = "127.0.0.1",
    metrics_port: MetricsPortOption = 2112,
    prefix: PrefixOption = "mesh",
    namespace: NamespaceOption = "default",
    tls_cert: TlsCertOption = None,
    tls_key: TlsKeyOption = None,
    tls_client_ca: TlsClientCaOption = None,
    failure_expiry: FailureExpiryOption = "15m",
    policy: PolicyOption = None,
    max_message_size: MessageSizeOption = "16MiB",
    per_model_metrics: PerModelMetricsOption = False,
    dataplane_config: DataplaneOption = "",
    name: Annotated[
        str, typer.Option(envvar=variable("ROUTER_NAME"), help="Start of the router's id.")
    ] = "router",
    log_level: LogLevelOption = LogLevel.info,
) -> None:
    """One router, against an etcd that is already there."""
    from dataclasses import replace

    from mesh.wire.limits import INSIDE, PUBLIC
    from router.process import main
    from router.settings import RouterSettings, TlsFiles

    check_tls(tls_cert, tls_key, tls_client_ca)
    chosen = choose_etcd(context, etcd, etcd_connection, prefix)
    tls = TlsFiles(tls_cert, tls_key, tls_client_ca) if tls_cert and tls_key else None
    try:
        settings = RouterSettings(
            host=host,
            grpc_port=grpc_port,
            rest_port=rest_port,
            metrics_host=metrics_host,
            metrics_port=metrics_port,
            etcd=chosen.options,
            prefix=chosen.prefix,
            namespace=namespace,
            name=name,
            tls=tls,
            per_model_metrics=per_model_metrics,
            dataplane_config=dataplane_config,
            software_version=software_version(),
            policy=policy_from(failure_expiry, policy),
            limits=replace(PUBLIC, max_message_bytes=max_message_size),
            inside_limits=replace(INSIDE, max_message_bytes=max_message_size),
        )
    except ValueError as error:
        raise CommandError(str(error), Exit.USAGE) from error
    set_up_logging(log_level)
    chosen.log_warnings()
    try:
        status = main(settings)
    except MeshError as error:
        raise CommandError(error.message, Exit.USAGE) from error
    except OSError as error:
        raise CommandError(f"cannot listen: {error}") from error
    raise typer.Exit(status)


def instance(
    context: typer.Context,
    etcd: EtcdOption = None,
    etcd_connection: EtcdConnectionOption = None,
    host: Annotated[
        str, typer.Option(envvar=variable("INSTANCE_HOST"), help="Where routers reach it.")
    ] = "127.0.0.1",
    grpc_port: Annotated[
        int,
        typer.Option(min=0, max=65_535, envvar=variable("INSTANCE_PORT"), help="0: any free port."),
    ] = 0,
    advertise: Annotated[
        str,
        typer.Option(
            envvar=variable("ADVERTISE"),
            metavar="HOST",
            help="What routers connect to, if not --host.",
        ),
    ] = "",
    metrics_host: MetricsHostOption = "127.0.0.1",
    metrics_port: MetricsPortOption = 0,
    capacity: CapacityOption = "1GiB",
    prefix: PrefixOption = "mesh",
    namespace: NamespaceOption = "default",
    name: Annotated[
        str, typer.Option(envvar=variable("INSTANCE_NAME"), help="Start of the instance's id.")
    ] = "instance",
    zone: Annotated[
        str, typer.Option(envvar=variable("ZONE"), help="Copies are spread over zones.")
    ] = "",
    label: Annotated[
        list[str] | None,
        typer.Option(
            "--label",
            "--labels",
            envvar=variable("LABELS"),
            metavar="LABEL,...",
            help="What this instance has, for models and formats that ask for it; repeatable.",
        ),
    ] = None,
    group: Annotated[
        str,
        typer.Option(envvar=variable("GROUP"), help="The deployment that it belongs to."),
    ] = "",
    replica_set: Annotated[
        str,
        typer.Option(
            envvar=variable("REPLICA_SET"),
            help="That deployment's generation: instances of older ones are about to be replaced.",
        ),
    ] = "",
    file_root: FileRootOption = None,
    allow_pickle: AllowPickleOption = False,
    allow_python: AllowPythonOption = False,
    isolation: IsolationOption = None,
    worker_memory: WorkerMemoryOption = None,
    model_threads: ModelThreadsOption = 1,
    device: DeviceOption = "cpu",
    serving_runtime: ServingRuntimeOption = None,
    adapter: AdapterOption = "",
    runtime_endpoint: RuntimeEndpointOption = "",
    runtime_data_endpoint: RuntimeDataEndpointOption = "",
    storage_config: StorageConfigOption = None,
    cache_dir: Annotated[
        Path,
        typer.Option(envvar=variable("CACHE_DIR"), metavar="DIR", help="For fetched artifacts."),
    ] = Path(".mesh/cache/instance"),
    cache_size: CacheSizeOption = "20GiB",
    pull_rate: PullRateOption = None,
    load_timeout: Annotated[
        Any,
        typer.Option(
            parser=duration_ms,
            metavar="DURATION",
            envvar=variable("LOAD_TIMEOUT"),
            help="A load that takes longer has failed.",
        ),
    ] = "3m",
    load_slots: Annotated[
        int, typer.Option(min=1, max=64, envvar=variable("LOAD_SLOTS"), help="Loads at once.")
    ] = 2,
    threads: Annotated[
        int, typer.Option(min=1, max=1024, envvar=variable("THREADS"), help="Inferences at once.")
    ] = 4,
    failure_expiry: FailureExpiryOption = "15m",
    policy: PolicyOption = None,
    max_message_size: MessageSizeOption = "16MiB",
    per_model_metrics: PerModelMetricsOption = False,
    log_level: LogLevelOption = LogLevel.info,
) -> None:
    """One serving pod, against an etcd that is already there."""
    from dataclasses import replace

    from mesh.instance.process import serve
    from mesh.instance.settings import InstanceSettings
    from mesh.runtimes.settings import RuntimeSettings
    from mesh.runtimes.v2_repository import VARIABLES
    from mesh.wire.limits import INSIDE
    from puller.settings import PullerSettings, store_variables

    check_folders(file_root, storage_config, serving_runtime)
    chosen = choose_etcd(context, etcd, etcd_connection, prefix)
    roots = [root.resolve() for root in (file_root or environment_roots())]
    try:
        settings = InstanceSettings(
            puller=PullerSettings(
                cache_dir=cache_dir,
                cache_capacity_bytes=cache_size,
                file_roots=tuple(roots),
                storage_config_dir=storage_config,
                store_env=store_variables(os.environ),
                rate_bytes_per_s=pull_rate or 0,
            ),
            host=host,
            port=grpc_port,
            advertised_host=advertise,
            metrics_host=metrics_host,
            metrics_port=metrics_port,
            capacity_bytes=capacity,
            etcd=chosen.options,
            prefix=chosen.prefix,
            namespace=namespace,
            name=name,
            runtimes=RuntimeSettings(
                intra_op_threads=model_threads,
                allow_pickle=allow_pickle,
                allow_python=allow_python,
                isolation=isolation_of(isolation),
                device=device,
            ),
            worker_memory_bytes=worker_memory or 0,
            serving_runtime=serving_runtime,
            adapter=adapter,
            runtime_endpoint=runtime_endpoint,
            runtime_data_endpoint=runtime_data_endpoint,
            adapter_env={k: v for k, v in os.environ.items() if k in VARIABLES},
            inference_threads=threads,
            zone=zone,
            labels=tuple(
                one.strip() for text in label or () for one in text.split(",") if one.strip()
            ),
            group=group,
            replica_set=replica_set,
            per_model_metrics=per_model_metrics,
            software_version=software_version(),
            policy=policy_from(
                failure_expiry, policy, load_timeout_ms=load_timeout, load_slots=load_slots
            ),
            limits=replace(INSIDE, max_message_bytes=max_message_size),
        )
    except ValueError as error:
        raise CommandError(str(error), Exit.USAGE) from error
    set_up_logging(log_level)
    chosen.log_warnings()
    raise typer.Exit(serve(settings))


def policy_from(expiry_ms: int, texts: list[str] | None, **flags: int) -> Policy:
    """The policy of a process: what its own flags say, and on top of that --policy."""
    from mesh.cli.thresholds import with_overrides
    from mesh.core.policy import Policy, overridden

    default = Policy()
    expiries = {
        "load_failure_expiry_ms": expiry_ms,
        "transient_failure_expiry_ms": min(expiry_ms, default.transient_failure_expiry_ms),
    }
    try:
        base = overridden(default, {**expiries, **flags})
    except MeshError as error:
        raise CommandError(error.message, Exit.USAGE) from error
    return with_overrides(base, texts)


def check_tls(cert: Path | None, key: Path | None, client_ca: Path | None) -> None:
    if (cert is None) != (key is None):
        raise CommandError("--tls-cert and --tls-key go together", Exit.USAGE)
    if client_ca is not None and cert is None:
        raise CommandError("--tls-client-ca needs --tls-cert and --tls-key", Exit.USAGE)
    for flag, path in (
        ("--tls-cert", cert),
        ("--tls-key", key),
        ("--tls-client-ca", client_ca),
    ):
        if path is not None and not path.is_file():
            raise CommandError(f"{flag} {path}: no such file", Exit.USAGE)


def isolation_of(texts: list[str] | None) -> dict[str, bool]:
    """Format to whether it runs in processes of its own. Raises CommandError."""
    from mesh.formats import FORMATS

    found: dict[str, bool] = {}
    for text in filter(None, (part.strip() for value in texts or () for part in value.split(","))):
        name, _, how = text.partition("=")
        if name not in FORMATS or how not in ("process", "none"):
            raise CommandError(
                f"--isolation {text}: write FORMAT=process or FORMAT=none, with one of the formats "
                + ", ".join(FORMATS),
                Exit.USAGE,
            )
        found[name] = how == "process"
    return found


def check_folders(
    file_roots: list[Path] | None, storage_config: Path | None, serving_runtime: Path | None
) -> None:
    if serving_runtime is not None and not serving_runtime.is_file():
        raise CommandError(f"--serving-runtime {serving_runtime}: no such file", Exit.USAGE)
    for root in file_roots or ():
        if not root.is_dir():
            raise CommandError(f"--file-root {root}: no such folder", Exit.USAGE)
    if storage_config is not None and not storage_config.is_dir():
        raise CommandError(f"--storage-config {storage_config}: no such folder", Exit.USAGE)


def environment_roots() -> list[Path]:
    """MESH_FILE_ROOTS, folders separated by ``:`` as in PATH."""
    text = os.environ.get(variable("FILE_ROOTS"), "")
    return [Path(part) for part in text.split(os.pathsep) if part]


def software_version() -> str:
    from importlib import metadata

    try:
        return metadata.version("modelmesh-py")
    except metadata.PackageNotFoundError:
        return "0+sources"


def set_up_logging(level: LogLevel) -> None:
    """Lines on stderr; `mesh up` looks for the level's name in them."""
    import logging

    logging.basicConfig(
        level=level.value.upper(),
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )


def _flag(name: str, value: Path | None) -> tuple[str, ...]:
    return () if value is None else (name, str(value.resolve()))
