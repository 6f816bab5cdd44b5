"""`mesh router` and `mesh instance`, one at a time, as a person or an init system starts them."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.e2e.asking import TIMEOUT_S, eventually, http_ask
from tests.etcd_server import free_port
from tests.up.live import REPOSITORY


class Server:
    """One process with its log, known to be ready when its /readyz says so."""

    def __init__(self, folder: Path, kind: str, etcd: str, *flags: str) -> None:
        self.metrics = f"127.0.0.1:{free_port()}"
        self._log = folder / f"{kind}-{self.metrics.rpartition(':')[2]}.log"
        port = self.metrics.rpartition(":")[2]
        command = [sys.executable, "-m", "mesh.cli", kind, "--etcd", etcd]
        command += ["--metrics-port", port, *flags]
        environment = {k: v for k, v in os.environ.items() if not k.startswith("MESH_")}
        with self._log.open("w") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, cwd=REPOSITORY, env=environment
            )

    @property
    def log(self) -> str:
        return self._log.read_text()

    def is_ready(self) -> bool:
        assert self.process.poll() is None, self.log
        with contextlib.suppress(OSError):
            return http_ask(self.metrics, "GET", "/readyz")[0] == 200
        return False

    def ready(self) -> Server:
        eventually(self.is_ready, "readiness")
        return self

    def stop(self) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(TIMEOUT_S)


@contextlib.contextmanager
def serving(folder: Path, kind: str, etcd: str, *flags: str) -> Iterator[Server]:
    """Ends with status 0 after SIGTERM."""
    server = Server(folder, kind, etcd, *flags)
    try:
        yield server
        assert server.stop() == 0, server.log
    finally:
        if server.process.poll() is None:
            server.process.kill()
            server.process.wait()
