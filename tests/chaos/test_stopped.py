"""SIGSTOP under steady load: an instance whose connections stand and that answers nothing."""

from __future__ import annotations

import os
import signal

import pytest

from tests.chaos.rig import Rig, Views

pytestmark = [pytest.mark.e2e, pytest.mark.etcd]


def test_an_instance_that_stands_still_for_less_than_its_lease_costs_no_request(rig: Rig) -> None:
    with rig.steady() as load:
        load.more(200)
        victim = rig.busiest()
        pid = rig.signal(victim, signal.SIGSTOP)
        try:
            load.for_seconds(5)
        finally:
            os.kill(pid, signal.SIGCONT)
        load.more(200)
        load.until(rig.is_whole, "a whole mesh")
        assert rig.pid(victim) == pid, "nobody had to restart it"
    load.assert_none_failed()


def test_an_instance_that_stands_still_beyond_its_lease_costs_no_request(rig: Rig) -> None:
    with rig.steady() as load, Views(rig.address) as views:
        load.more(200)
        victim = rig.busiest()
        same = {holder for holder in views.holders() if holder.startswith(f"{victim}-")}
        pid = rig.signal(victim, signal.SIGSTOP)
        try:
            load.for_seconds(15)
            load.until(lambda: not same & views.holders(), "its copies going from every view")
        finally:
            os.kill(pid, signal.SIGCONT)
        load.until(rig.is_whole, "its return")
        load.until(lambda: bool(same & views.holders()), "copies on it, under the id that it had")
        load.more(100)
        assert rig.pid(victim) == pid, "nobody had to restart it"
    load.assert_none_failed()
