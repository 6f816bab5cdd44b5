"""Listening, TLS, draining, reconnecting, refusing, many connections."""

from __future__ import annotations

import asyncio
import socket
import ssl
import subprocess
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import grpc
import grpc.aio
import pytest

from mesh.core.errors import Code
from mesh.wire import frames, hpack, messages
from mesh.wire.calls import ServerCall, Unary
from mesh.wire.client import Channel, RpcError
from mesh.wire.limits import PUBLIC
from mesh.wire.server import Server
from tests.wire.memory import REQUEST, data, headers
from tests.wire.waiting import WAIT_S, until

ECHO = "/test.Echo/Unary"
HELD = "/test.Echo/Held"
OPTIONS = [("grpc.use_local_subchannel_pool", 1)]


class Echo:
    """Answers ECHO at once and HELD when told."""

    def __init__(self, **limits: int) -> None:
        self.held: list[tuple[ServerCall, bytes]] = []
        self.server = Server(
            {
                ECHO: Unary(lambda call, message: call.reply(message)),
                HELD: Unary(lambda call, message: self.held.append((call, message))),
            },
            limits=replace(PUBLIC, **limits),
        )

    def release(self) -> None:
        for call, message in self.held:
            call.reply(message)


@pytest.fixture
async def echo() -> AsyncIterator[Echo]:
    echo = Echo()
    yield echo
    await echo.server.close()


@pytest.fixture
async def ours(echo: Echo) -> AsyncIterator[Channel]:
    channel = Channel(f"127.0.0.1:{await echo.server.start()}")
    yield channel
    await channel.close()


# --- drain ------------------------------------------------------------------------------------


async def test_drain_lets_calls_end(echo: Echo, ours: Channel) -> None:
    calls = [asyncio.create_task(ours.unary(HELD, b"%d" % i, timeout_s=WAIT_S)) for i in range(9)]
    await until(lambda: len(echo.held) == 9)
    drained = asyncio.create_task(echo.server.drain(WAIT_S))
    await until(lambda: ours.peer.current is None)
    with pytest.raises(RpcError) as caught:  # nobody listens for new ones
        await ours.unary(ECHO, b"late", timeout_s=WAIT_S)
    assert caught.value.code is Code.UNAVAILABLE and not drained.done()
    echo.release()
    assert [(await call).message for call in calls] == [b"%d" % i for i in range(9)]
    await drained
    await until(lambda: echo.server.connections == 0)


async def test_drain_gives_up_at_its_time_out(echo: Echo, ours: Channel) -> None:
    call = asyncio.create_task(ours.unary(HELD, b"x", timeout_s=WAIT_S))
    await until(lambda: echo.held)
    await echo.server.drain(0.1)
    with pytest.raises(RpcError) as caught:
        await call
    assert caught.value.code is Code.UNAVAILABLE


async def test_drain_says_goaway_twice(echo: Echo) -> None:
    """First with the highest id, for calls may be under way; then with the last one taken."""
    port = await echo.server.start()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    held = hpack.encode([(n, HELD.encode() if n == b":path" else v) for n, v in REQUEST])
    writer.write(frames.PREFACE + frames.settings({}) + headers(1, held))
    await until(lambda: echo.server.inflight)
    drained = asyncio.create_task(echo.server.drain(WAIT_S))
    raw = b""
    while frames.ping(b"mesh-bye") not in raw:
        raw += await asyncio.wait_for(reader.read(1 << 16), WAIT_S)
    assert frames.goaway(frames.MAX_STREAM_ID, 0) in raw
    writer.write(headers(3, held) + data(3, messages.prefix(b""), end=True))  # crossed it: served
    writer.write(frames.ping(b"mesh-bye", ack=True))
    await until(lambda: len(echo.held) == 1)
    writer.write(data(1, messages.prefix(b""), end=True))
    await until(lambda: len(echo.held) == 2)
    echo.release()
    raw += await asyncio.wait_for(reader.read(), WAIT_S)
    assert frames.goaway(3, 0) in raw
    assert frames.rst_stream(3, frames.ErrorCode.REFUSED_STREAM) not in raw
    await drained
    writer.close()


async def test_drain_waits_for_calls_that_cross_its_goaway(echo: Echo) -> None:
    """Nothing is in flight, but the client has not seen the GOAWAY yet."""
    port = await echo.server.start()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    path = hpack.encode([(n, ECHO.encode() if n == b":path" else v) for n, v in REQUEST])
    writer.write(frames.PREFACE + frames.settings({}))
    raw = b""
    while frames.SETTINGS_ACK not in raw:
        raw += await asyncio.wait_for(reader.read(1 << 16), WAIT_S)
    drained = asyncio.create_task(echo.server.drain(WAIT_S))
    while frames.ping(b"mesh-bye") not in raw:
        raw += await asyncio.wait_for(reader.read(1 << 16), WAIT_S)
    for _ in range(20):
        await asyncio.sleep(0)
    writer.write(headers(1, path) + data(1, messages.prefix(b"crossed") + b"crossed", end=True))
    writer.write(frames.ping(b"mesh-bye", ack=True))
    raw += await asyncio.wait_for(reader.read(), WAIT_S)
    assert messages.prefix(b"crossed") + b"crossed" in raw
    await drained
    writer.close()


async def test_drain_does_not_wait_for_ever_for_a_client_that_answers_no_ping(echo: Echo) -> None:
    port = await echo.server.start()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(frames.PREFACE + frames.settings({}))
    await until(lambda: echo.server.connections)
    await echo.server.drain(0.2)
    await asyncio.wait_for(reader.read(), WAIT_S)
    writer.close()


async def test_whoever_waits_in_the_backlog_at_a_drain_is_served(echo: Echo) -> None:
    """Closing a listener resets what waits in its backlog, however much that is."""
    port = await echo.server.start()
    path = hpack.encode([(n, ECHO.encode() if n == b":path" else v) for n, v in REQUEST])
    asked = frames.PREFACE + frames.settings({}) + headers(1, path)
    asked += data(1, messages.prefix(b"waited") + b"waited", end=True)
    waiting = []
    for _ in range(600):  # the loop does not turn meanwhile: nobody accepts
        sock = socket.create_connection(("127.0.0.1", port), WAIT_S)
        sock.sendall(asked + frames.ping(b"mesh-bye", ack=True))
        waiting.append(sock)
    assert not echo.server.connections
    await echo.server.drain(WAIT_S)
    for sock in waiting:
        with sock:
            assert b"waited" in await asyncio.to_thread(_read_all, sock)


def _read_all(sock: socket.socket) -> bytes:
    found = b""
    while piece := sock.recv(1 << 16):
        found += piece
    return found


async def test_no_call_of_grpcio_is_lost_in_a_drain(echo: Echo) -> None:
    """grpcio sends again only what never left it or was refused unseen; the rest is answered."""
    port = await echo.server.start(reuse_port=True)
    successor = Echo()
    await successor.server.start(port=port, reuse_port=True)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=OPTIONS) as channel:
        call = channel.unary_unary(ECHO)
        done = 0
        stop = False

        async def work(number: int) -> None:
            nonlocal done
            while not stop:
                assert await call(b"%d" % number, timeout=WAIT_S) == b"%d" % number
                done += 1

        workers = [asyncio.create_task(work(i)) for i in range(8)]
        await until(lambda: done > 100 or any(w.done() for w in workers))
        before = done
        old = echo if echo.server.connections else successor
        new = successor if old is echo else echo
        await old.server.drain(WAIT_S)
        await until(lambda: done > before + 100 or any(w.done() for w in workers))
        stop = True
        await asyncio.gather(*workers)
        assert new.server.connections
    await successor.server.close()


# --- connections ------------------------------------------------------------------------------


async def test_reconnects_after_the_server_died(echo: Echo, ours: Channel) -> None:
    call = asyncio.create_task(ours.unary(HELD, b"x", timeout_s=WAIT_S))
    await until(lambda: echo.held)
    for link in list(echo.server._links):
        link.abort()
    with pytest.raises(RpcError) as caught:
        await call
    assert caught.value.code is Code.UNAVAILABLE
    assert (await ours.unary(ECHO, b"again", timeout_s=WAIT_S)).message == b"again"


async def test_nobody_listens() -> None:
    channel = Channel("127.0.0.1:1")
    for _ in range(3):  # the second is refused by the back-off, with the same reason
        with pytest.raises(RpcError, match=r"cannot connect to 127\.0\.0\.1:1") as caught:
            await channel.unary(ECHO, b"", timeout_s=WAIT_S)
        assert caught.value.code is Code.UNAVAILABLE
    await channel.close()


async def test_a_silent_server_meets_the_deadline() -> None:
    accepted: list[asyncio.StreamWriter] = []

    async def silent(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        accepted.append(writer)

    listener = await asyncio.start_server(silent, "127.0.0.1", 0)
    port = listener.sockets[0].getsockname()[1]
    channel = Channel(f"127.0.0.1:{port}")
    with pytest.raises(RpcError) as caught:
        await channel.unary(ECHO, b"", timeout_s=0.1)
    assert caught.value.code is Code.DEADLINE_EXCEEDED
    await channel.close()
    for writer in accepted:
        writer.close()
    listener.close()


async def test_a_server_that_speaks_no_http2() -> None:
    async def other(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(10)
        writer.write(b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\n\r\n")
        await writer.drain()
        writer.close()

    listener = await asyncio.start_server(other, "127.0.0.1", 0)
    channel = Channel(f"127.0.0.1:{listener.sockets[0].getsockname()[1]}")
    with pytest.raises(RpcError) as caught:
        await channel.unary(ECHO, b"", timeout_s=WAIT_S)
    assert caught.value.code is Code.UNAVAILABLE
    await channel.close()
    listener.close()


async def test_a_thousand_connections_at_once(echo: Echo) -> None:
    port = await echo.server.start()
    channels = [Channel(f"127.0.0.1:{port}") for _ in range(1_000)]
    calls = [c.unary(ECHO, b"%d" % i, timeout_s=60) for i, c in enumerate(channels)]
    replies = await asyncio.gather(*calls)
    assert [reply.message for reply in replies] == [b"%d" % i for i in range(1_000)]
    assert echo.server.connections == 1_000
    await asyncio.gather(*[channel.close() for channel in channels])
    await until(lambda: echo.server.connections == 0)


async def test_connections_over_the_bound_are_refused() -> None:
    echo = Echo(max_connections=2)
    port = await echo.server.start()
    channels = [Channel(f"127.0.0.1:{port}") for _ in range(3)]
    for channel in channels[:2]:
        await channel.unary(ECHO, b"", timeout_s=WAIT_S)
    with pytest.raises(RpcError) as caught:
        await channels[2].unary(ECHO, b"", timeout_s=WAIT_S)
    assert caught.value.code is Code.UNAVAILABLE
    assert (await channels[0].unary(ECHO, b"x", timeout_s=WAIT_S)).message == b"x"
    for channel in channels:
        await channel.close()
    await echo.server.close()


async def test_more_calls_than_streams_use_more_connections() -> None:
    echo = Echo(max_concurrent_streams=10)
    channel = Channel(f"127.0.0.1:{await echo.server.start()}")
    calls = [asyncio.create_task(channel.unary(HELD, b"x", timeout_s=WAIT_S)) for _ in range(50)]
    await until(lambda: len(echo.held) == 50)
    assert echo.server.connections == 5
    echo.release()
    await asyncio.gather(*calls)
    await channel.close()
    await echo.server.close()


async def test_a_port_in_use_is_named(echo: Echo) -> None:
    port = await echo.server.start()
    other = Echo()
    with pytest.raises(OSError, match=str(port)):
        await other.server.start(port=port)


# --- TLS --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An authority, a server's and a client's certificate."""
    folder = tmp_path_factory.mktemp("tls")

    def openssl(*args: str) -> None:
        subprocess.run(["openssl", *args], cwd=folder, check=True, capture_output=True, timeout=30)

    new = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    openssl("req", "-x509", *new, "-keyout", "ca.key", "-out", "ca.pem", "-subj", "/CN=Test CA")
    (folder / "san").write_text("subjectAltName=DNS:localhost,IP:127.0.0.1\n")
    for name in ("server", "client"):
        openssl(
            "req", *new, "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}"
        )
        openssl(
            *["x509", "-req", "-in", f"{name}.csr", "-CA", "ca.pem", "-CAkey", "ca.key"],
            *["-CAcreateserial", "-out", f"{name}.pem", "-days", "2", "-extfile", "san"],
        )
    return folder


def pems(folder: Path) -> tuple[bytes, ...]:
    return tuple((folder / name).read_bytes() for name in ("ca.pem", "client.key", "client.pem"))


def server_context(folder: Path, *, mutual: bool) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(folder / "server.pem", folder / "server.key")
    context.set_alpn_protocols(["h2"])
    if mutual:
        context.load_verify_locations(folder / "ca.pem")
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def client_context(folder: Path, *, own: bool) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=folder / "ca.pem")
    context.set_alpn_protocols(["h2"])
    if own:
        context.load_cert_chain(folder / "client.pem", folder / "client.key")
    return context


@pytest.mark.parametrize("mutual", [False, True], ids=["tls", "mtls"])
async def test_tls_with_our_client(echo: Echo, certificates: Path, mutual: bool) -> None:
    port = await echo.server.start(ssl_context=server_context(certificates, mutual=mutual))
    context = client_context(certificates, own=mutual)
    channel = Channel(f"127.0.0.1:{port}", ssl_context=context)
    for size in (0, 400, 16_384, 70_000, 1 << 20, 5 << 20):
        message = (bytes(range(256)) * (size // 256 + 1))[:size]
        assert (await channel.unary(ECHO, message, timeout_s=60)).message == message
    await channel.close()


@pytest.mark.parametrize("mutual", [False, True], ids=["tls", "mtls"])
async def test_tls_with_grpcio(echo: Echo, certificates: Path, mutual: bool) -> None:
    port = await echo.server.start(ssl_context=server_context(certificates, mutual=mutual))
    authority, key, chain = pems(certificates)
    credentials = grpc.ssl_channel_credentials(authority, *([key, chain] if mutual else []))
    address = f"localhost:{port}"
    async with grpc.aio.secure_channel(address, credentials, options=OPTIONS) as channel:
        for size in (0, 400, 70_000, 3 << 20):
            assert await channel.unary_unary(ECHO)(bytes(size), timeout=60) == bytes(size)


async def test_a_client_without_certificate_is_refused(echo: Echo, certificates: Path) -> None:
    port = await echo.server.start(ssl_context=server_context(certificates, mutual=True))
    context = client_context(certificates, own=False)
    channel = Channel(f"127.0.0.1:{port}", ssl_context=context)
    with pytest.raises(RpcError) as caught:
        await channel.unary(ECHO, b"x", timeout_s=WAIT_S)
    assert caught.value.code is Code.UNAVAILABLE
    good = Channel(f"127.0.0.1:{port}", ssl_context=client_context(certificates, own=True))
    assert (await good.unary(ECHO, b"x", timeout_s=WAIT_S)).message == b"x"
    await channel.close()
    await good.close()


async def test_plaintext_on_a_tls_port(echo: Echo, certificates: Path) -> None:
    port = await echo.server.start(ssl_context=server_context(certificates, mutual=False))
    channel = Channel(f"127.0.0.1:{port}")
    with pytest.raises(RpcError) as caught:
        await channel.unary(ECHO, b"x", timeout_s=WAIT_S)
    assert caught.value.code is Code.UNAVAILABLE
    await channel.close()
    assert echo.server.connections == 0
