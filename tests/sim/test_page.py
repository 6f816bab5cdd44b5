"""The page of the simulator's results tells what the results tell."""

from __future__ import annotations

from bench.sim.page import PAGE, RESULTS, page


def test_the_page_in_the_tree_is_made_from_the_results_in_the_tree() -> None:
    """After new results: ``python -m bench.sim.page``."""
    assert (RESULTS / PAGE).read_text() == page(RESULTS)
