"""`mesh controller`: its command line turned into settings, and run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mesh.cli.etcd_choice import ChosenEtcd, EtcdConnectionOption, choose_etcd, endpoints
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
from mesh.cli.servers import set_up_logging, software_version

if TYPE_CHECKING:
    from mesh.reconciler.config import PodEtcd


def add_to(app: typer.Typer) -> None:
    app.command()(controller)


def controller(
    context: typer.Context,
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
    etcd_connection: EtcdConnectionOption = None,
    pod_etcd: Annotated[
        list[str] | None,
        typer.Option(
            envvar=variable("POD_ETCD"),
            metavar="HOST:PORT,...",
            help="etcd's endpoints as routers and serving pods reach them, if not as --etcd; with "
            "--etcd-connection they mount its secret unless told so.",
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
    from mesh.reconciler.config import ControllerConfig
    from mesh.reconciler.settings import ControllerSettings

    chosen = choose_etcd(context, etcd, etcd_connection, prefix)
    pods = pod_etcd_of(chosen, pod_etcd)
    try:
        settings = ControllerSettings(
            kubeconfig=kubeconfig,
            namespace=namespace,
            all_namespaces=all_namespaces,
            etcd=chosen.options,
            prefix=chosen.prefix,
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
    chosen.log_warnings()
    raise typer.Exit(serve(settings))


def pod_etcd_of(chosen: ChosenEtcd, pod_etcd: list[str] | None) -> PodEtcd:
    """How pods reach etcd. With --etcd-connection they mount the secret that it is from, unless
    --pod-etcd says otherwise. Raises CommandError."""
    from mesh.reconciler.config import PodEtcd

    options = chosen.options
    if not pod_etcd:
        return PodEtcd(options.endpoints, chosen.prefix, from_secret=chosen.file is not None)
    if options.tls is not None or options.user:
        text = "--pod-etcd has neither TLS nor a user; pods mount the secret of --etcd-connection"
        raise CommandError(text, Exit.USAGE)
    return PodEtcd(endpoints(pod_etcd), chosen.prefix)
