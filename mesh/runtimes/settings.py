"""What an operator may set for the runtimes of one process; built once, in a composition root."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class RuntimeSettings:
    """What an operator says of the runtimes of one process.

    ``allow_pickle``: joblib and pickle files run code when loaded; ``allow_python``: so does a
    ``model.py``. Only the operator may say that they may (a flag, or a ServingRuntime that lists
    the format). ``trusted_types``: types that a skops file may hold beside those that skops trusts
    itself. ``isolation``: format to whether it runs in worker processes, where that differs from
    the format's default. ``device``: ``cpu``, ``cuda``, ``cuda:1`` ... for those that have it.
    """

    intra_op_threads: int = 1
    allow_pickle: bool = False
    allow_python: bool = False
    trusted_types: tuple[str, ...] = ()
    isolation: Mapping[str, bool] = field(default_factory=dict)
    device: str = "cpu"
