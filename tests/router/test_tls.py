"""TLS on the router's listeners: gRPC and REST, server only and mutual."""

from __future__ import annotations

import datetime
import ipaddress
import ssl
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from mesh.core.errors import FailedPrecondition
from router.listeners import HTTP2, tls_context
from router.settings import TlsFiles
from tests.router.mesh_rig import OIP, mesh


@dataclass
class Pair:
    cert: Path
    key: Path


class Authority:
    """Signs certificates for 127.0.0.1."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder = folder
        self.name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.cert = folder / f"{name}.pem"
        self.cert.write_bytes(self._sign(self.name, self.key.public_key(), authority=True))

    def issue(self, name: str) -> Pair:
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        pair = Pair(self.folder / f"{name}.crt", self.folder / f"{name}.key")
        pair.cert.write_bytes(self._sign(subject, key.public_key(), authority=False))
        pair.key.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )
        return pair

    def _sign(
        self, subject: x509.Name, key: ec.EllipticCurvePublicKey, *, authority: bool
    ) -> bytes:
        now = datetime.datetime.now(datetime.UTC)
        address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self.name)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName([address]), critical=False)
        )
        return builder.sign(self.key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def credentials(authority: Path, pair: Pair | None) -> grpc.ChannelCredentials:
    return grpc.ssl_channel_credentials(
        authority.read_bytes(),
        pair.key.read_bytes() if pair else None,
        pair.cert.read_bytes() if pair else None,
    )


async def ask(port: int, authority: Path, pair: Pair | None = None) -> bytes:
    address = f"127.0.0.1:{port}"
    async with grpc.aio.secure_channel(address, credentials(authority, pair)) as channel:
        return await channel.unary_unary(OIP + "ServerLive")(b"", timeout=60)


async def get(port: int, authority: Path, pair: Pair | None = None) -> int:
    context = ssl.create_default_context(cafile=authority)
    if pair is not None:
        context.load_cert_chain(pair.cert, pair.key)
    url = f"https://127.0.0.1:{port}/v2/health/live"
    async with (
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=context)) as session,
        session.get(url) as reply,
    ):
        return reply.status


async def test_grpc_and_rest_over_tls(tmp_path: Path) -> None:
    authority = Authority(tmp_path, "authority")
    server = authority.issue("server")
    files = TlsFiles(server.cert, server.key)
    async with mesh(tmp_path, pods=0, tls=files) as rig:
        (bound,) = rig.bounds
        assert await ask(bound.grpc_port, authority.cert) == b"\x08\x01"
        assert await get(bound.rest_port, authority.cert) == 200


async def test_mutual_tls_lets_only_known_clients_in(tmp_path: Path) -> None:
    authority = Authority(tmp_path, "authority")
    strangers = Authority(tmp_path, "strangers")
    server, client = authority.issue("server"), authority.issue("client")
    stranger = strangers.issue("stranger")
    files = TlsFiles(server.cert, server.key, client_ca=authority.cert)
    async with mesh(tmp_path, pods=0, tls=files) as rig:
        (bound,) = rig.bounds
        assert await ask(bound.grpc_port, authority.cert, client) == b"\x08\x01"
        assert await get(bound.rest_port, authority.cert, client) == 200
        for pair in (None, stranger):
            with pytest.raises(grpc.aio.AioRpcError):
                await ask(bound.grpc_port, authority.cert, pair)
            with pytest.raises(aiohttp.ClientError):
                await get(bound.rest_port, authority.cert, pair)
        # ... and the others are still served.
        assert await ask(bound.grpc_port, authority.cert, client) == b"\x08\x01"


def test_files_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    pair = Authority(tmp_path, "authority").issue("server")
    broken = tmp_path / "broken.pem"
    broken.write_text("no certificate")
    with pytest.raises(FailedPrecondition, match=r"broken\.pem"):
        tls_context(TlsFiles(broken, pair.key), HTTP2)
    with pytest.raises(FailedPrecondition, match=r"missing\.pem"):
        tls_context(TlsFiles(pair.cert, pair.key, tmp_path / "missing.pem"), HTTP2)
