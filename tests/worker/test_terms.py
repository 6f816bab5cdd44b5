"""What the operator, the record and the policy say of how a model is run reaches its process."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from mesh.core.batching import Wished
from mesh.core.policy import Policy
from mesh.runtimes.isolated_fork_server import ForkServers

from .isolation import Isolation, isolation

pytestmark = pytest.mark.asyncio(loop_scope="module")

# Tells how it is run: by how many threads of the libraries, and with how many rows at once.
TELLS = """
import ctypes, glob, sysconfig, threading
import numpy as np, threadpoolctl

class Model:
    inputs = [("x", "FP32", [-1])]
    outputs = [("y", "FP32", [-1])]
    def load(self, path):
        pattern = sysconfig.get_paths()["purelib"] + "/scikit_learn.libs/libgomp*"
        self.openmp = ctypes.CDLL(glob.glob(pattern)[0])
        self.barrier = threading.Barrier(2, timeout=30)
    def predict(self, inputs, parameters):
        if parameters.get("do") == "threads":
            self.barrier.wait()  # each of them in a thread of its own
            found = [lib["num_threads"] for lib in threadpoolctl.threadpool_info()
                     if lib["user_api"] == "blas"]
            return {"y": np.array([self.openmp.omp_get_max_threads(), *found], np.float32)}
        return {"y": np.full(len(inputs["x"]), len(inputs["x"]), np.float32)}
"""


async def library_threads(workers: Isolation, model_id: str, **files: str) -> list[list[int]]:
    (workers.folder / model_id).mkdir()
    for name, text in files.items():
        (workers.folder / model_id / name.replace("_", ".")).write_text(text)
    model = await workers.load(model_id, TELLS)
    return await asyncio.gather(*(workers.ask(model, "threads") for _ in range(2)))


async def test_libraries_use_one_thread_unless_told_otherwise(workers: Isolation) -> None:
    for threads in await library_threads(workers, "model"):
        assert len(threads) > 1
        assert set(threads) == {1}


async def test_libraries_use_as_many_threads_as_the_operator_says(
    tmp_path: Path, servers: ForkServers
) -> None:
    async with isolation(tmp_path, servers, intra_op_threads=2) as workers:
        for threads in await library_threads(workers, "model"):
            assert len(threads) > 1
            assert set(threads) == {2}


async def rows_at_once(workers: Isolation, model) -> int:
    answers = await asyncio.gather(*(workers.ask(model, x=[1.0]) for _ in range(32)))
    return int(max(rows for (rows,) in answers))


async def test_the_records_limit_and_the_policy_reach_a_process_and_the_one_after_it(
    workers: Isolation,
) -> None:
    tells = (
        TELLS.replace('"do") == "threads"', '"do") == "segfault"')
        .replace("self.barrier.wait()", "ctypes.string_at(0)")
        .replace(
            'return {"y": np.full', 'threading.Event().wait(0.002)\n        return {"y": np.full'
        )
    )
    model = await workers.load("model", tells)
    policy = Policy(batch_gain_min_share=0.0, batch_retrial_requests=1)

    async def joined(rows: int) -> bool:
        return await rows_at_once(workers, model) == rows

    for rows in (4, 2):
        model.use_terms(Wished(rows), policy)
        await until_true(lambda rows=rows: joined(rows))
    await workers.fail(model, "segfault")
    await until_true(lambda: joined(2))
    model.use_terms(Wished(0), policy)
    await until_true(lambda: joined(1))


async def until_true(ask) -> None:
    async with asyncio.timeout(60):
        while not await ask():
            pass
