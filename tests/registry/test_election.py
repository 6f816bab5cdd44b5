"""One leader at a time, another soon after it goes, and none that cannot know."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

import pytest

from mesh.election import Election
from mesh.store.memory import MemoryServer, MemoryStore

WAIT_S = 60.0


class Candidates:
    """Elections on one server, each with its own connection."""

    def __init__(self) -> None:
        self.server = MemoryServer()
        self.stores: dict[str, MemoryStore] = {}
        self.elections: dict[str, Election] = {}
        self.heard: list[tuple[str, bool]] = []
        self._tasks: list[asyncio.Task[None]] = []

    def add(self, name: str, *, ttl_ms: int = 300) -> Election:
        def hear(leads: bool) -> None:
            self.heard.append((name, leads))

        store = self.stores[name] = MemoryStore(self.server)
        election = Election(store, name, ttl_ms=ttl_ms, on_change=hear)
        self.elections[name] = election
        self._tasks.append(asyncio.create_task(election.run()))
        return election

    @property
    def leaders(self) -> list[str]:
        return [name for name, election in self.elections.items() if election.is_leader]

    async def until(self, reached: Callable[[], bool]) -> None:
        """Turns the loop until it is so: leadership ends by time too, which nothing announces."""
        async with asyncio.timeout(WAIT_S):
            while not reached():  # noqa: ASYNC110
                await asyncio.sleep(0)

    async def until_leader(self, *names: str) -> None:
        await self.until(lambda: self.leaders == list(names))

    async def stop(self) -> None:
        for election in self.elections.values():
            await election.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


@pytest.fixture
async def candidates() -> AsyncIterator[Candidates]:
    made = Candidates()
    yield made
    await made.stop()


async def test_a_lone_candidate_leads(candidates: Candidates) -> None:
    election = candidates.add("a")
    await candidates.until_leader("a")
    assert election.leader_id == "a"
    found = candidates.server.get("leader")
    assert found is not None and found.value == b"a" and found.lease_id != 0


async def test_of_many_one_leads_and_all_know_who(candidates: Candidates) -> None:
    elections = [candidates.add(name) for name in "abcde"]
    await candidates.until(lambda: all(election.leader_id for election in elections))
    (leader,) = candidates.leaders
    assert {election.leader_id for election in elections} == {leader}
    assert candidates.heard == [(leader, True)]


async def test_resigning_hands_over_at_once(candidates: Candidates) -> None:
    candidates.add("a", ttl_ms=3_600_000)
    await candidates.until_leader("a")
    candidates.add("b", ttl_ms=3_600_000)
    await candidates.elections["a"].close()
    await candidates.until_leader("b")
    assert candidates.heard == [("a", True), ("a", False), ("b", True)]


async def test_a_cut_off_leader_steps_down_and_another_follows(candidates: Candidates) -> None:
    candidates.add("a")
    await candidates.until_leader("a")
    candidates.add("b")
    candidates.stores["a"].partition()
    await candidates.until_leader("b")
    assert not candidates.elections["a"].is_leader
    candidates.stores["a"].heal()
    await candidates.until_leader("b")
    candidates.stores["b"].partition()
    await candidates.until_leader("a")


async def test_a_lost_lease_is_replaced(candidates: Candidates) -> None:
    candidates.add("a")
    await candidates.until_leader("a")
    first = candidates.server.get("leader")
    assert first is not None
    candidates.server.expire_lease(first.lease_id)
    assert candidates.leaders == []
    await candidates.until_leader("a")
    second = candidates.server.get("leader")
    assert second is not None and second.lease_id != first.lease_id


async def test_nobody_leads_while_the_store_is_away_and_it_comes_back(
    candidates: Candidates,
) -> None:
    candidates.server.go_away()
    candidates.add("a")
    candidates.add("b")
    assert candidates.leaders == []
    candidates.server.come_back()
    await candidates.until(lambda: len(candidates.leaders) == 1)


async def test_a_write_whose_answer_was_lost_still_makes_a_leader(candidates: Candidates) -> None:
    candidates.server.fail_next(after=1, applied=True)  # the grant works, the transaction's is lost
    candidates.add("a")
    await candidates.until_leader("a")
    assert candidates.server.revision == 2  # one write was enough


async def test_a_grant_that_fails_is_tried_again(candidates: Candidates) -> None:
    candidates.server.fail_next(3)
    candidates.add("a")
    await candidates.until_leader("a")


async def test_a_stranger_under_the_key_is_respected(candidates: Candidates) -> None:
    stranger = MemoryStore(candidates.server)
    await stranger.put("leader", b"somebody")
    await stranger.put("leaderboard", b"not the key")
    election = candidates.add("a")
    await candidates.until(lambda: election.leader_id == "somebody")
    assert not election.is_leader
    await stranger.delete("leader")
    await candidates.until_leader("a")
