"""What the controller was told: its flags, and on top of them the ConfigMap model-serving-config.

The ConfigMap's one key ``config.yaml`` has ModelMesh's fields and a few of our own. Pure: reads a
text into a frozen value. A wrong field is InvalidArgument with its path, and the caller keeps the
last good value; a field of ModelMesh's that means nothing here, or an unknown one, is a warning.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

from mesh.core.errors import InvalidArgument
from mesh.manifest import load_documents
from mesh.manifest_fields import Fields, wrong
from mesh.quantity import parse_quantity

CONFIG_MAP: Final = "model-serving-config"
CONFIG_KEY: Final = "config.yaml"
ETCD_SECRET: Final = "model-serving-etcd"
ETCD_KEY: Final = "etcd_connection"

# ModelMesh's, which say nothing to this mesh: its parts are one program in one image.
_KEPT: Final = frozenset(
    (
        *("modelMeshImage", "storageHelperImage", "storageHelperResources", "builtInServerTypes"),
        *("payloadProcessors", "internalModelMeshEnvVars", "modelMeshEndpoint"),
        *("enableAccessLogging",),
    )
)
_DNS_NAME: Final = re.compile(r"[a-z0-9](?:[-a-z0-9.]{0,251}[a-z0-9])?")
_SERVICE_NAME: Final = re.compile(r"[a-z](?:[-a-z0-9]{0,61}[a-z0-9])?")
_REPLICAS_MAX: Final = 1_000


@dataclass(frozen=True, slots=True)
class Amounts:
    """Requests and limits of a container, as Kubernetes writes quantities; "" is none."""

    cpu: str
    memory: str
    cpu_limit: str = ""
    memory_limit: str = ""

    def as_resources(self) -> dict[str, Any]:
        limits = {"cpu": self.cpu_limit, "memory": self.memory_limit}
        return {
            "requests": {"cpu": self.cpu, "memory": self.memory},
            "limits": {key: value for key, value in limits.items() if value},
        }


@dataclass(frozen=True, slots=True)
class PodEtcd:
    """How routers and serving pods reach etcd. ``prefix`` is the first part of every key, unless
    the secret says one."""

    endpoints: tuple[str, ...] = ("etcd:2379",)
    prefix: str = "mesh"
    # Pods mount ``ControllerConfig.etcd_secret`` and read all from it: TLS, user and password too.
    from_secret: bool = False


@dataclass(frozen=True, slots=True)
class ControllerConfig:
    """Milliseconds, bytes and counts as named. The defaults are ModelMesh's where it has one."""

    image: str = "modelmesh-py:0.1.0"  # of routers and serving pods
    image_pull_policy: str = "IfNotPresent"
    etcd: PodEtcd = PodEtcd()
    etcd_secret: str = ETCD_SECRET  # of ModelMesh's form, in every namespace that is served
    take_all: bool = False  # services without `deploymentMode: ModelMesh` as well
    service_name: str = "modelmesh-serving"
    grpc_port: int = 8033
    headless: bool = True
    rest_enabled: bool = True
    rest_port: int = 8008
    metrics_enabled: bool = True
    metrics_port: int = 2112
    pods_per_runtime: int = 2
    router_replicas: int = 2
    storage_secret: str = "storage-config"
    scale_to_zero: bool = True
    grace_ms: int = 60_000  # from a runtime's last model to no pods
    message_bytes_max: int = 16 << 20
    allow_any_claim: bool = False  # volume claims that the storage secret does not name
    tls_secret: str = ""  # "": plaintext; else with tls.crt, tls.key and, for clients, ca.crt
    tls_clients_shown: bool = False  # only clients with a certificate get in
    service_account: str = ""  # of routers and serving pods; "": the namespace's default
    pull_secrets: tuple[str, ...] = ()
    pod_labels: Mapping[str, str] = field(default_factory=dict)
    pod_annotations: Mapping[str, str] = field(default_factory=dict)
    # Our container where models run in it, and beside another model server (ModelMesh's sidecar).
    instance: Amounts = Amounts("500m", "2Gi", "4", "2Gi")
    sidecar: Amounts = Amounts("300m", "448Mi", "3", "448Mi")
    router: Amounts = Amounts("300m", "256Mi", "2", "512Mi")
    artifact_cache: str = "10Gi"  # a serving pod's disk for fetched artifacts
    per_model_metrics: bool = False
    log_level: str = "info"


def read_config(
    data: Mapping[str, str] | None, flags: ControllerConfig
) -> tuple[ControllerConfig, tuple[str, ...]]:
    """The ConfigMap's ``data`` (None: there is none) over ``flags``, and warnings.

    Raises InvalidArgument, which begins with the ConfigMap's name.
    """
    if data is None:
        return flags, ()
    if CONFIG_KEY not in data:
        raise InvalidArgument(f"{CONFIG_MAP}: expected the key {CONFIG_KEY}; found {list(data)}")
    warnings: list[str] = []
    documents = load_documents(data[CONFIG_KEY], f"{CONFIG_MAP}/{CONFIG_KEY}")
    if not documents:
        return flags, ()
    if len(documents) > 1:
        raise InvalidArgument(f"{CONFIG_MAP}/{CONFIG_KEY}: expected one mapping")
    try:
        config = _read(Fields(documents[0], "", warnings), flags, warnings)
    except InvalidArgument as error:
        raise InvalidArgument(f"{CONFIG_MAP}/{CONFIG_KEY}: {error.message}") from None
    return config, tuple(f"{CONFIG_MAP}/{CONFIG_KEY}: {one}" for one in warnings)


def _read(top: Fields, flags: ControllerConfig, warnings: list[str]) -> ControllerConfig:
    config = replace(
        flags,
        image=top.text("image") or flags.image,
        image_pull_policy=top.text("imagePullPolicy", choices=("Always", "IfNotPresent", "Never"))
        or flags.image_pull_policy,
        take_all=_flag(top, "allDeploymentModes", flags.take_all),
        service_name=_name(top, "inferenceServiceName", flags.service_name, _SERVICE_NAME),
        grpc_port=_port(top, "inferenceServicePort", flags.grpc_port),
        headless=_flag(top, "headlessService", flags.headless),
        pods_per_runtime=_count(top, "podsPerRuntime", flags.pods_per_runtime),
        storage_secret=_name(top, "storageSecretName", flags.storage_secret),
        etcd_secret=_name(top, "etcdSecretName", flags.etcd_secret),
        message_bytes_max=_number(top, "grpcMaxMessageSizeBytes", flags.message_bytes_max, 1_024),
        allow_any_claim=_flag(top, "allowAnyPVC", flags.allow_any_claim),
        service_account=_name(top, "serviceAccountName", flags.service_account),
        pull_secrets=_pull_secrets(top, flags.pull_secrets),
        pod_labels=top.text_map("runtimePodLabels") or flags.pod_labels,
        pod_annotations=top.text_map("runtimePodAnnotations") or flags.pod_annotations,
        sidecar=_amounts(top, "modelMeshResources", flags.sidecar),
        instance=_amounts(top, "instanceResources", flags.instance),
        artifact_cache=_quantity(top, "artifactCacheSize", flags.artifact_cache),
    )
    for read in (_read_router, _read_rest, _read_metrics, _read_scale_to_zero, _read_tls):
        config = read(top, config, warnings)
    if top.has("etcdSecretName") and not flags.etcd.from_secret:
        warnings.append("etcdSecretName: not used, as the controller has no --etcd-connection")
    top.close(_KEPT)
    return config


def _read_router(top: Fields, config: ControllerConfig, _: list[str]) -> ControllerConfig:
    fields = top.optional_fields("router")
    if fields is None:
        return config
    config = replace(
        config,
        router_replicas=_count(fields, "replicas", config.router_replicas),
        router=_amounts(fields, "resources", config.router),
    )
    fields.close()
    return config


def _read_rest(top: Fields, config: ControllerConfig, _: list[str]) -> ControllerConfig:
    fields = top.optional_fields("restProxy")
    if fields is None:
        return config
    config = replace(
        config,
        rest_enabled=_flag(fields, "enabled", config.rest_enabled),
        rest_port=_port(fields, "port", config.rest_port),
    )
    fields.close({"image", "resources"})
    return config


def _read_metrics(top: Fields, config: ControllerConfig, warnings: list[str]) -> ControllerConfig:
    fields = top.optional_fields("metrics")
    if fields is None:
        return config
    config = replace(
        config,
        metrics_enabled=_flag(fields, "enabled", config.metrics_enabled),
        metrics_port=_port(fields, "port", config.metrics_port),
        per_model_metrics=_flag(fields, "perModelMetrics", config.per_model_metrics),
    )
    if fields.text("scheme", choices=("http", "https")) == "https":
        warnings.append("metrics.scheme: metrics are served by http")
    fields.close({"disablePrometheusOperatorSupport"})
    return config


def _read_scale_to_zero(top: Fields, config: ControllerConfig, _: list[str]) -> ControllerConfig:
    fields = top.optional_fields("scaleToZero")
    if fields is None:
        return config
    grace_s = fields.integer("gracePeriodSeconds", minimum=0)
    config = replace(
        config,
        scale_to_zero=_flag(fields, "enabled", config.scale_to_zero),
        grace_ms=config.grace_ms if grace_s is None else grace_s * 1_000,
    )
    fields.close()
    return config


def _read_tls(top: Fields, config: ControllerConfig, warnings: list[str]) -> ControllerConfig:
    fields = top.optional_fields("tls")
    if fields is None:
        return config
    secret = _name(fields, "secretName", config.tls_secret)
    clients = fields.text("clientAuth", choices=("require", "optional"))
    if clients == "optional":
        warnings.append("tls.clientAuth: optional asks no client for a certificate here")
    if clients and not secret:
        raise wrong(fields.at("secretName"), "a secret, as clientAuth is given", None)
    fields.close()
    return replace(config, tls_secret=secret, tls_clients_shown=clients == "require")


def _flag(fields: Fields, key: str, default: bool) -> bool:
    value = fields.take(key)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise wrong(fields.at(key), "true or false", value)
    return value


def _number(fields: Fields, key: str, default: int, minimum: int) -> int:
    value = fields.integer(key, minimum=minimum)
    return default if value is None else value


def _count(fields: Fields, key: str, default: int) -> int:
    count = _number(fields, key, default, 1)
    if count > _REPLICAS_MAX:
        raise wrong(fields.at(key), f"at most {_REPLICAS_MAX}", count)
    return count


def _port(fields: Fields, key: str, default: int) -> int:
    port = _number(fields, key, default, 1)
    if port > 65_535:
        raise wrong(fields.at(key), "a port (1 to 65535)", port)
    return port


def _name(fields: Fields, key: str, default: str, form: re.Pattern[str] = _DNS_NAME) -> str:
    text = fields.text(key)
    if text and not form.fullmatch(text):
        raise wrong(fields.at(key), "a Kubernetes name (lower case, digits, -)", text)
    return text or default


def _quantity(fields: Fields, key: str, default: str) -> str:
    value = fields.take(key)
    if value is None:
        return default
    if parse_quantity(str(value), fields.at(key)) <= 0:
        raise wrong(fields.at(key), "more than nothing", value)
    return str(value)


def _amounts(top: Fields, key: str, default: Amounts) -> Amounts:
    fields = top.optional_fields(key)
    if fields is None:
        return default
    found = default
    for part, cpu, memory in (
        ("requests", "cpu", "memory"),
        ("limits", "cpu_limit", "memory_limit"),
    ):
        amounts = fields.optional_fields(part)
        if amounts is None:
            continue
        found = replace(
            found,
            **{
                cpu: _quantity(amounts, "cpu", getattr(found, cpu)),
                memory: _quantity(amounts, "memory", getattr(found, memory)),
            },
        )
        amounts.close()
    fields.close()
    for name, asked, limit in (
        ("cpu", found.cpu, found.cpu_limit),
        ("memory", found.memory, found.memory_limit),
    ):
        if limit and amount(asked) > amount(limit):
            raise wrong(f"{fields.path}.limits.{name}", f"at least the request, {asked}", limit)
    return found


def amount(text: str) -> float:
    """A quantity as a number, with fractions: ``300m`` is 0.3."""
    if text.endswith("m"):
        return parse_quantity(text[:-1], "quantity") / 1_000
    return float(parse_quantity(text, "quantity"))


def _pull_secrets(top: Fields, default: tuple[str, ...]) -> tuple[str, ...]:
    value = top.take("imagePullSecrets")
    if value is None:
        return default
    if not isinstance(value, list):
        raise wrong(top.at("imagePullSecrets"), "a list of names", value)
    names = []
    for at, one in enumerate(value):
        fields = Fields(one, f"{top.at('imagePullSecrets')}[{at}]", [])
        names.append(fields.text("name", required="a secret's name"))
    return tuple(names)
