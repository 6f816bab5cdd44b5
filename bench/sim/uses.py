"""How much each model was used through one router: ``router.routes``' scores, for all at once.

The request path adds one to a list; now and then the counts become scores (``mesh.core.usage``),
vectorised, as the real router folds them a slice at a time.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from mesh.core.usage import score_after

# A score forgets by half in an hour: a minute of uses may well count as of its end.
FOLD_MS: Final = 60_000.0


class UseCounts:
    def __init__(self, models: int, half_life_ms: int) -> None:
        self.counts = [0] * models
        self._half_life_ms = half_life_ms
        self._folded = np.zeros(models, np.int64)
        self._scores = np.zeros(models, np.float64)

    def fold(self, now_ms: int) -> None:
        counts = np.array(self.counts, np.int64)
        used = np.flatnonzero(counts != self._folded)
        gain = np.log2(counts[used] - self._folded[used]) + now_ms / self._half_life_ms
        old = self._scores[used]
        self._scores[used] = np.where(old <= 0.0, gain, np.logaddexp2(old, gain))
        self._folded[used] = counts[used]

    def score(self, number: int, now_ms: int) -> float:
        fresh = self.counts[number] - int(self._folded[number])
        return score_after(float(self._scores[number]), fresh, now_ms, self._half_life_ms)
