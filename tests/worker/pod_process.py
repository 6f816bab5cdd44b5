"""A process with isolated models, to be killed: prints the pids of its workers, and waits."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from mesh.runtimes.api import ModelSpec
from mesh.runtimes.isolated import IsolatedRuntime, IsolationLimits
from mesh.runtimes.settings import RuntimeSettings


async def main(path: Path) -> None:
    settings = RuntimeSettings(allow_python=True)
    limits = IsolationLimits(worker_memory_bytes=200 << 20)
    runtime = IsolatedRuntime(settings, limits, asyncio.get_running_loop())
    specs = [ModelSpec(name, "python", path) for name in ("a", "b")]
    models = [await asyncio.to_thread(runtime.load, spec) for spec in specs]
    pids = [runtime.fork_server_pid("python"), *(model.pid for model in models)]
    print(*pids, flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
