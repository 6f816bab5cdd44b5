"""TLS and mutual TLS on the router's listeners, by grpcio and by HTTPS; `mesh router` alone."""

from __future__ import annotations

import datetime
import http.client
import ipaddress
import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from tests.e2e.asking import LABELS, Asker, failure_of, isvc
from tests.e2e.processes import Server, serving
from tests.etcd_server import EtcdServer, free_port

pytestmark = [pytest.mark.e2e, pytest.mark.etcd]


class Authority:
    """Signs certificates for 127.0.0.1 into a folder."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder = folder
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self.certificate = self._signed(self._name, self._key.public_key(), authority=True)
        self.file = folder / f"{name}.pem"
        self.file.write_bytes(self.certificate.public_bytes(serialization.Encoding.PEM))

    def issue(self, name: str) -> tuple[Path, Path]:
        """(certificate, key)"""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        certificate = self._signed(subject, key.public_key(), authority=False)
        cert_file, key_file = self._folder / f"{name}.crt", self._folder / f"{name}.key"
        cert_file.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        key_file.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )
        return cert_file, key_file

    def _signed(
        self, subject: x509.Name, key: ec.EllipticCurvePublicKey, *, authority: bool
    ) -> x509.Certificate:
        now = datetime.datetime.now(datetime.UTC)
        address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(hours=1))
            .add_extension(x509.SubjectAlternativeName([address]), critical=False)
            .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
            .sign(self._key, hashes.SHA256())
        )


@dataclass
class Secured:
    """One etcd, one instance; a router with TLS and one that wants clients' certificates."""

    authority: Authority
    tls: tuple[str, str]  # gRPC, REST
    mutual: tuple[str, str]


@pytest.fixture(scope="module")
def secured(samples: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    folder = tmp_path_factory.mktemp("tls")
    authority = Authority(folder, "authority")
    cert, key = authority.issue("router")
    own = ("--tls-cert", str(cert), "--tls-key", str(key))
    with EtcdServer() as etcd:
        ports = [str(free_port()) for _ in range(4)]
        cache = ("--cache-dir", str(folder / "cache"), "--file-root", str(samples))

        def router(at: int, *flags: str) -> tuple[str, ...]:
            return ("--grpc-port", ports[at], "--rest-port", ports[at + 1], *own, *flags)

        mutual = ("--tls-client-ca", str(authority.file))
        with (
            serving(folder, "instance", etcd.endpoint, *cache) as instance,
            serving(folder, "router", etcd.endpoint, *router(0)) as one,
            serving(folder, "router", etcd.endpoint, *router(2, *mutual)) as other,
        ):
            servers: list[Server] = [instance, one, other]
            for server in servers:
                server.ready()
            at = [f"127.0.0.1:{port}" for port in ports]
            secured = Secured(authority, (at[0], at[1]), (at[2], at[3]))
            with Asker(at[0], trusting(authority)) as ask:
                ask.apply(isvc("iris-0001", (samples / "iris-0001").as_uri()))
                assert ask.labels("iris-0001") == LABELS
            yield secured


def trusting(
    authority: Authority, shown: tuple[Path, Path] | None = None
) -> grpc.ChannelCredentials:
    root = authority.file.read_bytes()
    if shown is None:
        return grpc.ssl_channel_credentials(root)
    cert, key = shown
    return grpc.ssl_channel_credentials(root, key.read_bytes(), cert.read_bytes())


def https_status(address: str, context: ssl.SSLContext) -> int:
    host, _, port = address.rpartition(":")
    connection = http.client.HTTPSConnection(host, int(port), timeout=60, context=context)
    try:
        connection.request("GET", "/v2/models/iris-0001/ready")
        return connection.getresponse().status
    finally:
        connection.close()


def test_tls(secured: Secured) -> None:
    grpc_address, rest_address = secured.tls
    with Asker(grpc_address, trusting(secured.authority)) as ask:
        assert ask.labels("iris-0001") == LABELS
    context = ssl.create_default_context(cafile=str(secured.authority.file))
    assert https_status(rest_address, context) == 200


def test_plain_text_to_a_tls_port_is_refused(secured: Secured) -> None:
    with Asker(secured.tls[0]) as ask:
        error = failure_of(lambda: ask.labels("iris-0001", timeout_s=5))
        assert error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
    with Asker(secured.tls[0], trusting(secured.authority)) as ask:
        assert ask.labels("iris-0001") == LABELS


def test_mutual_tls_lets_known_clients_in_and_nobody_else(secured: Secured, tmp_path: Path) -> None:
    known = secured.authority.issue("client")
    stranger = Authority(tmp_path, "stranger").issue("intruder")
    grpc_address, rest_address = secured.mutual
    with Asker(grpc_address, trusting(secured.authority, known)) as ask:
        assert ask.labels("iris-0001") == LABELS
    for shown in (None, stranger):
        with Asker(grpc_address, trusting(secured.authority, shown)) as ask:
            error = failure_of(lambda ask=ask: ask.labels("iris-0001"))
            assert error.code() is grpc.StatusCode.UNAVAILABLE
    context = ssl.create_default_context(cafile=str(secured.authority.file))
    with pytest.raises((ssl.SSLError, ConnectionError)):
        https_status(rest_address, context)
    context.load_cert_chain(*known)
    assert https_status(rest_address, context) == 200


def test_half_of_the_settings_is_refused(tmp_path: Path, secured: Secured) -> None:
    server = Server(tmp_path, "router", "127.0.0.1:1", "--tls-cert", str(secured.authority.file))
    assert server.process.wait(60) == 2
    assert "--tls-key" in server.log
