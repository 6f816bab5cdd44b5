"""How many reads a download has at once."""

from __future__ import annotations

import pytest

from puller.ramp import Ramp


def test_a_store_that_makes_wait_gets_all_reads_by_doubling() -> None:
    ramp = Ramp(8, started_s=100.0)
    added = []
    for look in range(1, 6):
        ramp.busy_s = 0.001 * look
        added.append(ramp.more(100.0 + 0.025 * look))
    assert added == [1, 2, 4, 0, 0]
    assert ramp.reads == 8


@pytest.mark.parametrize(("share", "reads"), [(0.24, 2), (0.25, 1), (0.5, 1)])
def test_a_store_that_keeps_one_read_busy_gets_one(share: float, reads: int) -> None:
    ramp = Ramp(8, started_s=0.0, busy_s=share)
    ramp.more(1.0)
    assert ramp.reads == reads


@pytest.mark.parametrize(
    ("share", "reads", "left"), [(0.5, 8, 8), (0.61, 8, 7), (4.0, 2, 1), (4.0, 1, 1)]
)
def test_where_reads_wait_for_this_machine_one_ends(share: float, reads: int, left: int) -> None:
    ramp = Ramp(8, started_s=0.0, reads=reads, busy_s=share)
    assert ramp.one_less(1.0) == (left < reads)
    assert ramp.reads == left


def test_no_more_than_the_limit() -> None:
    ramp = Ramp(5, started_s=0.0)
    while ramp.more(1.0):
        pass
    assert ramp.reads == 5
