"""How long a benchmark measures."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Effort:
    """``pairs``: interleaved rounds. ``seconds``: length of one run. ``scale``: share of the sizes
    of what is counted rather than timed (registered models, requests of a storm). ``wide``: also
    the baselines that have no target, where they would only take time."""

    pairs: int
    seconds: float
    scale: float = 1.0
    wide: bool = False

    def scaled(self, count: int, least: int = 1) -> int:
        return max(least, int(count * self.scale))


SMOKE = Effort(pairs=1, seconds=0.05, scale=0.01)  # does it run at all; the numbers mean nothing
USUAL = Effort(pairs=7, seconds=0.35)  # two minutes for everything
FULL = Effort(pairs=15, seconds=1.5, wide=True)
