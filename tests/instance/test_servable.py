"""What is learned of a model's time, and how one that waits is kept out of the event loop."""

from __future__ import annotations

from mesh.core.cache_lru import Use
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


def test_each_time_it_holds_up_the_loop_it_is_kept_out_for_longer() -> None:
    subject = servable()
    pauses = []
    for _ in range(8):
        subject.held_up_the_loop()
        pauses.append(subject.inline_pause)
    assert pauses[:4] == [16, 64, 256, 1_024]
    assert pauses[-1] == pauses[-2] == 16_384
