"""etcd's command line for one machine, and which etcd fits the data that is already there.

Starts nothing. Raises ``UpRefused`` when the data was written by a newer etcd than any at hand:
etcd cannot go back a minor version.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Final

from mesh.store.etcd_binary import EtcdBinary, caution_of, packaged_etcd, version_of
from mesh.up.child import ChildCommand, http_ready
from mesh.up.layout import DataDir, UpRefused
from mesh.up.settings import Ports

# Old revisions are kept for this long: every watch of ours resumes within seconds, or reads anew.
AUTO_COMPACTION_RETENTION: Final = "5m"
# etcd's own advice for the largest; a million models are about 1 GiB with a few revisions each.
QUOTA_BYTES: Final = 4 << 30
# One member elects itself: short timers make it ready at once, and there is nobody to disagree.
HEARTBEAT_MS: Final = 20
ELECTION_MS: Final = 200
# A transaction of 128 records, each with a manifest of some KiB, and room above that.
MAX_REQUEST_BYTES: Final = 4 << 20


def etcd_for_data(
    found: EtcdBinary,
    written_by: tuple[int, int] | None,
    *,
    packaged: Callable[[], Path | None] = packaged_etcd,
    ask_version: Callable[[Path], tuple[int, int, int] | None] = version_of,
) -> EtcdBinary:
    """The etcd to run on data that ``written_by`` (major, minor) has written; None: no data yet."""
    if written_by is None or found.version[:2] >= written_by:
        return found
    path = packaged()
    version = ask_version(path) if path is not None else None
    if path is not None and version is not None and version[:2] >= written_by:
        return EtcdBinary(path, version, caution_of(version))
    raise UpRefused(
        f"the data was written by etcd {written_by[0]}.{written_by[1]}, which etcd "
        f"{found.version_text} ({found.path}) cannot read; put etcd "
        f"{written_by[0]}.{written_by[1]} or later on the PATH, or use another --data-dir"
    )


def etcd_command(binary: Path, data_dir: DataDir, ports: Ports) -> ChildCommand:
    client = f"http://127.0.0.1:{ports.etcd_client}"
    peer = f"http://127.0.0.1:{ports.etcd_peer}"

    async def ready() -> bool:
        return await http_ready("127.0.0.1", ports.etcd_client, "/health")

    return ChildCommand(
        name="etcd",
        argv=(
            str(binary),
            "--name=mesh",
            f"--data-dir={data_dir.etcd}",
            f"--listen-client-urls={client}",
            f"--advertise-client-urls={client}",
            f"--listen-peer-urls={peer}",
            f"--initial-advertise-peer-urls={peer}",
            f"--initial-cluster=mesh={peer}",
            "--auto-compaction-mode=periodic",
            f"--auto-compaction-retention={AUTO_COMPACTION_RETENTION}",
            f"--quota-backend-bytes={QUOTA_BYTES}",
            f"--max-request-bytes={MAX_REQUEST_BYTES}",
            f"--heartbeat-interval={HEARTBEAT_MS}",
            f"--election-timeout={ELECTION_MS}",
            "--logger=zap",
            "--log-outputs=stderr",
        ),
        ready=ready,
        log_path=data_dir.logs / "etcd.log",
        start_stage=0,
        stop_stage=2,
        # etcd writes its data out when it is asked to stop; the others have nothing to lose.
        death_signal=signal.SIGTERM,
    )
