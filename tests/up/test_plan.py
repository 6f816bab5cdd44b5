"""The supervision plan as a table of stories: events in, instructions out."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.up.plan import (
    AllReady,
    BecameReady,
    Begin,
    ChildSpec,
    Event,
    Exited,
    Finished,
    GaveUp,
    Instruction,
    Kill,
    KillAsked,
    Phase,
    RestartPolicy,
    Start,
    StopAsked,
    Supervision,
    Terminate,
    Tick,
    WillRestart,
    restart_delay_ms,
)

POLICY = RestartPolicy(
    first_delay_ms=100, factor=2, max_delay_ms=500, stable_after_ms=10_000, stop_grace_ms=5_000
)
SPECS = (
    ChildSpec("etcd", start_stage=0, stop_stage=2),
    ChildSpec("router-1", start_stage=1, stop_stage=0),
    ChildSpec("instance-1", start_stage=1, stop_stage=1),
)
READY_ALL: tuple[tuple[int, Event], ...] = (
    (0, Begin()),
    (0, BecameReady("etcd")),
    (0, BecameReady("router-1")),
    (0, BecameReady("instance-1")),
)

Story = list[tuple[int, Event, list[Instruction]]]


def told(plan: Supervision, events: tuple[tuple[int, Event], ...]) -> list[Instruction]:
    return [step for now_ms, event in events for step in plan.handle(event, now_ms)]


STORIES: dict[str, Story] = {
    "starts etcd first, the others when it is ready, and says so when all are": [
        (0, Begin(), [Start("etcd", 0)]),
        (5, BecameReady("etcd"), [Start("router-1", 0), Start("instance-1", 0)]),
        (9, BecameReady("instance-1"), []),
        (9, BecameReady("router-1"), [AllReady(again=False)]),
    ],
    "a child that dies before it was ready is started again with growing waits": [
        (0, Begin(), [Start("etcd", 0)]),
        (10, Exited("etcd", 1), [WillRestart("etcd", 1, 100)]),
        (110, Tick(), [Start("etcd", 1)]),
        (120, Exited("etcd", -9), [WillRestart("etcd", -9, 200)]),
        (319, Tick(), []),
        (320, Tick(), [Start("etcd", 2)]),
        (330, Exited("etcd", None), [WillRestart("etcd", None, 400)]),
        (730, Tick(), [Start("etcd", 3)]),
        (740, Exited("etcd", 1), [WillRestart("etcd", 1, 500)]),
    ],
    "a child that says its settings are wrong stops everything and fails it": [
        (0, Begin(), [Start("etcd", 0)]),
        (5, BecameReady("etcd"), [Start("router-1", 0), Start("instance-1", 0)]),
        (
            6,
            Exited("router-1", 2),
            [GaveUp("router-1", 2, "its settings are wrong"), Terminate("instance-1")],
        ),
        (7, Exited("instance-1", 0), [Terminate("etcd")]),
        (8, Exited("etcd", 0), [Finished(failed=True)]),
    ],
    "a child that cannot be got ready at the first start is given up": [
        (0, Begin(), [Start("etcd", 0)]),
        *(
            step
            for attempt in range(1, POLICY.first_deaths_max)
            for step in (
                (
                    attempt * 1_000,
                    Exited("etcd", 1),
                    [WillRestart("etcd", 1, restart_delay_ms(attempt - 1, POLICY))],
                ),
                (attempt * 1_000 + 500, Tick(), [Start("etcd", attempt)]),
            )
        ),
        (
            9_000,
            Exited("etcd", 1),
            [
                GaveUp("etcd", 1, "it died 6 times before the mesh was complete"),
                Finished(failed=True),
            ],
        ),
    ],
    "etcd that dies early keeps the others waiting and no longer": [
        (0, Begin(), [Start("etcd", 0)]),
        (1, Exited("etcd", 1), [WillRestart("etcd", 1, 100)]),
        (101, Tick(), [Start("etcd", 1)]),
        (150, BecameReady("etcd"), [Start("router-1", 0), Start("instance-1", 0)]),
    ],
    "a stop before anything is ready stops what runs and starts nothing more": [
        (0, Begin(), [Start("etcd", 0)]),
        (1, StopAsked(), [Terminate("etcd")]),
        (2, BecameReady("etcd"), []),
        (3, Exited("etcd", 0), [Finished(failed=False)]),
    ],
    "a stop while a child waits for its restart does not start it again": [
        (0, Begin(), [Start("etcd", 0)]),
        (1, Exited("etcd", 1), [WillRestart("etcd", 1, 100)]),
        (2, StopAsked(), [Finished(failed=False)]),
        (200, Tick(), []),
    ],
}


@pytest.mark.parametrize("story", STORIES.values(), ids=STORIES.keys())
def test_story(story: Story) -> None:
    plan = Supervision(SPECS, POLICY)
    for now_ms, event, expected in story:
        assert plan.handle(event, now_ms) == expected, (now_ms, event)


AFTER_READY: dict[str, Story] = {
    "routers stop first, then instances, then etcd": [
        (100, StopAsked(), [Terminate("router-1")]),
        (200, Exited("router-1", 0), [Terminate("instance-1")]),
        (300, Exited("instance-1", 0), [Terminate("etcd")]),
        (400, Exited("etcd", 0), [Finished(failed=False)]),
    ],
    "asking to stop twice changes nothing": [
        (100, StopAsked(), [Terminate("router-1")]),
        (101, StopAsked(), []),
    ],
    "a child that does not stop in time is killed, and the order goes on": [
        (100, StopAsked(), [Terminate("router-1")]),
        (5_099, Tick(), []),
        (5_100, Tick(), [Kill("router-1", "did not stop within 5 s")]),
        (5_101, Exited("router-1", -9), [Terminate("instance-1")]),
    ],
    "asking to kill kills all that live, at once": [
        (
            100,
            KillAsked(),
            [Kill(name, "asked for twice") for name in ("etcd", "router-1", "instance-1")],
        ),
        (101, Exited("etcd", -9), []),
        (101, Exited("router-1", -9), []),
        (101, Exited("instance-1", -9), [Finished(failed=False)]),
    ],
    "a kill after a polite stop reaches those that were asked and those that were not": [
        (100, StopAsked(), [Terminate("router-1")]),
        (
            150,
            KillAsked(),
            [Kill(name, "asked for twice") for name in ("etcd", "router-1", "instance-1")],
        ),
    ],
    "a child that dies while others are being stopped is not started again": [
        (100, StopAsked(), [Terminate("router-1")]),
        (110, Exited("instance-1", 1), []),
        (120, Exited("router-1", 0), [Terminate("etcd")]),
    ],
    "one that comes back makes the mesh complete again": [
        (100, Exited("router-1", -11), [WillRestart("router-1", -11, 100)]),
        (200, Tick(), [Start("router-1", 1)]),
        (250, BecameReady("router-1"), [AllReady(again=True)]),
    ],
    "deaths are forgotten once a child was ready for long enough": [
        (1_000, Exited("router-1", 1), [WillRestart("router-1", 1, 100)]),
        (1_100, Tick(), [Start("router-1", 1)]),
        (1_200, BecameReady("router-1"), [AllReady(again=True)]),
        (2_000, Exited("router-1", 1), [WillRestart("router-1", 1, 200)]),
        (2_200, Tick(), [Start("router-1", 2)]),
        (2_300, BecameReady("router-1"), [AllReady(again=True)]),
        (12_300, Exited("router-1", 1), [WillRestart("router-1", 1, 100)]),
    ],
    "a mesh that was complete once never gives a child up": [
        step
        for attempt in range(20)
        for step in (
            (
                attempt * 1_000,
                Exited("router-1", 1),
                [WillRestart("router-1", 1, restart_delay_ms(attempt, POLICY))],
            ),
            (attempt * 1_000 + 500, Tick(), [Start("router-1", attempt + 1)]),
        )
    ],
    "etcd that dies leaves routers and instances running": [
        (100, Exited("etcd", -9), [WillRestart("etcd", -9, 100)]),
        (200, Tick(), [Start("etcd", 1)]),
        (300, BecameReady("etcd"), [AllReady(again=True)]),
    ],
}


@pytest.mark.parametrize("story", AFTER_READY.values(), ids=AFTER_READY.keys())
def test_story_of_a_mesh_that_is_ready(story: Story) -> None:
    plan = Supervision(SPECS, POLICY)
    told(plan, READY_ALL)
    for now_ms, event, expected in story:
        assert plan.handle(event, now_ms) == expected, (now_ms, event)


@pytest.mark.parametrize("phase", [Phase.WAITING, Phase.BACKOFF, Phase.STOPPED])
def test_an_exit_of_what_does_not_run_is_a_defect(phase: Phase) -> None:
    plan = Supervision(SPECS, POLICY)
    if phase is not Phase.WAITING:
        plan.handle(Begin(), 0)
        plan.handle(Exited("etcd", 1), 0)
    if phase is Phase.STOPPED:
        plan.handle(StopAsked(), 0)
    assert plan.phase("etcd") is phase
    with pytest.raises(ValueError, match="etcd does not run"):
        plan.handle(Exited("etcd", 1), 1)


def test_the_next_due_time_is_the_earliest_and_goes_when_it_was_used() -> None:
    plan = Supervision(SPECS, POLICY)
    told(plan, READY_ALL)
    assert plan.next_due_ms() is None
    plan.handle(Exited("router-1", 1), 1_000)
    plan.handle(Exited("instance-1", 1), 900)
    assert plan.next_due_ms() == 1_000
    plan.handle(Tick(), 1_000)
    assert plan.next_due_ms() == 1_100
    plan.handle(Tick(), 1_100)
    assert plan.next_due_ms() is None


@given(st.integers(min_value=0, max_value=10_000))
def test_the_wait_grows_and_stays_bounded(deaths: int) -> None:
    wait_ms = restart_delay_ms(deaths, POLICY)
    assert POLICY.first_delay_ms <= wait_ms <= POLICY.max_delay_ms
    assert restart_delay_ms(deaths + 1, POLICY) >= wait_ms


@given(st.data())
def test_any_order_of_events_ends_with_everything_stopped(data: st.DataObject) -> None:
    """Play a world that obeys the instructions, with deaths at random, then stop it."""
    plan = Supervision(SPECS, POLICY)
    running: set[str] = set()
    finished: list[Finished] = []
    now_ms = 0

    def obey(event: Event) -> None:
        for step in plan.handle(event, now_ms):
            assert not finished, "nothing follows the end"
            match step:
                case Start(name):
                    assert name not in running, "a child is never started twice"
                    running.add(name)
                case Terminate(name) | Kill(name):
                    assert name in running, "only what runs is signalled"
                case Finished():
                    assert not running
                    finished.append(step)

    obey(Begin())
    for _ in range(data.draw(st.integers(0, 30))):
        now_ms += data.draw(st.integers(0, 2_000))
        choice = data.draw(st.sampled_from(["ready", "exit", "tick", "stop", "kill"]))
        if choice in ("ready", "exit") and running:
            name = data.draw(st.sampled_from(sorted(running)))
            if choice == "ready":
                obey(BecameReady(name))
            else:
                running.discard(name)
                obey(Exited(name, data.draw(st.sampled_from([0, 1, 2, -9]))))
        elif choice == "tick":
            obey(Tick())
        elif choice == "stop" and data.draw(st.booleans()):
            obey(StopAsked())
        elif choice == "kill" and data.draw(st.booleans()):
            obey(KillAsked())
    obey(StopAsked())
    for _ in range(len(SPECS) + 1):
        now_ms += POLICY.stop_grace_ms
        for name in sorted(running):
            if plan.phase(name) is Phase.STOPPING:
                running.discard(name)
                obey(Exited(name, 0))
    assert finished and not running
