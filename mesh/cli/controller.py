"""`mesh controller`: its command line turned into settings, and run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mesh.cli.exits import CommandError, Exit
from mesh.cli.server_options import (
    EtcdOption,
    LogLevel,
    LogLevelOption,
    MetricsHostOption,
    MetricsPortOption,
    PrefixOption,
    variable,
)
from mesh.cli.servers import DEFAULT_ETCD, endpoints, set_up_logging, software_version


def add_to(app: typer.Typer) -> None:
    app.command()(controller)


def controller(
    kubeconfig: Annotated[
        Path | None,
        typer.Option(
            envvar=variable("KUBECONFIG"),
            metavar="FILE",
            help="How to reach the API server; as the pod that this runs in unless told.",
        ),
    ] = None,
    namespace: Annotated[
        str | None,
        typer.Option(
            envvar=variable("CONTROLLER_NAMESPACE"),
            help="The namespace to serve; the kubeconfig's, or the pod's own, unless told.",
        ),
    ] = None,
    all_namespaces: Annotated[
        bool,
        typer.Option(
            envvar=variable("ALL_NAMESPACES"),
            help='Serve every namespace with the label modelmesh-enabled: "true".',
        ),
    ] = False,
    etcd: EtcdOption = None,
    etcd_connection: Annotated[
        Path | None,
        typer.Option(
            envvar=variable("ETCD_CONNECTION"),
            metavar="FILE",
            help="ModelMesh's etcd_connection (JSON with endpoints and root_prefix), in place of "
            "--etcd and --prefix.",
        ),
    ] = None,
    pod_etcd: Annotated[
        list[str] | None,
        typer.Option(
            envvar=variable("POD_ETCD"),
            metavar="HOST:PORT,...",
            help="etcd's endpoints as routers and serving pods reach them, if not as --etcd.",
        ),
    ] = None,
    prefix: PrefixOption = "mesh",
    leader_elect: Annotated[
        bool,
        typer.Option(envvar=variable("LEADER_ELECT"), help="One of several controllers acts."),
    ] = False,
    take_all: Annotated[
        bool,
        typer.Option(
            envvar=variable("TAKE_ALL"),
            help="Serve also InferenceServices without the annotation deploymentMode: ModelMesh.",
        ),
    ] = False,
    workloads: Annotated[
        bool,
        typer.Option(
            envvar=variable("WORKLOADS"),
            help="Make routers and serving pods in the cluster, or leave that to others.",
        ),
    ] = True,
    image: Annotated[
        str, typer.Option(envvar=variable("IMAGE"), help="Of routers and serving pods.")
    ] = "modelmesh-py:0.1.0",
    write_storage_config: Annotated[
        Path | None,
        typer.Option(
            envvar=variable("WRITE_STORAGE_CONFIG"),
            metavar="DIR",
            help="Write the storage-config secret into this folder, for serving pods outside of "
            "the cluster (their --storage-config).",
        ),
    ] = None,
    metrics_host: MetricsHostOption = "127.0.0.1",
    metrics_port: MetricsPortOption = 0,
    log_level: LogLevelOption = LogLevel.info,
) -> None:
    """Keep a cluster's InferenceServices and the mesh in step; needs the extra `controller`."""
    try:
        from mesh.reconciler.process import serve
    except ImportError as error:
        text = f"{error}: pip install 'modelmesh-py[controller]'"
        raise CommandError(text, Exit.USAGE) from error
    from mesh.core.errors import InvalidArgument
    from mesh.reconciler.config import (
        ETCD_KEY,
        ControllerConfig,
        EtcdConnection,
        read_etcd_secret,
    )
    from mesh.reconciler.settings import ControllerSettings

    connection = EtcdConnection(endpoints(etcd or [DEFAULT_ETCD]), prefix)
    if etcd_connection is not None:
        try:
            data = {ETCD_KEY: etcd_connection.read_bytes()}
            connection = read_etcd_secret(data, connection)
        except (OSError, InvalidArgument) as error:
            text = f"--etcd-connection {etcd_connection}: {error}"
            raise CommandError(text, Exit.USAGE) from error
    pods = EtcdConnection(endpoints(pod_etcd or []) or connection.endpoints, connection.prefix)
    try:
        settings = ControllerSettings(
            kubeconfig=kubeconfig,
            namespace=namespace,
            all_namespaces=all_namespaces,
            etcd_endpoints=connection.endpoints,
            prefix=connection.prefix,
            leader_elect=leader_elect,
            workloads=workloads,
            storage_config_dir=write_storage_config,
            metrics_host=metrics_host,
            metrics_port=metrics_port,
            software_version=software_version(),
            config=ControllerConfig(image=image, etcd=pods, take_all=take_all),
        )
    except ValueError as error:
        raise CommandError(str(error), Exit.USAGE) from error
    set_up_logging(log_level)
    raise typer.Exit(serve(settings))
