"""Two candidates and one Lease, against the real API server."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from mesh.reconciler.kube import Kube, Limits
from mesh.reconciler.kube_resources import LEASES
from mesh.reconciler.lease import LeaseElection
from tests.instance.fakes import until
from tests.kube_server import KubeServer
from tests.reconciler.access import grant
from tests.store.tcp_proxy import TcpProxy

pytestmark = pytest.mark.kube

NAME = "mesh-controller"
# Long enough for nothing to run out by itself.
LONG_S = 600.0


class Candidate(LeaseElection):
    """With its task."""

    task: asyncio.Task[None]

    async def crash(self) -> None:
        """Ends without a word to anybody."""
        self.task.cancel()
        await asyncio.wait([self.task])


@asynccontextmanager
async def candidate(
    client: Kube, namespace: str, identity: str, duration_s: float = LONG_S
) -> AsyncIterator[Candidate]:
    election = Candidate(
        client,
        namespace,
        NAME,
        identity,
        duration_s=duration_s,
        renew_deadline_s=duration_s * 0.7,
        retry_s=0.05,
    )
    election.task = asyncio.create_task(election.run())
    try:
        yield election
    finally:
        await election.close()


@pytest.fixture
async def client(kube: KubeServer) -> AsyncIterator[Kube]:
    async with await Kube.connect(kube.kubeconfig()) as client:
        yield client


async def test_one_leads_and_the_other_follows_at_once_when_it_resigns(
    client: Kube, namespace: str
) -> None:
    async with (
        candidate(client, namespace, "first") as first,
        candidate(client, namespace, "second") as second,
    ):
        await until(lambda: first.is_leader or second.is_leader)
        leader, other = (first, second) if first.is_leader else (second, first)
        await until(lambda: other.leader_id == leader.leader_id)
        assert not other.is_leader
        await leader.close()
        assert not leader.is_leader
        await until(lambda: other.is_leader)
        lease = await client.get(LEASES, namespace, NAME)
        assert lease["spec"]["holderIdentity"] == ("second" if other is second else "first")
        assert lease["spec"]["leaseTransitions"] == 1
    resigned = await client.get(LEASES, namespace, NAME)
    assert resigned["spec"]["holderIdentity"] == ""


async def test_of_many_who_start_at_once_one_leads(client: Kube, namespace: str) -> None:
    async with (
        candidate(client, namespace, "a") as a,
        candidate(client, namespace, "b") as b,
        candidate(client, namespace, "c") as c,
    ):
        every = (a, b, c)
        await until(lambda: all(one.leader_id for one in every))
        # The watch may tell the winner of its own write before that write's answer does.
        await until(lambda: any(one.is_leader for one in every))
        assert [one.is_leader for one in every].count(True) == 1
        assert len({one.leader_id for one in every}) == 1


async def test_who_ends_without_a_word_is_waited_out(client: Kube, namespace: str) -> None:
    async with candidate(client, namespace, "first", 1.0) as first:
        await until(lambda: first.is_leader)
        async with candidate(client, namespace, "second", 1.0) as second:
            await until(lambda: second.leader_id == "first")
            await first.crash()
            await until(lambda: second.is_leader)
            assert not first.is_leader
            lease = await client.get(LEASES, namespace, NAME)
            assert lease["spec"]["leaseTransitions"] == 1
            # The one that was thought dead resigns late: that takes nothing from the other.
            await first.close()
            assert (await client.get(LEASES, namespace, NAME))["spec"]["holderIdentity"] == "second"


async def test_a_leader_renews_and_stays(client: Kube, namespace: str) -> None:
    async with candidate(client, namespace, "first", 1.0) as first:
        await until(lambda: first.is_leader)
        renewed = client.calls_total
        start = renewed["update", "leases", 200]
        await until(lambda: renewed["update", "leases", 200] >= start + 4)
        assert first.is_leader
        lease = await client.get(LEASES, namespace, NAME)
        assert lease["spec"].get("leaseTransitions") == 0


async def test_cut_off_it_leads_no_more_and_says_so_and_leads_again_afterwards(
    kube: KubeServer, namespace: str
) -> None:
    told: list[bool] = []
    async with TcpProxy(f"127.0.0.1:{kube.port}") as proxy:
        path = kube.kubeconfig(url=f"https://{proxy.endpoint}")
        async with await Kube.connect(path, limits=Limits(call_timeout_s=0.5)) as client:
            election = LeaseElection(
                client,
                namespace,
                NAME,
                "first",
                duration_s=1,
                renew_deadline_s=0.5,
                retry_s=0.05,
                on_change=told.append,
            )
            task = asyncio.create_task(election.run())
            await until(lambda: told == [True])
            proxy.cut()
            await until(lambda: told == [True, False])
            assert not election.is_leader
            proxy.mend()
            await until(lambda: told == [True, False, True])
            await election.close()
            assert told == [True, False, True, False]
            assert task.done()


async def test_a_foreign_hand_on_the_lease_is_believed(client: Kube, namespace: str) -> None:
    async with candidate(client, namespace, "first") as first:
        await until(lambda: first.is_leader)
        patch = {"spec": {"holderIdentity": "client-go's", "leaseDurationSeconds": 600}}
        await client.patch(LEASES, namespace, NAME, patch)
        await until(lambda: not first.is_leader)
        assert first.leader_id == "client-go's"
        await client.delete(LEASES, namespace, NAME)
        await until(lambda: first.is_leader)


async def test_without_the_right_to_a_lease_nobody_leads_and_it_is_said(
    kube: KubeServer, namespace: str, caplog: pytest.LogCaptureFixture
) -> None:
    grant(kube, namespace, "controller", LEASES, "list", "watch", "get")
    async with (
        await Kube.connect(kube.kubeconfig("controller")) as client,
        candidate(client, namespace, "first") as first,
    ):
        said = f"cannot create leases.coordination.k8s.io {NAME} in namespace {namespace}"
        await until(lambda: said in caplog.text)
        assert not first.is_leader


PROGRAM = """
import asyncio, sys
from pathlib import Path
from mesh.reconciler.kube import Kube
from mesh.reconciler.lease import LeaseElection

async def main():
    async with await Kube.connect(Path(sys.argv[1])) as client:
        election = LeaseElection(
            client, sys.argv[2], "mesh-controller", "paused", duration_s=1, renew_deadline_s=0.7,
            retry_s=0.05, on_change=lambda leads: print(leads, flush=True),
        )
        await election.run()

asyncio.run(main())
"""


async def test_a_process_that_was_paused_knows_that_it_leads_no_more(
    kube: KubeServer, client: Kube, namespace: str
) -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        PROGRAM,
        str(kube.kubeconfig()),
        namespace,
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    )
    assert process.stdout is not None
    try:
        async with asyncio.timeout(60):
            assert await process.stdout.readline() == b"True\n"
            os.kill(process.pid, signal.SIGSTOP)
            async with candidate(client, namespace, "second", 1.0) as second:
                await until(lambda: second.is_leader)
                os.kill(process.pid, signal.SIGCONT)
                assert await process.stdout.readline() == b"False\n"
                assert second.is_leader
    finally:
        process.kill()
        await process.wait()
