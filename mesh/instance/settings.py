"""What an operator may set for one serving pod; built once, in a composition root."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from mesh.core.policy import Policy
from mesh.runtimes.settings import RuntimeSettings
from mesh.store.etcd_options import EtcdOptions
from mesh.wire.limits import INSIDE, Limits
from puller.settings import PullerSettings


@dataclass(frozen=True, slots=True)
class InstanceSettings:
    """Bytes, counts, milliseconds as named. A value out of range fails here, with its name."""

    puller: PullerSettings
    host: str = "127.0.0.1"
    port: int = 0  # 0: any free one; routers learn it from the instance's record
    advertised_host: str = ""  # what routers connect to; "" is ``host``
    metrics_host: str = "127.0.0.1"
    metrics_port: int | None = 0  # None: no listener
    capacity_bytes: int = 1 << 30
    etcd_endpoints: tuple[str, ...] = ("127.0.0.1:2379",)
    etcd: EtcdOptions | None = None  # in place of etcd_endpoints: with TLS, or as a user
    prefix: str = "mesh"
    namespace: str = "default"
    name: str = "instance"  # start of the instance's id; the rest is drawn at each start
    runtimes: RuntimeSettings = field(default_factory=RuntimeSettings)
    worker_memory_bytes: int = 0  # of an isolated model's process; 0: as capacity_bytes
    # A KServe ServingRuntime: which formats, and the external runtime that serves them, if any.
    serving_runtime: Path | None = None
    adapter: str = ""  # mlserver or triton, where no resource says it or another counts
    runtime_endpoint: str = ""  # of an external runtime, where its resource does not say
    runtime_data_endpoint: str = ""
    # ModelMesh's variables of adapters (CONTAINER_MEM_REQ_BYTES, ROOT_MODEL_DIR ...).
    adapter_env: Mapping[str, str] = field(default_factory=dict, repr=False)
    inference_threads: int = 4  # beside the event loop; one more than a slow model may hold
    zone: str = ""
    labels: tuple[str, ...] = ()
    group: str = ""  # the deployment that it belongs to
    replica_set: str = ""  # that deployment's generation: a newer one replaces the older ones
    drain_notice_ms: int = 500  # goes on serving for so long after it has told that it leaves
    # Then it has so long at most for moving its copies and for requests in flight to finish.
    drain_timeout_ms: int = 15_000
    per_model_metrics: bool = False
    software_version: str = "0.1.0"
    policy: Policy = field(default_factory=Policy)
    limits: Limits = INSIDE

    def __post_init__(self) -> None:
        if self.capacity_bytes < 1 << 20:
            raise ValueError(
                f"InstanceSettings.capacity_bytes is {self.capacity_bytes}; "
                "an instance needs at least 1 MiB for models"
            )
        if self.inference_threads < 1:
            raise ValueError("InstanceSettings.inference_threads must be at least 1")
        if self.host in ("", "0.0.0.0", "::") and not self.advertised_host:
            raise ValueError(
                f"InstanceSettings.host is {self.host!r}, every address of this machine; "
                "advertised_host must say at which one routers reach it"
            )
        for what in ("drain_notice_ms", "drain_timeout_ms"):
            if getattr(self, what) < 0:
                raise ValueError(f"InstanceSettings.{what} must not be negative")
        if not self.etcd_endpoints:
            raise ValueError("InstanceSettings.etcd_endpoints must name at least one endpoint")

    @property
    def etcd_options(self) -> EtcdOptions:
        return self.etcd or EtcdOptions(self.etcd_endpoints)
