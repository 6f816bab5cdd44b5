"""The HTTP listeners: what a drain does to connections that wait, serve, or are kept."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator

import aiohttp
import pytest
from aiohttp import web

from router.listeners import HttpListener
from tests.instance.fakes import until

WAIT_S = 60.0


class Site:
    def __init__(self) -> None:
        self.held = asyncio.Event()
        self.entered = asyncio.Event()
        app = web.Application()
        app.router.add_get("/now", self._now)
        app.router.add_post("/now", self._now)
        app.router.add_get("/held", self._held)
        self.listener = HttpListener(app, drain_timeout_s=WAIT_S)

    async def _now(self, request: web.Request) -> web.Response:
        return web.Response(text="answered")

    async def _held(self, request: web.Request) -> web.Response:
        self.entered.set()
        await self.held.wait()
        return web.Response(text="answered late")


@pytest.fixture
async def site() -> AsyncIterator[Site]:
    site = Site()
    yield site
    site.held.set()
    await site.listener.drain()


def _read_all(sock: socket.socket) -> bytes:
    found = b""
    while piece := sock.recv(1 << 16):
        found += piece
    return found


async def test_whoever_waits_in_the_backlog_at_a_drain_is_answered(site: Site) -> None:
    port = await site.listener.start("127.0.0.1", 0)
    waiting = []
    for _ in range(300):  # the loop does not turn meanwhile: nobody accepts
        sock = socket.create_connection(("127.0.0.1", port), WAIT_S)
        sock.sendall(b"GET /now HTTP/1.1\r\nHost: mesh\r\n\r\n")
        waiting.append(sock)
    await site.listener.drain()
    for sock in waiting:
        with sock:
            assert (await asyncio.to_thread(_read_all, sock)).endswith(b"answered")


async def test_a_request_in_flight_is_answered_before_the_end(site: Site) -> None:
    port = await site.listener.start("127.0.0.1", 0)
    async with aiohttp.ClientSession() as session:
        asked = asyncio.create_task(session.get(f"http://127.0.0.1:{port}/held"))
        await asyncio.wait_for(site.entered.wait(), WAIT_S)
        drained = asyncio.create_task(site.listener.drain())
        await asyncio.sleep(0)
        assert not drained.done()
        site.held.set()
        assert await (await asked).text() == "answered late"
        await asyncio.wait_for(drained, WAIT_S)


async def test_who_is_told_to_leave_serves_on_and_closes_each_connection_behind_its_answer(
    site: Site,
) -> None:
    port = await site.listener.start("127.0.0.1", 0)
    async with aiohttp.ClientSession() as session:
        for leaving in (False, True, True):
            if leaving:
                site.listener.leave()
            async with session.get(f"http://127.0.0.1:{port}/now") as reply:
                assert await reply.text() == "answered"
                assert (reply.headers.get("Connection") == "close") is leaving


async def test_clients_with_pools_lose_no_request_when_one_of_two_leaves(site: Site) -> None:
    other = Site()
    port = await site.listener.start("127.0.0.1", 0, reuse_port=True)
    await other.listener.start("127.0.0.1", port, reuse_port=True)
    answers, ended = 0, asyncio.Event()

    async def ask(session: aiohttp.ClientSession) -> None:
        nonlocal answers
        while not ended.is_set():
            # aiohttp sends a GET again by itself, a POST it does not.
            async with session.post(f"http://127.0.0.1:{port}/now", data=b"body") as reply:
                assert await reply.text() == "answered"
            answers += 1

    async with aiohttp.ClientSession() as session:
        clients = [asyncio.create_task(ask(session)) for _ in range(16)]

        async def more(count: int) -> None:
            wanted = answers + count
            await until(lambda: answers >= wanted or any(client.done() for client in clients))

        await more(200)
        site.listener.leave()
        await more(200)
        await site.listener.drain()
        await more(200)
        ended.set()
        await asyncio.gather(*clients)
    await other.listener.drain()
