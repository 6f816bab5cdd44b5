"""(8) A pull from S3 on loopback against the best raw client of the same run.

The store is ``bench.s3_server`` on one core, each client a process of its own on the other. The
raw clients only write the same bytes to a file on the same disk; the mesh also plans ranges, keeps
a journal, reserves room and publishes. Nobody waits for the disk to have them for sure: the mesh
does that after it has handed the artifact out, and until then believes it only as long as the
machine is up. The object's ETag is that of an upload in parts, which is how tools upload anything
large; a row of its own shows one with an MD5, which the mesh checks and nobody else here does.
"""

from __future__ import annotations

import contextlib
import hashlib
import random
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from bench.effort import Effort
from bench.process import BenchError, Child, free_port, load_core, python_child, serving_core
from bench.pull_client import CLIENTS
from bench.report import Report
from bench.stats import pair_ratios, spread

SIZE_BYTES = 512 << 20
ROUNDS = 5
SHARE_OF_BEST = 0.8
BUCKET, KEY = "bench", "model.onnx"
TIMEOUT_S = 120.0


def measure(report: Report, effort: Effort) -> None:
    clients = [name for name in CLIENTS if name != "curl" or shutil.which("curl")]
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        folder = Path(name)
        model = folder / KEY
        digest = write_model(model, effort.scaled(SIZE_BYTES, 1 << 20))
        rounds = max(1, min(effort.pairs, ROUNDS))
        in_parts = run(folder, model, f'"{digest}-64"', clients, rounds)
        checked = run(folder, model, f'"{digest}"', ["mesh"], rounds)["mesh"]
    raw = {name: rates for name, rates in in_parts.items() if name != "mesh"}
    best = max(raw, key=lambda name: spread(raw[name]).median)
    section = f"pull of {effort.scaled(SIZE_BYTES, 1 << 20) >> 20} MiB from S3 on loopback"
    for name, rates in in_parts.items():
        report.row(section, client=name, **{"MiB/s": spread(rates)})
    report.row(section, client="mesh, the ETag is an MD5", **{"MiB/s": spread(checked)})
    ratio = pair_ratios(in_parts["mesh"], raw[best])
    report.figure(f"pull, mesh : best raw client ({best})", ratio, "at least", SHARE_OF_BEST)


def write_model(path: Path, size_bytes: int) -> str:
    """Its MD5."""
    draws, digest = random.Random(8), hashlib.md5(usedforsecurity=False)
    with path.open("wb") as file:
        for start in range(0, size_bytes, 1 << 20):
            block = draws.randbytes(min(1 << 20, size_bytes - start))
            digest.update(block)
            file.write(block)
    return digest.hexdigest()


def run(
    folder: Path, model: Path, etag: str, clients: Sequence[str], rounds: int
) -> dict[str, list[float]]:
    """MiB/s by client; the clients take turns."""
    port = free_port()
    arguments = (str(model), etag, str(port))
    rates: dict[str, list[float]] = {name: [] for name in clients}
    with contextlib.ExitStack() as stack:
        server = python_child("s3 server", "bench.s3_server", *arguments, core=serving_core())
        stack.enter_context(server)
        server.wait_for_port(port)
        for _ in range(rounds):
            for name in clients:
                rates[name].append(one(name, f"http://127.0.0.1:{port}", folder, model))
    return rates


def one(client: str, endpoint: str, folder: Path, model: Path) -> float:
    place = folder / "pulled"
    place.mkdir()
    argv = [sys.executable, "-m", "bench.pull_client", client, endpoint, BUCKET, KEY, str(place)]
    with Child(f"client {client}", argv, core=load_core()) as child:
        code = child.wait_for_exit(TIMEOUT_S)
        said = child.output()
    found = [line.split() for line in said.splitlines() if line.startswith("RESULT")]
    shutil.rmtree(place)
    if code != 0 or not found or int(found[0][2]) != model.stat().st_size:
        raise BenchError(f"client {client} did not pull the object: {said[-1_000:]}")
    return (model.stat().st_size / (1 << 20)) / float(found[0][1])
