"""Scores of use, from what the request path counts."""

from __future__ import annotations

from mesh.core.cache_events import LoadWanted
from mesh.core.cache_table import Copy
from mesh.core.types import CopyState
from mesh.core.usage import score_after, uses_left
from mesh.instance.use_book import UseBook

HOUR_MS = 3_600_000
NOW = 1_700_000_000_000


def copy_of(model_id: str, *, uses: int = 0, used_at_ms: int = 0, score: float = 0.0) -> Copy:
    wanted = LoadWanted(model_id, 1, 1_000, used_at_ms, use_score=score)
    copy = Copy(wanted, 1, 1, NOW)
    copy.state = CopyState.LOADED
    copy.use.uses = uses
    return copy


def test_uses_become_a_score_as_of_the_last_one() -> None:
    book, copy = UseBook(), copy_of("m", uses=8, used_at_ms=NOW)
    assert round(uses_left(book.score(copy, HOUR_MS), NOW, HOUR_MS), 6) == 8


def test_what_was_counted_is_not_counted_again() -> None:
    book, copy = UseBook(), copy_of("m", uses=8, used_at_ms=NOW)
    first = book.score(copy, HOUR_MS)
    assert book.score(copy, HOUR_MS) == first
    copy.use.uses, copy.use.last_used_at_ms = 10, NOW + HOUR_MS
    assert book.score(copy, HOUR_MS) == score_after(first, 2, NOW + HOUR_MS, HOUR_MS)


def test_the_past_elsewhere_counts_on() -> None:
    past = score_after(0.0, 100, NOW, HOUR_MS)
    copy = copy_of("m", uses=1, used_at_ms=NOW, score=past)
    assert UseBook().score(copy, HOUR_MS) == score_after(past, 1, NOW, HOUR_MS)
    assert UseBook().score(copy_of("m", score=past), HOUR_MS) == past


def test_a_flush_tells_of_what_is_here_and_once_of_what_went() -> None:
    book = UseBook()
    here, gone = copy_of("here", uses=1, used_at_ms=NOW), copy_of("gone", uses=2, used_at_ms=NOW)
    book.leaves(gone, HOUR_MS)
    uses, scores = book.flush([here, copy_of("unused")], HOUR_MS)
    assert uses == {"here": NOW, "gone": NOW}
    assert scores.keys() == {"here", "gone"}
    assert scores["gone"] > scores["here"]
    assert book.flush([here], HOUR_MS)[0] == {"here": NOW}


def test_a_copy_that_comes_again_is_counted_from_its_own_beginning() -> None:
    book, first = UseBook(), copy_of("m", uses=50, used_at_ms=NOW)
    book.score(first, HOUR_MS)
    book.leaves(first, HOUR_MS)
    again = copy_of("m", uses=1, used_at_ms=NOW)
    assert book.score(again, HOUR_MS) == score_after(0.0, 1, NOW, HOUR_MS)
