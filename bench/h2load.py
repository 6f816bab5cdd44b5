"""h2load as load generator: exact request counts, checked totals, latencies from its log.

h2load does not look at ``grpc-status``. A run therefore counts only when every request was answered
with 2xx and the bytes of DATA are exactly those of the expected replies; the content itself is
compared by ``bench.verify`` before anything is measured.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from bench.payload import INFER_PATH
from bench.process import BenchError, Child, Unavailable, load_core

RUN_TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True)
class Load:
    """How requests come: ``requests`` in all, over ``connections`` × ``streams``."""

    requests: int
    connections: int
    streams: int


@dataclass(frozen=True, slots=True)
class Run:
    """What one run of h2load measured. ``latencies_us`` is empty unless a log was asked for."""

    requests: int
    seconds: float
    data_bytes: int
    mean_us: float
    max_us: float
    latencies_us: tuple[int, ...] = ()

    @property
    def rate(self) -> float:
        return self.requests / self.seconds


def binary() -> str:
    found = shutil.which("h2load")
    if found is None:
        raise Unavailable("h2load is not installed (Debian: apt-get install nghttp2-client)")
    return found


def command(
    port: int, body: Path, load: Load, *, log: Path | None = None, headers: tuple[str, ...] = ()
) -> list[str]:
    out = [
        binary(), "-t", "1", "-n", str(load.requests), "-c", str(load.connections),
        "-m", str(load.streams), "-H", "content-type: application/grpc", "-H", "te: trailers",
        "-d", str(body),
    ]  # fmt: skip
    for header in headers:
        out += ["-H", header]
    if log is not None:
        out.append(f"--log-file={log}")
    return [*out, f"http://127.0.0.1:{port}{INFER_PATH}"]


def run(
    port: int,
    body: Path,
    load: Load,
    *,
    reply_bytes: int | None,
    log: bool = False,
    headers: tuple[str, ...] = (),
) -> Run:
    """Run h2load to its end on its own core. ``reply_bytes``: size of each reply's DATA."""
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        log_file = Path(folder) / "log" if log else None
        argv = command(port, body, load, log=log_file, headers=headers)
        with Child("h2load", argv, core=load_core()) as child:
            try:
                code = child.wait_for_exit(RUN_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                raise BenchError(f"h2load did not end: {' '.join(argv)}") from None
            output = child.output()
        if code != 0:
            raise BenchError(f"h2load ended with {code}: {output[-1_000:]}")
        latencies = read_log(log_file) if log_file is not None else ()
    result = parse(output, latencies)
    expected = None if reply_bytes is None else reply_bytes * load.requests
    if result.requests != load.requests or (expected is not None and result.data_bytes != expected):
        raise BenchError(
            f"not every request was answered in full ({result.requests} of {load.requests}, "
            f"{result.data_bytes} bytes of DATA, expected {expected}):\n{output}"
        )
    return result


def calibrated(
    port: int, body: Path, shape: Load, *, reply_bytes: int | None, seconds: float
) -> int:
    """How many requests keep this target busy for about ``seconds``; warms it up as well."""
    count = shape.connections * shape.streams
    while True:
        load = Load(count, shape.connections, shape.streams)
        result = run(port, body, load, reply_bytes=reply_bytes)
        if result.seconds >= min(0.2, seconds / 2) or count >= 1_000_000:
            wanted = int(result.rate * seconds)
            return max(shape.connections * shape.streams, wanted)
        count *= 4


def parse(output: str, latencies_us: tuple[int, ...] = ()) -> Run:
    """Read h2load's summary. Requests that did not succeed with 2xx do not count."""
    finished = re.search(r"finished in ([\d.]+)(us|ms|s|m)\b", output)
    done = re.search(r"requests: .* (\d+) done, (\d+) succeeded, (\d+) failed", output)
    ok = re.search(r"status codes: (\d+) 2xx", output)
    data = re.search(r"\((\d+)\) data", output)
    times = re.search(r"time for request:\s+(\S+)\s+(\S+)\s+(\S+)", output)
    if not (finished and done and ok and data and times):
        raise BenchError(f"cannot read h2load's output:\n{output}")
    return Run(
        requests=min(int(done.group(2)), int(ok.group(1))),
        seconds=_microseconds(finished.group(1) + finished.group(2)) / 1e6,
        data_bytes=int(data.group(1)),
        max_us=_microseconds(times.group(2)),
        mean_us=_microseconds(times.group(3)),
        latencies_us=latencies_us,
    )


def read_log(path: Path) -> tuple[int, ...]:
    """Latencies of the requests that were answered with 2xx, in microseconds."""
    out: list[int] = []
    for line in path.read_text("ascii").splitlines():
        _, status, latency = line.split("\t")[:3]
        if status.startswith("2"):
            out.append(int(latency))
    return tuple(out)


def _microseconds(text: str) -> float:
    found = re.fullmatch(r"([\d.]+)(us|ms|s|m|h)", text)
    if found is None:
        raise BenchError(f"cannot read the duration {text!r} of h2load")
    scale = {"us": 1.0, "ms": 1e3, "s": 1e6, "m": 60e6, "h": 3600e6}[found.group(2)]
    return float(found.group(1)) * scale
