"""How much a model is used: a count in which older uses weigh less.

INTERFACE: the eviction order, routers and instances share this measure, so that a model that comes
to another instance brings its past along.

``score`` is the binary logarithm of the sum over all uses of ``2 ** (at_ms / half_life_ms)``. It
never has to be decayed: time only makes new uses weigh more, so that scores of different models and
of different processes compare at any time, and a score only grows. 0.0 is "never used".
"""

from __future__ import annotations

import math


def score_after(score: float, uses: int, at_ms: int, half_life_ms: int) -> float:
    """``score`` with ``uses`` more of them at ``at_ms`` (Unix milliseconds)."""
    if uses <= 0:
        return score
    gain = math.log2(uses) + at_ms / half_life_ms
    if score <= 0.0:
        return gain
    high, low = (score, gain) if score > gain else (gain, score)
    return high + math.log2(1.0 + 2.0 ** (low - high))


def uses_left(score: float, now_ms: int, half_life_ms: int) -> float:
    """The number of uses just now that would be worth as much: what people can read."""
    exponent = score - now_ms / half_life_ms
    return 0.0 if score <= 0.0 or exponent < -60.0 else 2.0**exponent
