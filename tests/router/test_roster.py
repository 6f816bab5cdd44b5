"""Asking other routers: an address is a host and a port and nothing else, an answer has an end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import orjson
import pytest
from aiohttp import web

from mesh.core.errors import Unavailable
from mesh.store.memory import MemoryStore
from router import roster
from router.roster import PREFIX, Roster
from tests.wire.waiting import until


async def _answers(request: web.Request) -> web.StreamResponse:
    match request.path:
        case "/moved":
            raise web.HTTPFound("/decisions")
        case "/endless":
            reply = web.StreamResponse()
            await reply.prepare(request)
            while True:
                await reply.write(b" " * 65_536)
        case _:
            return web.Response(body=b"[]")


@pytest.fixture
async def address() -> AsyncIterator[str]:
    app = web.Application()
    app.router.add_get("/{any}", _answers)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    assert site._server is not None
    yield f"127.0.0.1:{site._server.sockets[0].getsockname()[1]}"  # type: ignore[attr-defined]
    await runner.cleanup()


async def knowing(metrics: str) -> Roster:
    store = MemoryStore()
    await store.put(PREFIX + "other", orjson.dumps({"metrics": metrics}))
    one = Roster(store, "me")
    task = asyncio.create_task(one._follow())
    await until(lambda: "other" in one.others)
    task.cancel()
    return one


async def test_another_router_is_asked_at_its_address(address: str) -> None:
    one = await knowing(address)
    assert await one.ask("other", "/decisions", {"limit": "1"}) == b"[]"


@pytest.mark.parametrize(
    "metrics",
    ["x/latest?", "user@host:80", "host:80/path", "", "host", "host:port", "[::1", "a b:80"],
)
async def test_what_is_no_host_and_port_is_not_asked(metrics: str) -> None:
    one = await knowing(metrics)
    with pytest.raises(Unavailable, match="tells no address"):
        await one.ask("other", "/decisions", {})


@pytest.mark.parametrize("metrics", ["x..y:80", ".:80", f"{'a' * 70}:80", "127.0.0.1:99999"])
async def test_a_host_that_cannot_be_is_unavailable(metrics: str) -> None:
    one = await knowing(metrics)
    with pytest.raises(Unavailable):
        await one.ask("other", "/decisions", {})


async def test_a_redirect_is_not_followed(address: str) -> None:
    one = await knowing(address)
    with pytest.raises(Unavailable, match="HTTP 302"):
        await one.ask("other", "/moved", {})


async def test_an_answer_without_end_is_given_up(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(roster, "_ANSWER_MAX_BYTES", 200_000)
    one = await knowing(address)
    with pytest.raises(Unavailable, match="more than 200000 bytes"):
        await one.ask("other", "/endless", {})
