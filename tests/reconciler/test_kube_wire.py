"""What a real API server seldom does when asked to: a scripted one, and a proxy before the real."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

import pytest
import yaml
from aiohttp import web

from mesh.reconciler.kube import ApiAway, ApiError, ApiExpired, Kube, Limits
from mesh.reconciler.kube_resources import CONFIG_MAPS, NAMESPACES
from tests.kube_server import KubeServer
from tests.store.tcp_proxy import TcpProxy

Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]
QUICK = Limits(call_timeout_s=0.2)


@asynccontextmanager
async def scripted(
    tmp_path: Path, answer: Answer, limits: Limits | None = None
) -> AsyncIterator[Kube]:
    """A client of a server that answers whatever is asked with ``answer``. Its token is a file."""
    application = web.Application()
    application.router.add_route("*", "/{path:.*}", answer)
    runner = web.AppRunner(application)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        async with await Kube.connect(kubeconfig(tmp_path, site), limits=limits) as client:
            yield client
    finally:
        await runner.cleanup()


def kubeconfig(tmp_path: Path, site: web.TCPSite) -> Path:
    assert site._server is not None
    port = site._server.sockets[0].getsockname()[1]  # type: ignore[attr-defined]
    (tmp_path / "token").write_text("first\n")
    content = {
        "current-context": "test",
        "clusters": [{"name": "test", "cluster": {"server": f"http://127.0.0.1:{port}"}}],
        "contexts": [
            {"name": "test", "context": {"cluster": "test", "user": "test", "namespace": "ours"}}
        ],
        "users": [{"name": "test", "user": {"tokenFile": str(tmp_path / "token")}}],
    }
    path = tmp_path / "kubeconfig"
    path.write_text(yaml.safe_dump(content))
    return path


def status(code: int, reason: str, **headers: str) -> web.Response:
    body = {"kind": "Status", "code": code, "reason": reason, "message": "as scripted"}
    return web.json_response(body, status=code, headers=headers)


async def test_a_busy_server_is_asked_again_when_it_said(tmp_path: Path) -> None:
    answers = [
        status(429, "TooManyRequests", **{"Retry-After": "0.01"}),
        web.json_response({"data": {}}),
    ]

    async def answer(_: web.Request) -> web.StreamResponse:
        return answers.pop(0)

    async with scripted(tmp_path, answer) as client:
        assert await client.patch(CONFIG_MAPS, "a", "b", {}) == {"data": {}}
        assert client.calls_total["patch", "configmaps", 429] == 1
        assert client.namespace == "ours"


@pytest.mark.parametrize("headers", [{"Retry-After": "30"}, {}])
async def test_a_busy_server_that_says_later_or_nothing_is_the_callers_to_wait_for(
    tmp_path: Path, headers: dict[str, str]
) -> None:
    async def answer(_: web.Request) -> web.StreamResponse:
        return status(429, "TooManyRequests", **headers)

    async with scripted(tmp_path, answer) as client:
        with pytest.raises(ApiAway) as refused:
            await client.patch(CONFIG_MAPS, "a", "b", {})
    assert refused.value.status == 429
    assert refused.value.retry_after_s == float(headers.get("Retry-After", 0))


async def test_refused_credentials_are_read_anew_once_for_all_that_were_refused(
    tmp_path: Path,
) -> None:
    refusals = 0

    async def answer(request: web.Request) -> web.StreamResponse:
        nonlocal refusals
        if request.headers["Authorization"] == "Bearer second":
            return web.json_response({"data": {}})
        refusals += 1
        if refusals == 1:
            (tmp_path / "token").write_text("second\n")
        return status(401, "Unauthorized")

    async with scripted(tmp_path, answer) as client:
        await asyncio.gather(*(client.get(CONFIG_MAPS, "a", "b") for _ in range(3)))
        before = refusals
        await client.get(CONFIG_MAPS, "a", "b")
        assert refusals == before


async def test_credentials_that_stay_wrong_are_an_error_and_no_loop(tmp_path: Path) -> None:
    async def answer(_: web.Request) -> web.StreamResponse:
        return status(401, "Unauthorized")

    async with scripted(tmp_path, answer) as client:
        with pytest.raises(ApiError, match="401 Unauthorized"):
            await client.get(CONFIG_MAPS, "a", "b")
        assert client.calls_total["get", "configmaps", 401] == 2


async def test_pages_that_expire_half_way_are_fetched_at_once_instead(tmp_path: Path) -> None:
    asked: list[str] = []

    async def answer(request: web.Request) -> web.StreamResponse:
        asked.append(request.query_string)
        if "continue" in request.query:
            return status(410, "Expired")
        names = ["a"] if "limit" in request.query else ["a", "b"]
        metadata = {"resourceVersion": "7"}
        if "limit" in request.query:
            metadata["continue"] = "more"
        items = [{"metadata": {"name": name}} for name in names]
        return web.json_response({"kind": "NamespaceList", "metadata": metadata, "items": items})

    async with scripted(tmp_path, answer) as client:
        listing = await client.list(NAMESPACES)
    assert [item["metadata"]["name"] for item in listing.items] == ["a", "b"]
    assert asked == ["limit=500", "limit=500&continue=more", ""]


@pytest.mark.parametrize(
    ("answered", "said"),
    [
        (lambda: web.Response(status=502, text="<html>Bad Gateway</html>"), "Bad Gateway"),
        (lambda: web.Response(text="<html>log in</html>"), "not JSON"),
        (lambda: status(500, "InternalError"), "as scripted"),
        (lambda: web.Response(status=504, text=""), "no message"),
    ],
)
async def test_what_stands_before_the_server_is_away_not_an_answer(
    tmp_path: Path, answered: Callable[[], web.Response], said: str
) -> None:
    async def answer(_: web.Request) -> web.StreamResponse:
        return answered()

    async with scripted(tmp_path, answer) as client:
        with pytest.raises(ApiAway, match=said):
            await client.get(CONFIG_MAPS, "a", "b")


async def test_a_watch_that_the_server_gives_up_says_so_in_the_stream(tmp_path: Path) -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        # One event in two parts, then an error instead of the next event.
        await response.write(b'{"type":"ADDED","object":{"metadata":{"name":"a",')
        await asyncio.sleep(0)
        await response.write(b'"resourceVersion":"8"}}}\n{"type":"ERROR","object":{"code":410,')
        await response.write(b'"reason":"Expired","message":"too old"}}\n')
        return response

    async with scripted(tmp_path, answer) as client:
        events = client.watch(CONFIG_MAPS, "a", resource_version="7")
        async with aclosing(events):
            assert (await anext(events)).resource_version == "8"
            with pytest.raises(ApiExpired, match="too old"):
                await anext(events)


async def test_a_silent_server_costs_a_call_its_time_out_and_says_so(tmp_path: Path) -> None:
    over = asyncio.Event()

    async def answer(_: web.Request) -> web.StreamResponse:
        await over.wait()
        return web.Response()

    async with scripted(tmp_path, answer, QUICK) as client:
        with pytest.raises(ApiAway, match=r"patch configmaps b in namespace a.*within 0.2 s"):
            await client.patch(CONFIG_MAPS, "a", "b", {})
        events = client.watch(CONFIG_MAPS, "a", resource_version="7")
        with pytest.raises(ApiAway, match=r"watch configmaps in namespace a.*within 0.2 s"):
            async with aclosing(events):
                await anext(events)
        assert client.calls_total["patch", "configmaps", 0] == 1
        over.set()


async def test_writes_beyond_the_limit_wait_for_their_turn_not_for_their_time_out(
    tmp_path: Path,
) -> None:
    at_once = most = 0
    full = asyncio.Event()

    async def answer(_: web.Request) -> web.StreamResponse:
        nonlocal at_once, most
        at_once += 1
        most = max(most, at_once)
        if at_once == 2:
            full.set()
        await full.wait()
        await asyncio.sleep(0)
        at_once -= 1
        return web.json_response({})

    async with scripted(tmp_path, answer, Limits(writes_in_flight=2)) as client:
        await asyncio.gather(*(client.patch(CONFIG_MAPS, "a", "b", {}) for _ in range(9)))
    assert most == 2


async def test_a_closed_client_fails_as_if_the_server_were_away(tmp_path: Path) -> None:
    async def answer(_: web.Request) -> web.StreamResponse:
        return web.json_response({})

    async with scripted(tmp_path, answer) as client:
        pass
    with pytest.raises(ApiAway, match="closed"):
        await client.get(CONFIG_MAPS, "a", "b")


@pytest.mark.kube
async def test_a_real_server_that_is_slow_or_unreachable(kube: KubeServer, namespace: str) -> None:
    async with TcpProxy(f"127.0.0.1:{kube.port}") as proxy:
        path = kube.kubeconfig(url=f"https://{proxy.endpoint}")
        async with await Kube.connect(path, limits=QUICK) as client:
            await client.list(CONFIG_MAPS, namespace)
            proxy.delay_s = 5.0
            with pytest.raises(ApiAway, match="no answer within"):
                await client.list(CONFIG_MAPS, namespace)
            proxy.delay_s = 0.0
            proxy.cut()
            with pytest.raises(ApiAway, match="cannot list configmaps"):
                await client.list(CONFIG_MAPS, namespace)
            proxy.mend()
            await client.list(CONFIG_MAPS, namespace)


@pytest.mark.kube
async def test_a_certificate_of_another_authority_is_not_trusted(
    kube: KubeServer, tmp_path: Path
) -> None:
    content = yaml.safe_load(kube.kubeconfig().read_text())
    content["clusters"][0]["cluster"].pop("certificate-authority")
    path = tmp_path / "kubeconfig"
    path.write_text(yaml.safe_dump(content))
    async with await Kube.connect(path) as client:
        with pytest.raises(ApiAway, match="certificate"):
            await client.list(NAMESPACES)
    content["clusters"][0]["cluster"]["insecure-skip-tls-verify"] = True
    path.write_text(yaml.safe_dump(content))
    async with await Kube.connect(path) as client:
        assert (await client.list(NAMESPACES)).items
