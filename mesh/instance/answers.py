"""How a Load ended, as the pod says it; handlers.py turns it into the message of the protocol."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from mesh.core.errors import Code


class LoadOutcome(IntEnum):
    """The numbers are those of ``mesh.internal.v1.LoadResponse.Outcome``."""

    LOADED = 1
    CLAIMED_ELSEWHERE = 2
    FAILED = 3
    REJECTED = 4


@dataclass(frozen=True, slots=True)
class LoadAnswer:
    outcome: LoadOutcome
    message: str = ""
    code: Code = Code.OK  # what a client gets, when FAILED
    claimed_instance_id: str = ""
    copy_revision: int = 0
    size_bytes: int = 0
