"""A real etcd server for tests: random ports, a folder of its own, short timers, every fault.

``start`` and ``stop`` are synchronous and quick (0.1 s); the folder and the ports stay over
``kill`` and ``start``, so that a restart is a restart of the same server. Loopback only. The
process is known by its pid and ends with the context, however the test ends.
"""

from __future__ import annotations

import contextlib
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Self

from mesh.store.etcd_binary import EtcdBinary, find_etcd

READY_TIMEOUT_S = 60.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class EtcdServer:
    """One etcd member. Use as a context manager, or call ``start`` and ``close``."""

    def __init__(
        self,
        *,
        binary: EtcdBinary | None = None,
        quota_bytes: int | None = None,
        certificates: Path | None = None,
        extra_arguments: tuple[str, ...] = (),
    ) -> None:
        self.binary = binary or find_etcd()
        self.folder = Path(tempfile.mkdtemp(prefix="mesh-test-etcd-"))
        self.client_port = free_port()
        self.peer_port = free_port()
        self._health_port = free_port()
        self._quota_bytes = quota_bytes
        self.certificates = certificates  # ca.pem, server.pem, server.key: clients need theirs
        self._extra_arguments = extra_arguments
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def endpoint(self) -> str:
        return f"127.0.0.1:{self.client_port}"

    @property
    def pid(self) -> int:
        assert self._process is not None, "etcd is not running"
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def _arguments(self) -> list[str]:
        scheme = "http" if self.certificates is None else "https"
        client = f"{scheme}://127.0.0.1:{self.client_port}"
        peer = f"http://127.0.0.1:{self.peer_port}"
        arguments = [
            str(self.binary.path),
            "--name=test",
            f"--data-dir={self.folder / 'data'}",
            f"--listen-client-urls={client}",
            f"--advertise-client-urls={client}",
            f"--listen-peer-urls={peer}",
            f"--initial-advertise-peer-urls={peer}",
            f"--initial-cluster=test={peer}",
            f"--listen-metrics-urls=http://127.0.0.1:{self._health_port}",
            "--heartbeat-interval=10",
            "--election-timeout=100",
            "--logger=zap",
            "--log-level=error",
        ]
        if self._quota_bytes is not None:
            arguments.append(f"--quota-backend-bytes={self._quota_bytes}")
        if self.certificates is not None:
            arguments += [
                "--client-cert-auth",
                f"--trusted-ca-file={self.certificates / 'ca.pem'}",
                f"--cert-file={self.certificates / 'server.pem'}",
                f"--key-file={self.certificates / 'server.key'}",
            ]
        return [*arguments, *self._extra_arguments]

    def start(self, *, wait: bool = True) -> None:
        assert not self.running, "etcd is running already"
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                self._arguments(), stdout=log, stderr=log, stdin=subprocess.DEVNULL
            )
        if wait:
            self.wait_ready()

    def wait_ready(self) -> None:
        """Until it answers as healthy; fails with the end of its log."""
        deadline = time.monotonic() + READY_TIMEOUT_S
        while time.monotonic() < deadline:
            if not self.running:
                break
            with contextlib.suppress(urllib.error.URLError, OSError):
                url = f"http://127.0.0.1:{self._health_port}/health"
                opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
                with opener.open(url, timeout=1.0) as reply:
                    if b'"true"' in reply.read():
                        return
            time.sleep(0.01)
        log = (self.folder / "log").read_text(errors="replace")[-2_000:]
        raise RuntimeError(f"etcd did not become ready; its log ends:\n{log}")

    def kill(self) -> None:
        """kill -9."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        """An orderly end."""
        self._end(signal.SIGTERM)

    def restart(self) -> None:
        """kill -9, then the same folder and ports again."""
        self.kill()
        self.start()

    def pause(self) -> None:
        """SIGSTOP: connections stay open, nothing answers."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def _end(self, signal_number: signal.Signals) -> None:
        process = self._process
        if process is None:
            return
        if process.poll() is None:
            process.send_signal(signal_number)
            if signal_number is not signal.SIGKILL:
                process.send_signal(signal.SIGCONT)
            try:
                process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._process = None

    def close(self) -> None:
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
