"""The client process of the chaos tests: grpcio asks at a steady rate until stdin is closed.

Its one argument is a JSON object (``Wanted``). It asks whether or not earlier requests have been
answered, as clients of a service do. Each line that it prints is a JSON object: what has come since
the line before, and the last one, with ``"done": true``, the figures of the whole.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import sys
import time
from dataclasses import dataclass, field
from typing import Any

import grpc
import numpy as np

from protos import oip_pb2 as oip
from tests.e2e.asking import OIP, raw_request

REPORT_S = 0.1
# Requests without an answer at once; a mesh that answers nothing at all is not asked for more.
MAX_WAITING = 2_000
SLOWEST_TOLD = 5
BEHIND_S = 0.2

# gRPC's own standard retry policy (gRFC A6), which each gRPC library has.
RETRIES = {
    "methodConfig": [
        {
            "name": [{"service": "inference.GRPCInferenceService"}],
            "retryPolicy": {
                "maxAttempts": 5,
                "initialBackoff": "0.05s",
                "maxBackoff": "1s",
                "backoffMultiplier": 2,
                "retryableStatusCodes": ["UNAVAILABLE"],
            },
        }
    ]
}


@dataclass(frozen=True)
class Wanted:
    """``skew``: the first names are asked more; 0 is all alike."""

    address: str
    names: list[str]
    rate: float = 120.0
    connections: int = 4
    deadline_s: float = 10.0
    retries: bool = False
    skew: float = 1.0
    seed: int = 1


@dataclass
class Tally:
    answers: int = 0
    failures: list[dict[str, Any]] = field(default_factory=list)
    told: int = 0
    waiting: int = 0
    held_back: int = 0
    took: list[tuple[float, float, str]] = field(default_factory=list)  # ms, at, name

    def line(self) -> dict[str, Any]:
        fresh, self.told = self.failures[self.told :], len(self.failures)
        return {"answers": self.answers, "waiting": self.waiting, "failures": fresh}

    def last_line(self) -> dict[str, Any]:
        times = sorted(ms for ms, _, _ in self.took) or [0.0]
        return {
            **self.line(),
            "done": True,
            "held_back": self.held_back,
            "p50_ms": round(times[len(times) // 2], 1),
            "p99_ms": round(times[len(times) * 99 // 100], 1),
            "max_ms": round(times[-1], 1),
            "slowest": sorted(self.took, reverse=True)[:SLOWEST_TOLD],
        }


def channel(wanted: Wanted) -> grpc.aio.Channel:
    options: list[tuple[str, Any]] = [
        ("grpc.use_local_subchannel_pool", 1),
        # A lost connection is made anew at once, and then a little later each time.
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 1_000),
    ]
    if wanted.retries:
        options.append(("grpc.service_config", json.dumps(RETRIES)))
    else:
        options.append(("grpc.enable_retries", 0))
    return grpc.aio.insecure_channel(wanted.address, options)


async def ask(method: Any, name: str, request: bytes, tally: Tally, deadline_s: float) -> None:
    began, at = time.perf_counter(), time.time()
    tally.waiting += 1
    try:
        reply = oip.ModelInferResponse.FromString(await method(request, timeout=deadline_s))
        if reply.model_name != name or not reply.raw_output_contents:
            raise AssertionError(f"not an answer of {name}: {str(reply)[:200]}")
    except grpc.aio.AioRpcError as error:
        code, text = error.code().name, error.details() or ""
    except Exception as error:
        code, text = "NO_ANSWER", repr(error)
    else:
        tally.answers += 1
        tally.took.append(((time.perf_counter() - began) * 1e3, at, name))
        return
    finally:
        tally.waiting -= 1
    took_ms = round((time.perf_counter() - began) * 1e3)
    tally.failures.append({"at": at, "name": name, "code": code, "text": text, "ms": took_ms})


async def run(wanted: Wanted) -> None:
    loop = asyncio.get_running_loop()
    tally = Tally()
    stop = asyncio.Event()
    loop.add_reader(sys.stdin.fileno(), stop.set)  # only ever readable at its end
    draw = random.Random(wanted.seed)
    weights = [1 / (rank + 1) ** wanted.skew for rank in range(len(wanted.names))]
    requests = {
        name: raw_request(name, input=np.ones((1, 64), np.float32)).SerializeToString()
        for name in wanted.names
    }
    async with contextlib.AsyncExitStack() as stack:
        channels = [
            await stack.enter_async_context(channel(wanted)) for _ in range(wanted.connections)
        ]
        methods = [each.unary_unary(OIP + "ModelInfer") for each in channels]
        await asyncio.gather(*(each.channel_ready() for each in channels))
        asked: set[asyncio.Task[None]] = set()
        count, due = 0, loop.time()
        reported = due
        while not stop.is_set():
            now = loop.time()
            if tally.waiting < MAX_WAITING:
                name = draw.choices(wanted.names, weights)[0]
                method = methods[count % len(methods)]
                task = asyncio.ensure_future(
                    ask(method, name, requests[name], tally, wanted.deadline_s)
                )
                asked.add(task)
                task.add_done_callback(asked.discard)
            else:
                tally.held_back += 1
            count += 1
            if now - reported >= REPORT_S:
                reported = now
                print(json.dumps(tally.line()), flush=True)
            # What was not asked while the machine was busy is not asked all at once later.
            due = max(due + 1 / wanted.rate, now - BEHIND_S)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(0.0, due - now)):
                    await stop.wait()
        await asyncio.gather(*asked)
    print(json.dumps(tally.last_line()), flush=True)


if __name__ == "__main__":
    asyncio.run(run(Wanted(**json.loads(sys.argv[1]))))
