"""http(s) against real servers on this machine, honest ones and others."""

from __future__ import annotations

import json
import ssl
from pathlib import Path
from typing import Any

import pytest

from mesh.core.errors import Code, LoadFailed
from puller.puller import Puller
from tests.puller.conftest import OpenPuller, entries, leftovers, request
from tests.puller.fakes import content
from tests.puller.http_server import FileServer
from tests.puller.servers import self_signed

DATA = content(35_000)
TOKEN = "Bearer the-secret-token"


def storage(directory: Path, **entry: Any) -> Path:
    folder = directory / "secret"
    folder.mkdir(exist_ok=True)
    (folder / "web").write_text(json.dumps({"type": "http", **entry}))
    return folder


KEY = '{"storage_key": "web"}'


async def failure(puller: Puller, path: str, key: str = "") -> LoadFailed:
    with pytest.raises(LoadFailed) as caught:
        await puller.fetch(request(path, key))
    return caught.value


async def pulled(puller: Puller, path: str, key: str = "") -> bytes:
    return (await puller.fetch(request(path, key))).path.read_bytes()


async def test_a_file_comes_in_parallel_ranges_under_its_own_name(open_puller: OpenPuller) -> None:
    server = FileServer({"/models/my model.onnx": DATA})
    async with server.serving() as url:
        artifact = await open_puller().fetch(request(f"{url}/models/my%20model.onnx?v=1"))
        assert artifact.path.name == "my model.onnx"
        assert artifact.path.read_bytes() == DATA
        assert artifact.source == f"{url}/models/my%20model.onnx?…"
        assert len([one for one in server.requests if "Range" in one.headers]) == 5
        assert {one.query_string for one in server.requests} == {"v=1"}


@pytest.mark.parametrize(
    "changes",
    [
        {"ranges": False},
        {"length": False, "ranges": False},
        {"etags": False, "last_modified": "Thu, 01 Jan 2026 00:00:00 GMT"},
        {"etags": False, "length": False, "ranges": False},
    ],
)
async def test_servers_that_promise_little_serve(
    open_puller: OpenPuller, changes: dict[str, Any]
) -> None:
    async with FileServer({"/m": DATA}, **changes).serving() as url:
        assert await pulled(open_puller(), f"{url}/m") == DATA


@pytest.mark.parametrize("ranges", [True, False])
async def test_an_empty_file_is_a_file(open_puller: OpenPuller, ranges: bool) -> None:
    async with FileServer({"/m": b""}, ranges=ranges).serving() as url:
        assert await pulled(open_puller(), f"{url}/m") == b""


@pytest.mark.parametrize(
    "changes",
    [{}, {"etags": False, "last_modified": "Thu, 01 Jan 2026 00:00:00 GMT"}],
    ids=["etag", "last modified"],
)
async def test_what_has_not_changed_is_not_read_again(
    open_puller: OpenPuller, changes: dict[str, Any]
) -> None:
    server = FileServer({"/m": DATA}, **changes)
    async with server.serving() as url:
        puller = open_puller()
        puller.release(await puller.fetch(request(f"{url}/m")))
        before = len(server.requests)
        assert (await puller.fetch(request(f"{url}/m"))).cached
        assert len(server.requests) == before + 1


async def test_a_changed_etag_is_noticed(open_puller: OpenPuller, cache_dir: Path) -> None:
    server = FileServer({"/m": DATA})
    async with server.serving() as url:
        puller = open_puller()
        puller.release(await puller.fetch(request(f"{url}/m")))
        server.files["/m"] = DATA[::-1]
        assert await pulled(puller, f"{url}/m") == DATA[::-1]
        assert len(entries(cache_dir)) == 1


async def test_a_changed_time_is_noticed(open_puller: OpenPuller) -> None:
    server = FileServer({"/m": b"old"}, etags=False, last_modified="Thu, 01 Jan 2026 00:00:00 GMT")
    async with server.serving() as url:
        puller = open_puller()
        await puller.fetch(request(f"{url}/m"))
        server.files["/m"], server.last_modified = b"new", "Fri, 02 Jan 2026 00:00:00 GMT"
        assert await pulled(puller, f"{url}/m") == b"new"


async def test_what_has_no_version_is_read_anew_each_time(open_puller: OpenPuller) -> None:
    server = FileServer({"/m": b"old"}, etags=False)
    async with server.serving() as url:
        puller = open_puller()
        assert await pulled(puller, f"{url}/m") == b"old"
        server.files["/m"] = b"new"
        assert await pulled(puller, f"{url}/m") == b"new"


async def test_a_broken_connection_goes_on_in_the_middle(open_puller: OpenPuller) -> None:
    server = FileServer({"/m": DATA}, cut_after_bytes=2_500, cuts_left=3)
    async with server.serving() as url:
        assert await pulled(open_puller(), f"{url}/m") == DATA
        starts = [one.headers["Range"].split("=")[1].split("-")[0] for one in server.requests]
        assert any(int(start) % 8_750 for start in starts)


@pytest.mark.parametrize("length", [True, False])
async def test_a_broken_connection_without_ranges_begins_anew(
    open_puller: OpenPuller, length: bool
) -> None:
    server = FileServer({"/m": DATA}, ranges=False, length=length)
    server.cut_after_bytes, server.cuts_left = 20_000, 2  # the first is that of the question
    async with server.serving() as url:
        assert await pulled(open_puller(), f"{url}/m") == DATA


async def test_a_file_of_unknown_size_keeps_to_the_bound(
    open_puller: OpenPuller, cache_dir: Path
) -> None:
    async with FileServer({"/m": DATA}, ranges=False, length=False).serving() as url:
        error = await failure(open_puller(max_artifact_bytes=30_000), f"{url}/m")
    assert error.code is Code.FAILED_PRECONDITION
    assert "more than the 30000 that an artifact may have" in error.message
    assert leftovers(cache_dir) == entries(cache_dir) == []


async def test_a_server_that_claims_too_much_is_not_believed(
    open_puller: OpenPuller, cache_dir: Path
) -> None:
    server = FileServer({"/m": DATA}, claims_bytes=40_000)
    async with server.serving() as url:
        error = await failure(open_puller(attempts_max=2), f"{url}/m")
    assert error.code is Code.UNAVAILABLE
    assert "changes faster than it can be read" in error.message
    assert leftovers(cache_dir) == entries(cache_dir) == []


async def test_a_server_that_claims_too_little_gives_no_half_a_file(
    open_puller: OpenPuller,
) -> None:
    """It says 20,000 at first, and tells the truth when it is read."""

    class Honest(FileServer):
        async def handle(self, request: Any) -> Any:
            self.claims_bytes = None if self.requests else 20_000
            return await super().handle(request)

    server = Honest({"/m": DATA})
    async with server.serving() as url:
        assert await pulled(open_puller(), f"{url}/m") == DATA  # begun anew with what is true


@pytest.mark.parametrize(
    ("status", "code", "says"),
    [
        (401, Code.FAILED_PRECONDITION, "refused access"),
        (403, Code.FAILED_PRECONDITION, "no headers were given"),
        (404, Code.FAILED_PRECONDITION, "does not exist"),
        (410, Code.FAILED_PRECONDITION, "does not exist"),
        (418, Code.FAILED_PRECONDITION, "refused the request (418)"),
        (429, Code.UNAVAILABLE, "answered 429"),
        (500, Code.UNAVAILABLE, "answered 500"),
    ],
)
async def test_what_a_server_may_answer(
    open_puller: OpenPuller, status: int, code: Code, says: str
) -> None:
    async with FileServer({}, statuses={"/m": status}).serving() as url:
        error = await failure(open_puller(attempts_max=2), f"{url}/m?sig=SECRET-OF-QUERY")
    assert error.code is code
    assert says in error.message
    assert f"{url}/m" in error.message
    assert "SECRET-OF-QUERY" not in error.message
    assert "nobody shows" not in error.message


async def test_nobody_there(open_puller: OpenPuller) -> None:
    async with FileServer().serving() as url:
        pass
    error = await failure(open_puller(attempts_max=2), f"{url}/m")
    assert error.code is Code.UNAVAILABLE
    assert "no connection" in error.message


async def test_a_url_that_names_no_file_is_refused(open_puller: OpenPuller) -> None:
    error = await failure(open_puller(), "http://127.0.0.1:9/")
    assert "names no file" in error.message


async def test_redirects_are_followed_without_the_credentials(
    open_puller: OpenPuller, tmp_path: Path
) -> None:
    other = FileServer({"/m": DATA})
    server = FileServer(needs_header=None)
    async with other.serving() as other_url, server.serving() as url:
        server.redirects = {"/a/m": f"{url}/a/again", "/a/again": f"{other_url}/m"}
        config = storage(tmp_path, url=f"{url}/a", headers={"Authorization": TOKEN})
        puller = open_puller(storage_config_dir=config)
        assert await pulled(puller, "m", KEY) == DATA
    assert {one.headers.get("Authorization") for one in server.requests} == {TOKEN}
    assert {one.headers.get("Authorization") for one in other.requests} == {None}


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ("/m", "more than 5 redirects"),
        ("file:///etc/passwd", "redirects to file://None"),
        ("ftp://127.0.0.1/m", "redirects to ftp://127.0.0.1, which is not followed"),
        ("http://169.254.169.254/latest/meta-data", "link-local"),
        ("http://[::ffff:169.254.169.254]/m", "link-local"),
    ],
)
async def test_redirects_that_are_not_followed(
    open_puller: OpenPuller, target: str, says: str
) -> None:
    async with FileServer(redirects={"/m": target}).serving() as url:
        error = await failure(open_puller(), f"{url}/m")
    assert error.code is Code.FAILED_PRECONDITION
    assert says.replace("file://None", "nowhere") in error.message


async def test_a_redirect_from_https_to_http_is_not_followed(
    open_puller: OpenPuller, tmp_path: Path
) -> None:
    context, pem = self_signed(tmp_path)
    plain, server = FileServer({"/m": DATA}), FileServer()
    async with plain.serving() as plain_url, server.serving(context) as url:
        server.redirects = {"/m": f"{plain_url}/m"}
        config = storage(tmp_path, url=url, certificate=pem)
        error = await failure(open_puller(storage_config_dir=config), "m", KEY)
    assert "from https to http is not followed" in error.message
    assert plain.requests == []


async def test_headers_of_a_key_are_sent_and_not_shown(
    open_puller: OpenPuller, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    server = FileServer({"/a/m": DATA}, needs_header=("Authorization", TOKEN))
    async with server.serving() as url:
        config = storage(tmp_path, url=f"{url}/a/", headers={"Authorization": TOKEN})
        puller = open_puller(storage_config_dir=config)
        assert await pulled(puller, "m", KEY) == DATA
        assert await pulled(puller, f"{url}/a/m", KEY) == DATA
        storage(tmp_path, url=f"{url}/a", headers={"Authorization": "Bearer a-wrong-token"})
        error = await failure(puller, "m", KEY)
        elsewhere = await failure(puller, f"{url}/b/m", KEY)
    assert "refused access with storage key 'web'" in error.message
    assert "does not lie below the 'url' of storage key 'web'" in elsewhere.message
    told = f"{error!r} {error.__cause__!r} {elsewhere!r} {caplog.text}"
    assert "token" not in told


async def test_a_certificate_that_does_not_verify_is_refused(
    open_puller: OpenPuller, tmp_path: Path, cache_dir: Path
) -> None:
    context, pem = self_signed(tmp_path)
    (tmp_path / "other").mkdir()
    _, wrong_pem = self_signed(tmp_path / "other")
    server = FileServer({"/m": DATA})
    async with server.serving(context) as url:
        distrusting = await failure(open_puller(), f"{url}/m")
        config = storage(tmp_path, url=url, certificate=wrong_pem)
        puller = open_puller(storage_config_dir=config)
        wrong = await failure(puller, "m", KEY)
        storage(tmp_path, url=url, certificate=pem)
        assert await pulled(puller, "m", KEY) == DATA
        storage(tmp_path, url=url, certificate="no PEM at all")
        assert "cannot be read as PEM" in (await failure(puller, "m", KEY)).message
    for error in (distrusting, wrong):
        assert error.code is Code.FAILED_PRECONDITION
        assert "certificate" in error.message
    assert leftovers(cache_dir) == []


async def test_a_server_that_wants_a_client_certificate(
    open_puller: OpenPuller, tmp_path: Path
) -> None:
    context, pem = self_signed(tmp_path)
    (tmp_path / "client").mkdir()
    _, client_pem = self_signed(tmp_path / "client")
    both = (tmp_path / "client/server.pem").read_text()
    client_key = both.removeprefix(client_pem)
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(cadata=client_pem)
    server = FileServer({"/m": DATA})
    async with server.serving(context) as url:
        config = storage(tmp_path, url=url, certificate=pem)
        puller = open_puller(storage_config_dir=config, attempts_max=2)
        without = await failure(puller, "m", KEY)
        fields = {"client_certificate": client_pem, "client_key": client_key}
        storage(tmp_path, url=url, certificate=pem, **fields)
        assert await pulled(puller, "m", KEY) == DATA
        storage(tmp_path, url=url, client_certificate=client_pem, client_key="no key")
        broken = await failure(puller, "m", KEY)
    assert url in without.message
    assert "client_certificate and client_key of storage key 'web'" in broken.message
    assert client_key not in str(broken)


async def test_what_comes_compressed_unasked_is_refused(open_puller: OpenPuller) -> None:
    server = FileServer({"/m": DATA}, extra_headers={"Content-Encoding": "br"})
    async with server.serving() as url:
        assert "sends it as 'br'" in (await failure(open_puller(), f"{url}/m")).message
