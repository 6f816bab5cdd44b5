"""Everything is replaced, one process after the other, under steady load."""

from __future__ import annotations

import signal

import pytest

from tests.chaos.rig import INSTANCES, ROUTERS, Rig

pytestmark = [pytest.mark.e2e, pytest.mark.etcd]


def test_a_rolling_restart_of_everything_costs_no_request(rig: Rig) -> None:
    children = [f"instance-{n + 1}" for n in range(INSTANCES)]
    children += [f"router-{n + 1}" for n in range(ROUTERS)]
    told = len(rig.mesh.err)
    with rig.steady() as load:
        load.more(200)
        for child in children:
            pid = rig.signal(child, signal.SIGTERM)
            load.until(
                lambda child=child, pid=pid: rig.is_replaced(child, pid),  # type: ignore[misc]
                f"another {child}",
            )
            load.until(rig.is_whole, "a whole mesh")
            load.more(50)
    load.assert_none_failed()
    assert "killed" not in rig.mesh.err[told:], "each ended by itself, in time"
