"""What an isolated model's process may do, and why one was ended: plain values.

Decides no time-out and sends no signal; turns what the kernel says of a process into a sentence.
"""

from __future__ import annotations

import signal
from dataclasses import dataclass

from mesh.core.errors import Code
from mesh.wire.limits import INSIDE


@dataclass(frozen=True, slots=True)
class IsolationLimits:
    """Bounds of each worker. Bytes, counts, milliseconds as named.

    ``worker_memory_bytes``: resident beyond what the fork server holds, which is shared.
    """

    worker_memory_bytes: int
    load_timeout_ms: int = 180_000
    infer_timeout_ms: int = 300_000
    # The event loop of a busy worker may be quiet for so long while it uses no processor time.
    silence_timeout_ms: int = 30_000
    # An inference whose client has gone may go on for so long: it holds a thread.
    abandoned_timeout_ms: int = 30_000
    # A busy worker is asked so often how long its inferences have been inside.
    ping_every_ms: int = 1_000
    # From SIGTERM to SIGKILL: the model's own unload has a second of it.
    unload_timeout_ms: int = 2_000
    # So many ends within so long, and the model is given up here.
    crashes_max: int = 3
    crash_window_ms: int = 60_000
    # A request waits so long for a model that is being brought back.
    replacing_wait_ms: int = 30_000
    inference_threads: int = 2
    # Requests that one worker is given at once: enough for its own batches.
    requests_max: int = 256
    max_message_bytes: int = INSIDE.max_message_bytes

    def __post_init__(self) -> None:
        if self.worker_memory_bytes < 1 << 20:
            raise ValueError(
                f"IsolationLimits.worker_memory_bytes is {self.worker_memory_bytes}; a model's "
                "process needs at least 1 MiB of its own"
            )
        if self.inference_threads < 1:
            raise ValueError("IsolationLimits.inference_threads must be at least 1")


@dataclass(frozen=True, slots=True)
class Cause:
    """Why a process is no more. ``text`` goes on "its process ...".

    ``code`` is what requests fail with that were inside; ``load_code`` what a load does.
    ``model_at_fault``: it counts against the model.
    """

    text: str
    code: Code
    load_code: Code = Code.FAILED_PRECONDITION
    model_at_fault: bool = True


def cause_of_exit(exit_code: int) -> Cause:
    """Of a process that nobody here has ended. ``exit_code`` is negative for a signal."""
    if exit_code >= 0:
        return Cause(f"ended by itself with exit status {exit_code}", Code.INTERNAL)
    try:
        name = signal.Signals(-exit_code).name
    except ValueError:
        name = f"signal {-exit_code}"
    if -exit_code == signal.SIGKILL:
        text = "was killed by SIGKILL from outside, most likely because the machine had no memory"
        return Cause(text, Code.RESOURCE_EXHAUSTED, Code.UNAVAILABLE)
    return Cause(f"crashed: killed by {name}", Code.INTERNAL)


FORK_SERVER_LOST = Cause(
    "ended with its fork server", Code.UNAVAILABLE, Code.UNAVAILABLE, model_at_fault=False
)


def too_much_memory(limit_bytes: int) -> Cause:
    return Cause(
        f"was ended because it needed more than {limit_bytes:,} bytes of memory (the limit of a "
        "model's process: worker memory)",
        Code.RESOURCE_EXHAUSTED,
        Code.RESOURCE_EXHAUSTED,
    )


def load_took_too_long(timeout_ms: int) -> Cause:
    text = f"was ended because its load had not finished after {timeout_ms / 1e3:g} s"
    return Cause(text, Code.UNAVAILABLE, Code.UNAVAILABLE)


def inference_took_too_long(timeout_ms: int) -> Cause:
    text = f"was ended because an inference had run for more than {timeout_ms / 1e3:g} s"
    return Cause(text, Code.DEADLINE_EXCEEDED)


def silent(quiet_ms: int) -> Cause:
    text = f"was ended because it hung: it had not answered for {quiet_ms / 1e3:g} s"
    return Cause(text, Code.DEADLINE_EXCEEDED)


def abandoned(timeout_ms: int) -> Cause:
    text = (
        f"was ended because an inference went on for {timeout_ms / 1e3:g} s after its client "
        "had gone"
    )
    return Cause(text, Code.DEADLINE_EXCEEDED)
