"""How much a model is used: what the request path counts, and a score in which old uses weigh less.

``Use`` is what one copy's requests write. A *score* is how routers and instances tell each other
of a model's past: the binary logarithm of the sum over all uses of ``2 ** (at_ms / half_life_ms)``.
It never has to be decayed: time only makes new uses weigh more, so that scores of different models
and of different processes compare at any time, and a score only grows. 0.0 is "never used".

The eviction order inside an instance ages by turnovers of its cache, not by the clock
(``mesh.core.eviction_frequency``): a score that comes with a load is turned into uses a second
(``uses_per_s``), which it merges with its own memory of the model, whichever says more.

A score means something only with the half-life that it was made with, and may come from a process
that has another one, or from one that is wrong: what cannot be (``PLAUSIBLE``) counts as unknown.
"""

from __future__ import annotations

import math
from typing import Final

# More uses than that at one instant, as a power of two, nobody makes; fewer are none.
PLAUSIBLE: Final = 40.0
NEGLIGIBLE: Final = -60.0


class Use:
    """What the request path knows of one copy. It alone writes; the cache reads."""

    __slots__ = ("in_flight", "last_used_at_ms", "uses")

    def __init__(self, last_used_at_ms: int = 0) -> None:
        self.in_flight = 0  # requests inside, queued ones included
        self.last_used_at_ms = last_used_at_ms
        self.uses = 0  # requests since it came; only grows

    def __repr__(self) -> str:
        return (
            f"Use(in_flight={self.in_flight}, uses={self.uses}, "
            f"last_used_at_ms={self.last_used_at_ms})"
        )


def score_after(score: float, uses: int, at_ms: int, half_life_ms: int) -> float:
    """``score`` with ``uses`` more of them at ``at_ms`` (Unix milliseconds)."""
    if uses <= 0:
        return score
    gain = math.log2(uses) + at_ms / half_life_ms
    if not 0.0 < score <= at_ms / half_life_ms + PLAUSIBLE:
        return gain
    high, low = (score, gain) if score > gain else (gain, score)
    return high + math.log2(1.0 + 2.0 ** (low - high))


def uses_left(score: float, now_ms: int, half_life_ms: int) -> float:
    """The number of uses just now that would be worth as much: what people can read. 0.0 for a
    score that cannot be: one of another half-life, for example."""
    exponent = score - now_ms / half_life_ms
    known = score > 0.0 and NEGLIGIBLE <= exponent <= PLAUSIBLE  # NaN is neither
    return 2.0**exponent if known else 0.0


def uses_per_s(score: float, now_ms: int, half_life_ms: int) -> float:
    """The steady rate at which such a score would have come about."""
    return uses_left(score, now_ms, half_life_ms) * math.log(2.0) * 1_000.0 / half_life_ms
