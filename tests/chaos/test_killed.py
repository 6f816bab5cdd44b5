"""kill -9 under steady load: of an instance, of a router of two, and of all instances at once."""

from __future__ import annotations

import os
import signal
import time

import pytest

from tests.chaos.rig import INSTANCES, Rig, Views

pytestmark = [pytest.mark.e2e, pytest.mark.etcd]


def test_a_killed_instance_costs_no_request_and_its_copies_go(rig: Rig) -> None:
    with rig.steady() as load, Views(rig.address) as views:
        load.more(200)
        victim = rig.busiest()
        dead = {holder for holder in views.holders() if holder.startswith(f"{victim}-")}
        assert dead
        pid = rig.signal(victim, signal.SIGKILL)
        killed_at = time.monotonic()
        load.until(lambda: not dead & views.holders(), "its copies going from every view")
        print(f"its copies were gone from all views after {time.monotonic() - killed_at:.1f} s")
        load.until(lambda: rig.is_replaced(victim, pid), "another process in its place")
        load.until(rig.is_whole, "a whole mesh")
        load.more(100)
    load.assert_none_failed()


def test_a_killed_router_costs_no_request_of_clients_that_follow_the_retry_policy(
    rig: Rig,
) -> None:
    """A TCP connection ends with its router, and with it the calls on it, whatever a mesh does. A
    gRPC client is told by UNAVAILABLE; gRPC's own standard retry policy, in its service config,
    sends what had no answer again, over a connection to the other router."""
    with rig.steady(retries=True, connections=8) as load:
        load.more(200)
        pid = rig.signal("router-1", signal.SIGKILL)
        load.more(200)
        load.until(lambda: rig.is_replaced("router-1", pid), "another process in its place")
        load.until(rig.is_whole, "a whole mesh")
        load.more(100)
    load.assert_none_failed()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_all_instances_killed_at_once_cost_no_request_that_may_wait_for_new_ones(rig: Rig) -> None:
    """Their records and copies stand in every view until their leases end, and all of them are
    connection refused; requests wait until new instances have come and loaded what they want."""
    children = [f"instance-{number + 1}" for number in range(INSTANCES)]
    # How long new ones take to start is the machine's, so the bound is not the default here.
    with rig.policy("placement_wait_ms=60s"), rig.steady(rate=60.0, deadline_s=60.0) as load:
        load.more(200)
        pids = {child: rig.signal(child, signal.SIGKILL) for child in children}
        load.until(
            lambda: all(rig.is_replaced(child, pid) for child, pid in pids.items()),
            "others in their place",
        )
        load.more(200)
        load.until(rig.is_whole, "a whole mesh")
    load.assert_none_failed()
