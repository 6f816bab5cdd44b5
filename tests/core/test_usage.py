"""Scores of use: what they say, and that one which cannot be breaks nothing."""

from __future__ import annotations

import math

import pytest

from mesh.core.usage import score_after, uses_left, uses_per_s

NOW = 1_790_000_000_000
HOUR = 3_600_000


def test_uses_fade_by_half_in_each_half_life() -> None:
    score = score_after(0.0, 8, NOW, HOUR)
    assert uses_left(score, NOW, HOUR) == pytest.approx(8)
    assert uses_left(score, NOW + 2 * HOUR, HOUR) == pytest.approx(2)
    assert uses_left(score_after(score, 2, NOW, HOUR), NOW, HOUR) == pytest.approx(10)


IMPOSSIBLE = [
    pytest.param(math.nan, id="not a number"),
    pytest.param(math.inf, id="infinite"),
    pytest.param(-math.inf, id="minus infinite"),
    pytest.param(1e300, id="absurd"),
    pytest.param(score_after(0.0, 5, NOW, HOUR // 2), id="made with a shorter half-life"),
    pytest.param(score_after(0.0, 5, NOW, HOUR * 2), id="made with a longer half-life"),
]


@pytest.mark.parametrize("score", IMPOSSIBLE)
def test_a_score_that_cannot_be_counts_as_unknown(score: float) -> None:
    assert uses_left(score, NOW, HOUR) == 0.0
    assert uses_per_s(score, NOW, HOUR) == 0.0


@pytest.mark.parametrize("score", IMPOSSIBLE)
def test_and_uses_begin_to_count_anew_on_it(score: float) -> None:
    assert uses_left(score_after(score, 4, NOW, HOUR), NOW, HOUR) == pytest.approx(4)
