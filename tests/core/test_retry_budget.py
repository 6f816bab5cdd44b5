"""How many requests may be sent again."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.core.policy import Policy
from mesh.core.retry_budget import STEPS, RetryBudget

WINDOW_MS = 1_000
STEP_MS = WINDOW_MS // STEPS


def policy(share: float = 0.2, least: int = 3) -> Policy:
    return Policy(
        retry_budget_share=share, retry_budget_min=least, retry_budget_window_ms=WINDOW_MS
    )


def taken(budget: RetryBudget, requests: int, now_ms: int, tries: int = 1_000) -> int:
    return sum(budget.take(requests, now_ms) for _ in range(tries))


def test_a_few_retries_are_allowed_whatever_the_traffic() -> None:
    assert taken(RetryBudget(policy(), 0), 0, 0) == 3


def test_and_a_share_of_the_requests_of_the_window() -> None:
    budget = RetryBudget(policy(), 0)
    assert taken(budget, 100, 500) == 3 + 20


def test_requests_that_are_long_past_allow_nothing() -> None:
    budget = RetryBudget(policy(), 0)
    for now_ms in range(0, 3_000, STEP_MS):
        budget.note(100, now_ms)
    assert taken(budget, 100, 3_000) == 3


def test_a_retry_is_paid_for_until_the_window_has_passed() -> None:
    budget = RetryBudget(policy(), 0)
    assert taken(budget, 0, 50) == 3
    assert taken(budget, 0, 50 + WINDOW_MS - STEP_MS) == 0
    assert taken(budget, 0, 50 + WINDOW_MS) == 3


def test_what_is_left_can_be_read_without_taking_it() -> None:
    budget = RetryBudget(policy(), 0)
    assert budget.left(10, 0) == 5
    assert budget.take(10, 0)
    assert budget.left(10, 0) == 4


def test_a_clock_that_begins_late_and_one_that_stands_are_fine() -> None:
    budget = RetryBudget(policy(), 10**12)
    assert taken(budget, 0, 10**12) == 3
    assert taken(budget, 0, 10**12 + 10**9) == 3


@pytest.mark.parametrize("window_ms", [100, 500, 20_000])
def test_a_window_of_another_length_moves_on(window_ms: int) -> None:
    budget = RetryBudget(policy(), 50_000)
    assert taken(budget, 0, 50_000) == 3
    other = Policy(retry_budget_share=0.2, retry_budget_min=3, retry_budget_window_ms=window_ms)
    budget.use_policy(other)
    assert taken(budget, 0, 50_000) == 0, "what is charged stays charged"
    assert taken(budget, 0, 50_000 + 2 * window_ms) == 3


@given(
    share=st.floats(0, 1),
    least=st.integers(0, 5),
    events=st.lists(
        st.tuples(st.integers(0, 300), st.integers(0, 20), st.integers(0, 20)), max_size=60
    ),
)
def test_no_window_has_more_retries_than_its_requests_allow(
    share: float, least: int, events: list[tuple[int, int, int]]
) -> None:
    """(time that passes, requests that come, retries that are wanted). The window that the budget
    looks at is up to a step shorter than the one that it is held to here."""
    budget = RetryBudget(policy(share, least), 0)
    now_ms = requests = 0
    came: list[tuple[int, int]] = []
    retried: list[int] = []
    for passed_ms, new, wanted in events:
        now_ms += passed_ms
        budget.note(requests, now_ms)
        requests += new
        came.append((now_ms, new))
        step = now_ms // STEP_MS
        for _ in range(wanted):
            inside = sum(n for at_ms, n in came if at_ms // STEP_MS > step - STEPS)
            before = sum(1 for at_ms in retried if at_ms // STEP_MS > step - STEPS)
            allowed = before < least + int(share * inside)
            assert budget.take(requests, now_ms) is allowed
            if allowed:
                retried.append(now_ms)
