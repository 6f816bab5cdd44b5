"""What signals mean to `mesh up`, with a supervisor that only takes notes."""

from __future__ import annotations

import pytest

from mesh.up.run import StopRequests


class Notes:
    def __init__(self) -> None:
        self.taken: list[str] = []

    def ask_stop(self) -> None:
        self.taken.append("stop")

    def ask_kill(self) -> None:
        self.taken.append("kill")


INT, TERM = True, False


@pytest.mark.parametrize(
    ("signals", "expected"),
    [
        ([(0.0, TERM)], ["stop"]),
        ([(0.0, INT), (0.1, INT)], ["stop"]),
        ([(0.0, INT), (0.6, INT)], ["stop", "kill"]),
        ([(0.0, TERM), (0.6, INT)], ["stop", "kill"]),
        ([(0.0, INT), (0.6, TERM), (9.0, TERM)], ["stop"]),
    ],
    ids=[
        "one stops",
        "one that arrives twice is one",
        "a second Ctrl-C kills",
        "a Ctrl-C after SIGTERM kills",
        "SIGTERM never kills",
    ],
)
def test_signals(signals: list[tuple[float, bool]], expected: list[str]) -> None:
    notes, now = Notes(), 0.0
    requests = StopRequests(notes, lambda: now)
    for at, impatient in signals:
        now = at
        requests.ask(impatient=impatient)
    assert notes.taken == expected
