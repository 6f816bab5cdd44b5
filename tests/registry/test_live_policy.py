"""The live override of the policy: followed at each change, and never into nonsense."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import pytest

from mesh.core.policy import Policy, overridden
from mesh.decision_log import DecisionLog
from mesh.live_policy import LivePolicy

BASE = overridden(Policy(), {"load_slots": 4})


class World:
    def __init__(self) -> None:
        self.applied: list[Policy] = []
        self.decisions = DecisionLog(now_ms=lambda: 1)
        self.live = LivePolicy(BASE, self.applied.append, self.decisions)

    def read(self, *values: Mapping[str, object] | None) -> list[int]:
        """The hops_max of what was applied."""
        for value in values:
            self.live.read(value)
        return [policy.hops_max for policy in self.applied]

    def reasons(self) -> list[str]:
        return [decision.reason for decision in reversed(self.decisions.decisions.recent(9))]


@pytest.mark.parametrize(
    ("sentence", "values", "hops", "reasons"),
    [
        ("nothing in the store is no change", [None, {}, None], [], []),
        ("an override is applied", [{"hops_max": 7}], [7], ["changed"]),
        ("the same again is no change", [{"hops_max": 7}, {"hops_max": 7}], [7], ["changed"]),
        ("what it is anyway is no change", [{"hops_max": BASE.hops_max}], [], []),
        ("taken away, what it was started with holds again", [{"hops_max": 7}, None],
         [7, BASE.hops_max], ["changed", "changed"]),
        ("nonsense changes nothing", [{"hops_max": 0}], [], ["refused"]),
        ("nonsense leaves the last good one", [{"hops_max": 7}, {"hops_max": 0}], [7],
         ["changed", "refused"]),
        ("one wrong value spoils the others beside it", [{"hops_max": 7, "drain_moves": 0}], [],
         ["refused"]),
        ("a name of another version is passed over and the rest holds", [{"hops_max": 7, "x": 1}],
         [7], ["changed"]),
        ("a name of another version alone is no change", [{"x": 1}], [], []),
        ("beside a name of another version nonsense is refused all the same",
         [{"hops_max": 0, "x": 1}], [], ["refused"]),
        ("mended, it is applied", [{"hops_max": 0}, {"hops_max": 8}], [8], ["refused", "changed"]),
    ],
)  # fmt: skip
def test_a_sequence_of_values_in_the_store(
    sentence: str, values: list[Mapping[str, object] | None], hops: list[int], reasons: list[str]
) -> None:
    world = World()
    assert world.read(*values) == hops
    assert world.reasons() == reasons
    assert all(policy.load_slots == 4 for policy in world.applied)


def test_nonsense_is_logged_once_with_the_field(caplog: pytest.LogCaptureFixture) -> None:
    world = World()
    world.read({"hops_max": 0}, {"hops_max": 0}, {"hops_max": 0})
    errors = [r.getMessage() for r in caplog.records if r.levelno >= logging.ERROR]
    assert len(errors) == 1
    assert "policy.hops_max" in errors[0]


def test_a_name_of_another_version_is_warned_about_once(caplog: pytest.LogCaptureFixture) -> None:
    world = World()
    world.read({"newer": 1, "hops_max": 7}, {"newer": 1, "hops_max": 8}, {"newer": 2})
    warnings = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert len(warnings) == 1
    assert "newer" in warnings[0]
    assert world.live.unknown == ("newer",)
    assert dict(world.live.overrides) == {}
