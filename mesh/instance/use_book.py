"""How the models of this instance were used: told to the store, and along with loads elsewhere.

The request path only counts (``mesh.core.usage.Use``); here the counts become scores
(``mesh.core.usage``), as of the last use, whenever somebody asks. Copies that leave are remembered
until the next flush. Holds nothing of models that are not here otherwise.
"""

from __future__ import annotations

from collections.abc import Iterable

from mesh.core.cache_table import Copy
from mesh.core.types import CopyState
from mesh.core.usage import score_after


class UseBook:
    """Scores are comparable as long as ``half_life_ms`` stays the same."""

    def __init__(self) -> None:
        self._counted: dict[str, tuple[int, float]] = {}  # uses that are in the score, score
        self._left_at_ms: dict[str, int] = {}  # last uses of copies that went since the last flush
        self._left_scores: dict[str, float] = {}

    def score(self, copy: Copy, half_life_ms: int) -> float:
        """0.0: never used, here or elsewhere."""
        counted, score = self._counted.get(copy.model_id, (0, copy.use_score))
        fresh = copy.use.uses - counted
        if fresh > 0:
            score = score_after(score, fresh, copy.use.last_used_at_ms, half_life_ms)
            self._counted[copy.model_id] = (copy.use.uses, score)
        return score

    def leaves(self, copy: Copy, half_life_ms: int) -> None:
        """Its requests are counted for the last time."""
        if copy.use.last_used_at_ms:
            self._left_at_ms[copy.model_id] = copy.use.last_used_at_ms
            if score := self.score(copy, half_life_ms):
                self._left_scores[copy.model_id] = score
        self._counted.pop(copy.model_id, None)

    def flush(
        self, copies: Iterable[Copy], half_life_ms: int
    ) -> tuple[dict[str, int], dict[str, float]]:
        """Last uses (Unix milliseconds) and scores, of what is here and of what went."""
        uses, self._left_at_ms = self._left_at_ms, {}
        scores, self._left_scores = self._left_scores, {}
        for copy in copies:
            if copy.state is CopyState.LOADED and copy.use.last_used_at_ms:
                uses[copy.model_id] = copy.use.last_used_at_ms
                if score := self.score(copy, half_life_ms):
                    scores[copy.model_id] = score
        return uses, scores
