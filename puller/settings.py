"""What an operator may set for the puller; built once, in a composition root.

Nothing here reads the environment: ``store_env`` is handed in as a mapping. A value out of range
fails at construction with its name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

MIB = 1 << 20
GIB = 1 << 30

_STORE_VARIABLES = ("AWS_", "AZURE_")
_STORE_NAMES = ("GOOGLE_APPLICATION_CREDENTIALS", "STORAGE_EMULATOR_HOST")


def store_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """What of a process's environment concerns the stores; for a composition root."""
    return {
        name: value
        for name, value in environment.items()
        if name.startswith(_STORE_VARIABLES) or name in _STORE_NAMES
    }


@dataclass(frozen=True, slots=True)
class PullerSettings:
    cache_dir: Path
    cache_capacity_bytes: int = 20 * GIB
    # file:// is readable only below these: who reaches the management calls could otherwise read
    # any file of this machine.
    file_roots: tuple[Path, ...] = ()
    pvc_root: Path = Path("/pvc_mounts")  # where ModelMesh's deployments mount volume claims
    storage_config_dir: Path | None = None  # the mounted `storage-config` secret
    # AWS_*, AZURE_*, GOOGLE_APPLICATION_CREDENTIALS, STORAGE_EMULATOR_HOST; may hold secrets
    store_env: Mapping[str, str] = field(default_factory=dict, repr=False)
    parallelism: int = 8  # ranged reads at once, over all fetches
    part_bytes: int = 16 * MIB  # S3's own advice for ranged reads is 8 to 16 MiB
    # What one read holds in memory before it goes to the disk. Half of it costs more threads'
    # hops, twice as much leaves the processor's caches before it is written.
    chunk_bytes: int = MIB // 2
    rate_bytes_per_s: int = 0  # over all fetches; 0 is as fast as it goes
    max_artifact_bytes: int = 100 * GIB
    max_artifact_files: int = 10_000
    # Beyond what an archive may always unpack to: no model packs better than a hundred to one.
    max_unpack_ratio: int = 100
    connect_timeout_ms: int = 5_000
    read_timeout_ms: int = 30_000  # silence on an open connection
    request_timeout_ms: int = 600_000  # one ranged read from start to end
    fetch_timeout_ms: int = 3_600_000  # one artifact, retries and waiting included
    attempts_max: int = 6  # of one read without a single byte of progress between them
    backoff_base_ms: int = 100
    backoff_max_ms: int = 5_000
    changed_restarts_max: int = 3  # an object that keeps changing while it is read
    fsync: bool = True  # without it a power cut may leave a hole in a published artifact

    def __post_init__(self) -> None:
        for name in (
            "cache_capacity_bytes",
            "parallelism",
            "part_bytes",
            "chunk_bytes",
            "max_artifact_bytes",
            "max_artifact_files",
            "max_unpack_ratio",
            "connect_timeout_ms",
            "read_timeout_ms",
            "request_timeout_ms",
            "fetch_timeout_ms",
            "attempts_max",
            "backoff_base_ms",
            "backoff_max_ms",
        ):
            value = getattr(self, name)
            if value <= 0:
                raise ValueError(f"PullerSettings.{name} must be positive, it is {value}")
        for name in ("changed_restarts_max", "rate_bytes_per_s"):
            if getattr(self, name) < 0:
                raise ValueError(f"PullerSettings.{name} must not be negative")
        for root in self.file_roots:
            if not root.is_absolute():
                raise ValueError(f"PullerSettings.file_roots: {str(root)!r} is not absolute")
