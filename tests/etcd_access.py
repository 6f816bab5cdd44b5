"""What guards a real etcd in tests: certificates, and users with passwords."""

from __future__ import annotations

import base64
import datetime
import ipaddress
import json
import ssl
import urllib.request
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from tests.etcd_server import EtcdServer

USER = "mesh"


def enable_users(server: EtcdServer, *, password: str, prefix: str = "/mesh/default/") -> None:
    """From now on only ``USER`` gets in, and only at keys below ``prefix`` (and root)."""
    for user, its in (("root", "top"), (USER, password)):
        _post(server, "auth/user/add", name=user, password=its)
        _post(server, "auth/role/add", name=user)
        _post(server, "auth/user/grant", user=user, role=user)
    start, end = (_text(one) for one in (prefix, prefix[:-1] + chr(ord(prefix[-1]) + 1)))
    permission = {"permType": "READWRITE", "key": start, "range_end": end}
    _post(server, "auth/role/grant", name=USER, perm=permission)
    _post(server, "auth/enable")


def _text(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def _post(server: EtcdServer, path: str, **body: object) -> None:
    """etcd's JSON gateway; for what the mesh itself never does."""
    scheme, context = "http", None
    if server.certificates is not None:
        scheme = "https"
        context = ssl.create_default_context(cafile=str(server.certificates / "ca.pem"))
        context.load_cert_chain(
            server.certificates / "client.pem", server.certificates / "client.key"
        )
    request = urllib.request.Request(
        f"{scheme}://{server.endpoint}/v3/{path}", json.dumps(body).encode()
    )
    handlers = (urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context))
    with urllib.request.build_opener(*handlers).open(request, timeout=60) as reply:
        reply.read()


def make_certificates(folder: Path) -> None:
    """ca.pem, and a server's and a client's certificate with their keys."""
    ca_key = ec.generate_private_key(ec.SECP256R1())
    ca_name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "mesh test CA")])
    now = datetime.datetime.now(datetime.UTC)

    def sign(subject: str, key: ec.EllipticCurvePrivateKey, *, ca: bool) -> x509.Certificate:
        name = ca_name if ca else x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject)])
        addresses = [x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
        return (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(ca_name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName(addresses), critical=False)
            .sign(ca_key, hashes.SHA256())
        )

    pem = serialization.Encoding.PEM
    (folder / "ca.pem").write_bytes(sign("", ca_key, ca=True).public_bytes(pem))
    for name in ("server", "client"):
        key = ec.generate_private_key(ec.SECP256R1())
        (folder / f"{name}.pem").write_bytes(sign(name, key, ca=False).public_bytes(pem))
        (folder / f"{name}.key").write_bytes(
            key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        )
