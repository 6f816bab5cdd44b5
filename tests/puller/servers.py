"""Loopback servers that misbehave on demand, and the certificates of one of them."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import ipaddress
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID


class Relay:
    """Passes bytes on to another server; breaks connections off while ``cuts_left``."""

    def __init__(self, target: str, *, cut_after_bytes: int = 0, cuts: int = 0) -> None:
        host, _, port = target.removeprefix("http://").partition(":")
        self._target = (host, int(port))
        self._cut_after_bytes = cut_after_bytes
        self.cuts_left = cuts
        self.requests = bytearray()  # all that clients sent
        self._backs: set[asyncio.StreamWriter] = set()

    def stop(self) -> None:
        for writer in self._backs:
            writer.transport.abort()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        back_reader, back_writer = await asyncio.open_connection(*self._target)
        self._backs.add(back_writer)
        up = asyncio.create_task(self._pass_on(reader, back_writer))
        try:
            passed = 0
            while chunk := await back_reader.read(4096):
                passed += len(chunk)
                if self.cuts_left > 0 and passed > self._cut_after_bytes:
                    self.cuts_left -= 1
                    break
                writer.write(chunk)
                await writer.drain()
        except ConnectionError:
            pass
        finally:
            up.cancel()
            await asyncio.gather(up, return_exceptions=True)
            writer.transport.abort()
            back_writer.transport.abort()
            self._backs.discard(back_writer)

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while chunk := await reader.read(65536):
                self.requests += chunk
                writer.write(chunk)
                await writer.drain()


Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@contextlib.asynccontextmanager
async def listening(serve: Serve, tls: ssl.SSLContext | None = None) -> AsyncIterator[str]:
    """The server's URL. At the end connections are broken off and their tasks have ended."""
    connections: dict[asyncio.Task[None], asyncio.StreamWriter] = {}

    async def track(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        connections[task] = writer
        try:
            await serve(reader, writer)
        finally:
            writer.transport.abort()
            del connections[task]

    server = await asyncio.start_server(track, "127.0.0.1", 0, ssl=tls)
    try:
        port = server.sockets[0].getsockname()[1]
        yield f"{'https' if tls else 'http'}://127.0.0.1:{port}"
    finally:
        server.close()
        for writer in connections.values():
            writer.transport.abort()
        await asyncio.gather(*connections)


@contextlib.asynccontextmanager
async def relaying(relay: Relay, tls: ssl.SSLContext | None = None) -> AsyncIterator[str]:
    async with listening(relay.serve, tls) as url:
        try:
            yield url
        finally:
            relay.stop()


@contextlib.asynccontextmanager
async def answering(status: str, body: str = "", *, silent: bool = False) -> AsyncIterator[str]:
    """A server that gives every request the same answer, or none at all."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                if silent:
                    continue
                text = "" if head.startswith(b"HEAD") else body
                writer.write(
                    f"HTTP/1.1 {status}\r\ncontent-length: {len(text)}\r\n\r\n{text}".encode()
                )
                await writer.drain()

    async with listening(serve) as url:
        yield url


def self_signed(directory: Path) -> tuple[ssl.SSLContext, str]:
    """A server's context for 127.0.0.1, and the certificate to trust as PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test store")])
    now = datetime.datetime.now(datetime.UTC)
    address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([address]), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = certificate.public_bytes(serialization.Encoding.PEM)
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    (directory / "server.pem").write_bytes(pem + private)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(directory / "server.pem")
    return context, pem.decode()
