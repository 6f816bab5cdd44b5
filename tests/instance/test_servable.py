"""What is learned of a model's time, and how one that waits is kept out of the event loop."""

from __future__ import annotations

from mesh.core.usage import Use
from mesh.instance.servable import Servable
from mesh.runtimes.api import ModelSpec
from tests.instance.fakes import FakeModel, FakeRuntime, Path


def servable() -> Servable:
    model = FakeModel(FakeRuntime(), ModelSpec("m", "fake", Path("m")), 1)
    return Servable("m", "fake", model, Use(), 1)


def learned(*elapsed_ns: int) -> int:
    subject = servable()
    for ns in elapsed_ns:
        subject.learn(3, ns)
    return subject.estimates[3]


def test_a_slow_first_run_is_forgotten_quickly() -> None:
    assert learned(10_000_000, *[50_000] * 7) < 150_000


def test_one_lost_time_slice_does_not_make_a_quick_model_slow() -> None:
    assert learned(*[50_000] * 3, 8_000_000) < 150_000


def test_a_model_that_became_slow_is_found_out() -> None:
    assert learned(*[50_000] * 3, *[2_000_000] * 20) > 1_000_000


def test_sizes_are_learned_apart() -> None:
    subject = servable()
    subject.learn(3, 50_000)
    assert subject.estimates[9] == 0


ALLOWANCE_NS = 150_000


def hold_up(subject: Servable, quick_runs: int, elapsed_ns: int) -> int:
    """The pause after so many quick runs and one long one."""
    subject.statistics.success_count += quick_runs + 1
    subject.inline_pause = 0
    subject.held_up_the_loop(elapsed_ns, ALLOWANCE_NS)
    return subject.inline_pause


def test_each_time_it_holds_up_the_loop_it_is_kept_out_for_longer() -> None:
    subject = servable()
    pauses = [hold_up(subject, 0, 10_000_000) for _ in range(8)]
    assert pauses[:4] == [16, 64, 256, 1_024]
    assert pauses[-1] == pauses[-2] == 16_384


def test_a_lost_time_slice_among_many_quick_runs_changes_nothing() -> None:
    subject = servable()
    assert [hold_up(subject, 100, 5_000_000) for _ in range(20)] == [0] * 20


def test_quick_runs_in_threads_pay_for_nothing() -> None:
    subject = servable()
    subject.statistics.success_count = subject.statistics.queue_count = 1_000
    assert hold_up(subject, 0, 5_000_000) == 16


def test_quick_runs_pay_once_and_for_a_bounded_time() -> None:
    subject = servable()
    assert hold_up(subject, 1_000_000, 50_000_000) == 0
    assert hold_up(subject, 0, 50_000_000) == 16


def test_a_model_that_recovers_is_kept_out_briefly_the_next_time() -> None:
    subject = servable()
    for _ in range(8):
        hold_up(subject, 0, 10_000_000)
    assert hold_up(subject, 100, 2_000_000) == 0
    assert hold_up(subject, 0, 20_000_000) == 16
