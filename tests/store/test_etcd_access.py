"""Who may speak to etcd: users and passwords, certificates, and options that make no sense."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from mesh.core.errors import InvalidArgument
from mesh.store.api import StoreDenied, StoreUnavailable
from mesh.store.etcd import EtcdStore
from mesh.store.etcd_options import EtcdOptions, EtcdTls, parse_endpoints, split_endpoint
from tests.etcd_access import enable_users, make_certificates
from tests.etcd_server import EtcdServer
from tests.store.watching import Watching


@pytest.fixture(scope="module")
def guarded() -> Iterator[EtcdServer]:
    """An etcd with authentication: user mesh may use keys below /mesh/default/ only."""
    with EtcdServer() as server:
        enable_users(server, password="secret")
        yield server


@pytest.mark.etcd
async def test_a_user_with_the_right_password_does_everything(guarded: EtcdServer) -> None:
    store = EtcdStore(EtcdOptions((guarded.endpoint,), user="mesh", password="secret"))
    try:
        await store.wait_ready()
        async with Watching(store) as watching:
            lease = await store.lease(60_000)
            await store.put("instances/i", b"", lease_id=lease.lease_id)
            await watching.until(lambda: "instances/i" in watching.state)
            await lease.revoke()
            await watching.until(lambda: watching.state == {})
    finally:
        await store.close()


@pytest.mark.etcd
async def test_a_token_that_etcd_forgot_is_renewed(guarded: EtcdServer) -> None:
    store = EtcdStore(EtcdOptions((guarded.endpoint,), user="mesh", password="secret"))
    try:
        async with Watching(store) as watching:
            await asyncio.to_thread(guarded.restart)  # tokens are in memory
            await store.wait_ready()
            await store.put("a", b"")
            await watching.until(lambda: "a" in watching.state)
            assert watching.snapshots == 1
    finally:
        await store.close()


@pytest.mark.etcd
@pytest.mark.parametrize(
    ("user", "password", "namespace"),
    [("mesh", "wrong", "default"), ("", "", "default"), ("mesh", "secret", "other")],
    ids=["wrong password", "no user", "no permission"],
)
async def test_being_refused_is_final_and_said(
    guarded: EtcdServer, user: str, password: str, namespace: str
) -> None:
    options = EtcdOptions((guarded.endpoint,), user=user, password=password)
    store = EtcdStore(options, namespace=namespace)
    try:
        with pytest.raises(StoreDenied, match="check the etcd user") as caught:
            await store.wait_ready()
        assert "secret" not in caught.value.message and "wrong" not in caught.value.message
        with pytest.raises(StoreDenied):
            await store.put("a", b"")
    finally:
        await store.close()


@pytest.mark.etcd
async def test_mutual_tls(tmp_path: Path) -> None:
    make_certificates(tmp_path)
    ca = (tmp_path / "ca.pem").read_bytes()
    certificate, key = (
        (tmp_path / "client.pem").read_bytes(),
        (tmp_path / "client.key").read_bytes(),
    )
    with EtcdServer(certificates=tmp_path) as server:
        endpoint = (f"https://{server.endpoint}",)
        good = EtcdStore(EtcdOptions(endpoint, tls=EtcdTls(ca, certificate, key)))
        nameless = EtcdStore(EtcdOptions(endpoint, tls=EtcdTls(ca)))
        distrusting = EtcdStore(EtcdOptions(endpoint, tls=EtcdTls(None, certificate, key)))
        plain = EtcdStore(EtcdOptions((server.endpoint,)))
        try:
            await good.put("a", b"1")
            found = await good.get("a")
            assert found is not None and found.value == b"1"
            for refused in (nameless, distrusting, plain):
                with pytest.raises(StoreUnavailable, match=server.endpoint):
                    await refused.get("a")
        finally:
            for store in (good, nameless, distrusting, plain):
                await store.close()


@pytest.mark.parametrize(
    ("endpoints", "more", "message"),
    [
        ((), {}, "no etcd endpoint is given"),
        (("localhost",), {}, "'localhost' is not host:port"),
        (("localhost:0",), {}, "is not host:port"),
        (("localhost:99999",), {}, "is not host:port"),
        (("localhost:x",), {}, "is not host:port"),
        (("http://a:1/path",), {}, "is not host:port"),
        (("https://a:1",), {}, "is https, but no TLS options"),
        (("a:1",), {"password": "x"}, "password is given without a user"),
    ],
)
def test_options_that_make_no_sense(
    endpoints: tuple[str, ...], more: dict[str, str], message: str
) -> None:
    with pytest.raises(InvalidArgument, match=message):
        EtcdOptions(endpoints, **more)


def test_endpoints_as_written_on_a_command_line() -> None:
    assert parse_endpoints(" a:1, http://b:2 ,,") == ("a:1", "http://b:2")
    assert split_endpoint("http://b:2/") == "b:2"
    assert split_endpoint("[::1]:2379") == "[::1]:2379"


@pytest.mark.parametrize(("prefix", "namespace"), [("", "a"), ("a", ""), ("/", "a")])
async def test_an_empty_prefix_is_refused(prefix: str, namespace: str) -> None:
    with pytest.raises(InvalidArgument, match="is empty"):
        EtcdStore(EtcdOptions(("a:1",)), prefix=prefix, namespace=namespace)
