"""The network between a router and its instances: slow, cut, and swallowing everything.

Each instance tells an address of its own (127.0.0.2 and so on) at which a proxy listens. Its lease
stands all the time: nobody but the router can know that it does not answer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.chaos.proxies import ThreadedProxy
from tests.chaos.rig import readiness
from tests.chaos.steady import WAIT_S, Steady
from tests.e2e.asking import Asker, eventually, isvc, total
from tests.e2e.processes import Server, serving
from tests.etcd_server import EtcdServer, free_port

pytestmark = [pytest.mark.e2e, pytest.mark.etcd]

MODELS = 8  # all of them fit into either instance
CAPACITY = "8MiB"
# Much longer than anybody waits for a PING's answer.
FOR_EVER_S = 3_600.0


@dataclass(frozen=True)
class Linked:
    """A router and two instances, each behind its ``links`` proxy."""

    address: str
    names: list[str]
    instances: list[Server]
    links: list[ThreadedProxy]

    def steady(self) -> Steady:
        return Steady(self.address, self.names, rate=100, skew=0)

    def answered(self, at: int) -> float:
        """Inference requests that the instance has answered."""
        return total([self.instances[at].metrics], "modelmesh_invoke_model_milliseconds_count")


@pytest.fixture(scope="module")
def linked(
    sound_etcd: EtcdServer, chaos_samples: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Linked]:
    folder = tmp_path_factory.mktemp("links")
    etcd = sound_etcd.endpoint
    namespace = ("--namespace", "links")
    grpc_port = str(free_port())
    with contextlib.ExitStack() as stack:
        links, instances = [], []
        for number in (2, 3):
            port, listens = str(free_port()), f"127.0.0.{number}"
            link = ThreadedProxy(f"127.0.0.1:{port}", f"{listens}:{port}")
            links.append(stack.enter_context(link))
            flags = ("--grpc-port", port, "--advertise", listens, "--capacity", CAPACITY)
            files = ("--file-root", str(chaos_samples), "--cache-dir", str(folder / listens))
            server = serving(folder, "instance", etcd, *namespace, *flags, *files)
            instances.append(stack.enter_context(server))
        ports = ("--grpc-port", grpc_port, "--rest-port", "0")
        router = stack.enter_context(serving(folder, "router", etcd, *namespace, *ports))
        for server in (*instances, router):
            eventually(server.is_ready, "readiness", WAIT_S)
        eventually(
            lambda: readiness(router.metrics).get("instances") == 2,
            "both instances in the router's view",
            WAIT_S,
        )
        address = f"127.0.0.1:{grpc_port}"
        names = [f"link-{number}" for number in range(MODELS)]
        with Asker(address) as ask:
            for number, name in enumerate(names):
                ask.apply(isvc(name, (chaos_samples / f"digits-{number % 4 + 1:04d}").as_uri()))
        yield Linked(address, names, instances, links)
        for link in links:
            link.mend()
            link.delay(0.0)


def test_slow_and_cut_links_cost_no_request(linked: Linked) -> None:
    with linked.steady() as load:
        load.more(100)
        for link in linked.links:
            for delay_s in (0.02, 0.2):
                link.delay(delay_s)
                load.more(50)
                link.cut()
                load.more(50)
                link.mend()
            link.delay(0.0)
            load.more(100)
    load.assert_none_failed()


def test_an_instance_that_takes_connections_and_never_answers_is_passed_over_and_taken_back(
    linked: Linked,
) -> None:
    with linked.steady() as load:
        load.more(100)
        link = linked.links[0]
        link.delay(FOR_EVER_S)
        load.more(300)  # of which some half would have gone there
        before = linked.answered(0)
        load.more(100)
        assert linked.answered(0) == before, "it is passed over"
        link.delay(0.0)  # what it has swallowed stays swallowed; new connections lead through
        load.until(lambda: linked.answered(0) > before, "a request going there again")
        load.more(100)
    load.assert_none_failed()
