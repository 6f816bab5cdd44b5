"""ModelMesh's etcd_connection: what it says, what is wrong in it, and a guarded etcd behind it."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mesh.core.errors import InvalidArgument
from mesh.store.api import StoreDenied, StoreUnavailable
from mesh.store.etcd import EtcdStore
from mesh.store.etcd_connection import EtcdConnection, load_etcd_connection, parse_etcd_connection
from mesh.store.etcd_options import EtcdOptions, EtcdTls
from router.process import run
from router.settings import RouterSettings
from tests.etcd_access import USER, enable_users, make_certificates
from tests.etcd_server import EtcdServer

PEM = "-----BEGIN CERTIFICATE-----\n{}\n-----END CERTIFICATE-----\n"
CA, CERTIFICATE, KEY = (PEM.format(one) for one in ("ca", "certificate", "key"))
ENTRIES = {"ca.pem": CA.encode(), "tls.crt": CERTIFICATE.encode(), "tls.key": KEY.encode()}


def entry(name: str) -> bytes:
    if name not in ENTRIES:
        raise FileNotFoundError(2, "No such file or directory", name)
    return ENTRIES[name]


def parse(**said: Any) -> EtcdConnection:
    return parse_etcd_connection(json.dumps(said), entry)


TLS = EtcdTls(CA.encode(), CERTIFICATE.encode(), KEY.encode())


@pytest.mark.parametrize(
    ("said", "expected", "prefix"),
    [
        ({"endpoints": "a:1"}, EtcdOptions(("http://a:1",)), ""),
        (
            {"endpoints": "http://a:1, b:2/,", "root_prefix": "/mine/"},
            EtcdOptions(("http://a:1", "http://b:2")),
            "mine",
        ),
        # etcd-java's default port
        ({"endpoints": "etcd"}, EtcdOptions(("http://etcd:2379",)), ""),
        ({"endpoints": "[::1]"}, EtcdOptions(("http://[::1]:2379",)), ""),
        ({"endpoints": "[::1]:1"}, EtcdOptions(("http://[::1]:1",)), ""),
        (
            {"endpoints": "a:1", "userid": "u", "password": "p"},
            EtcdOptions(("http://a:1",), user="u", password="p"),
            "",
        ),
        ({"endpoints": "https://a:1"}, EtcdOptions(("https://a:1",), tls=EtcdTls()), ""),
        (
            {
                "endpoints": "https://a:1,https://b:2",
                "certificate_file": "ca.pem",
                "client_certificate_file": "tls.crt",
                "client_key_file": "tls.key",
            },
            EtcdOptions(("https://a:1", "https://b:2"), tls=TLS),
            "",
        ),
        (
            {
                "endpoints": "https://a:1",
                "certificate": CA,
                "client_certificate": CERTIFICATE,
                "client_key": KEY,
            },
            EtcdOptions(("https://a:1",), tls=TLS),
            "",
        ),
        # No scheme, and a certificate: TLS.
        (
            {"endpoints": "a:1", "certificate": CA},
            EtcdOptions(("https://a:1",), tls=EtcdTls(CA.encode())),
            "",
        ),
        ({"endpoints": "a:1", "tls_mode": "TLS"}, EtcdOptions(("https://a:1",), tls=EtcdTls()), ""),
        (
            {"endpoints": "https://a:1", "override_authority": "etcd"},
            EtcdOptions(("https://a:1",), tls=EtcdTls(server_name="etcd")),
            "",
        ),
        (
            {"endpoints": "https://a:1", "compose_deployment": "etcd"},
            EtcdOptions(("https://a:1",), tls=EtcdTls(server_name="etcd")),
            "",
        ),
    ],
)
def test_what_it_says(said: dict[str, str], expected: EtcdOptions, prefix: str) -> None:
    assert parse(**said) == EtcdConnection(expected, prefix)


@pytest.mark.parametrize(
    ("said", "warning"),
    [
        ({"colour": "red"}, "colour: unknown field, ignored"),
        (
            {"certificate": CA, "certificate_file": "ca.pem"},
            "certificate: not used, as certificate_file counts",
        ),
        ({"certificate": CA, "certificate_file": "none"}, "cannot read 'none'"),
        ({"endpoints": "http://a:1", "certificate": CA}, "certificate: not used"),
        ({"tls_mode": "PLAINTEXT", "certificate": CA}, "certificate: not used"),
    ],
)
def test_only_said(said: dict[str, str], warning: str) -> None:
    (found,) = parse(**{"endpoints": "a:1", **said}).warnings
    assert warning in found


SECRET = "hunter2"


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("{", "expected JSON"),
        (f'{{"password": "{SECRET}" "', "expected JSON"),
        ("[]", "expected a JSON object"),
        ("{}", "endpoints: expected HOST:PORT"),
        ('{"endpoints": ","}', "endpoints"),
        ('{"endpoints": "a:x"}', "endpoints"),
        ('{"endpoints": "ftp://a:1"}', "endpoints"),
        ('{"endpoints": ["a:1"]}', "endpoints"),
        ('{"endpoints": "https://a:1,http://b:1"}', "all of them https://"),
        (f'{{"endpoints": "https://u:{SECRET}@a:1"}}', "endpoints: a user and password belong"),
        (f'{{"endpoints": "a:1", "password": "{SECRET}"}}', "userid and password: expected both"),
        ('{"endpoints": "a:1", "userid": "u"}', "userid and password: expected both"),
        ('{"endpoints": "a:1", "password": 1234}', "password: expected a string"),
        (f'{{"endpoints": "a:1", "client_key": "{SECRET}"}}', "client_key: expected PEM"),
        ('{"endpoints": "a:1", "client_key_file": "tls.key"}', "expected both or neither"),
        ('{"endpoints": "a:1", "certificate_file": "none"}', "certificate_file: cannot read"),
        ('{"endpoints": "a:1", "tls_mode": "SOME"}', "tls_mode: expected one of"),
        ('{"endpoints": "a:1", "root_prefix": 1}', "root_prefix: expected a string"),
    ],
)
def test_what_is_wrong_is_named_and_no_secret_is_shown(text: str, field: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        parse_etcd_connection(text, entry)
    assert field in caught.value.message
    assert SECRET not in caught.value.message and "1234" not in caught.value.message


def test_no_secret_in_what_settings_show() -> None:
    found = parse(
        endpoints="https://a:1",
        userid="u",
        password=SECRET,
        client_key=PEM.format(SECRET),
        client_certificate=CERTIFICATE,
    )
    assert found.options.password == SECRET
    assert SECRET not in repr(RouterSettings(etcd=found.options)) + repr(found)


def test_files_lie_beside_the_json_and_errors_begin_with_its_path(tmp_path: Path) -> None:
    path = tmp_path / "etcd_connection"
    with pytest.raises(InvalidArgument, match=f"{path}: No such file"):
        load_etcd_connection(path)
    path.write_text('{"endpoints": "https://a:1", "certificate_file": "ca.pem"}')
    with pytest.raises(InvalidArgument, match=f"{path}: certificate_file: cannot read 'ca.pem'"):
        load_etcd_connection(path)
    (tmp_path / "ca.pem").write_text(CA)
    tls = load_etcd_connection(path).options.tls
    assert tls is not None and tls.ca == CA.encode()


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdServer]:
    """An etcd that wants a client's certificate and a user's password."""
    folder = tmp_path_factory.mktemp("certificates")
    make_certificates(folder)
    with EtcdServer(certificates=folder) as server:
        enable_users(server, password="secret", prefix="/mine/default/")
        yield server


def secret_of(server: EtcdServer, folder: Path, **changed: str | None) -> Path:
    """The secret as it is mounted; None takes a field away."""
    assert server.certificates is not None
    for name in ("ca.pem", "client.pem", "client.key"):
        (folder / name).write_bytes((server.certificates / name).read_bytes())
    said = {
        "endpoints": f"https://{server.endpoint}",
        "root_prefix": "mine",
        "userid": USER,
        "password": "secret",
        "certificate_file": "ca.pem",
        "client_certificate_file": "client.pem",
        "client_key_file": "client.key",
        **changed,
    }
    path = folder / "etcd_connection"
    path.write_text(json.dumps({key: one for key, one in said.items() if one is not None}))
    return path


@pytest.mark.etcd
async def test_a_guarded_etcd_is_reached_by_the_secret(guarded: EtcdServer, tmp_path: Path) -> None:
    found = load_etcd_connection(secret_of(guarded, tmp_path))
    store = EtcdStore(found.options, prefix=found.prefix)
    try:
        await store.put("a", b"1")
        got = await store.get("a")
        assert got is not None and got.value == b"1"
    finally:
        await store.close()


@pytest.mark.etcd
@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"client_certificate_file": None, "client_key_file": None}, "our certificate"),
        ({"certificate_file": "other.pem"}, "certificate signature failure"),
        ({"override_authority": "somebody-else"}, "Hostname Verification"),
        ({"client_key_file": "other.key"}, "our certificate and key"),
        ({"tls_mode": "PLAINTEXT"}, "does it expect TLS"),
    ],
    ids=["no certificate", "another authority", "another name", "another key", "no TLS"],
)
async def test_why_no_connection_comes_about_is_said(
    guarded: EtcdServer, tmp_path: Path, changed: dict[str, str | None], said: str
) -> None:
    others = tmp_path / "others"
    others.mkdir()
    make_certificates(others)
    (tmp_path / "other.pem").write_bytes((others / "ca.pem").read_bytes())
    (tmp_path / "other.key").write_bytes((others / "client.key").read_bytes())
    found = load_etcd_connection(secret_of(guarded, tmp_path, **changed))
    store = EtcdStore(found.options, prefix=found.prefix)
    try:
        with pytest.raises(StoreUnavailable, match=said) as caught:
            await store.get("a")
        assert guarded.endpoint in caught.value.message
    finally:
        await store.close()


@pytest.mark.etcd
async def test_a_router_with_a_wrong_password_ends_and_says_why(
    guarded: EtcdServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = load_etcd_connection(secret_of(guarded, tmp_path, password="wrong"))
    settings = RouterSettings(
        etcd=found.options, prefix=found.prefix, grpc_port=0, rest_port=None, metrics_port=None
    )
    with caplog.at_level(logging.ERROR):
        assert await run(settings) == 1
    assert "router ends" in caplog.text and f"authentication of user '{USER}'" in caplog.text
    assert "check the etcd user" in caplog.text and "'wrong'" not in caplog.text


@pytest.mark.etcd
async def test_a_user_without_rights_is_refused(guarded: EtcdServer, tmp_path: Path) -> None:
    found = load_etcd_connection(secret_of(guarded, tmp_path, root_prefix="other"))
    store = EtcdStore(found.options, prefix=found.prefix)
    try:
        with pytest.raises(StoreDenied, match="permission denied"):
            await store.get("a")
    finally:
        await store.close()
