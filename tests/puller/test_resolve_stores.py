"""Entries and environments of Google, Azure and http, as tables; no disk, no network."""

from __future__ import annotations

import json
from typing import Any

import pytest

from mesh.core.errors import Code, LoadFailed
from puller.location import AzureLocation, GcsLocation, HttpLocation, Location
from puller.resolve import resolve_location
from puller.storage_key import StorageSecret

GCS = {"type": "gcs", "bucket": "b-1", "client_email": "e@x", "private_key": "SECRET-KEY"}
AZURE = {"type": "azure", "account_name": "acct1", "container": "c-1", "account_key": "SECRET-KEY"}
HTTP = {
    "type": "http",
    "url": "https://files.example/models",
    "headers": {"Authorization": "SECRET-TOKEN"},
    "certificate": "PEM",
    "client_certificate": "CLIENT",
    "client_key": "SECRET-KEY",
}
NAMED = {"storage_key": "k"}


def resolve(path: str, key: Any = None, entries: Any = None, **store_env: str) -> Location:
    texts = {name: json.dumps(entry) for name, entry in (entries or {}).items()}
    return resolve_location(
        path,
        json.dumps(key) if key else "",
        secret=StorageSecret("/storage-config", texts),
        store_env=store_env,
    )


@pytest.mark.parametrize("scheme", ["gs", "gcs", "GS"])
def test_both_of_googles_schemes_with_a_key(scheme: str) -> None:
    location = resolve(f"{scheme}://other/m", NAMED, {"k": GCS})
    assert isinstance(location, GcsLocation)
    assert (location.bucket, location.prefix, location.uri) == ("other", "m", "gs://other/m")
    assert location.credentials.client_email == "e@x"


def test_the_default_of_the_type_comes_before_the_default() -> None:
    entries = {"default": {**GCS, "client_email": "d@x"}, "default_gcs": GCS}
    location = resolve("gs://b-2/m", None, entries)
    assert isinstance(location, GcsLocation)
    assert location.credentials_from == "storage key 'default_gcs'"


def test_a_default_of_another_type_is_for_something_else() -> None:
    location = resolve("gs://b-2/m", None, {"default": AZURE}, GOOGLE_APPLICATION_CREDENTIALS="/f")
    assert isinstance(location, GcsLocation)
    assert location.credentials_from == "GOOGLE_APPLICATION_CREDENTIALS"


@pytest.mark.parametrize(
    "uri",
    [
        "azure://c-1/a b/m",
        "abfs://c-1@acct1.dfs.core.windows.net/a b/m",
        "abfss://c-1@acct1.dfs.core.windows.net/a b/m",
        "https://acct1.blob.core.windows.net/c-1/a%20b/m",
        "https://acct1.z12.blob.storage.azure.net/c-1/a%20b/m",
        "a b/m",
    ],
)
def test_every_way_to_write_a_blob(uri: str) -> None:
    location = resolve(uri, NAMED, {"k": AZURE})
    assert isinstance(location, AzureLocation)
    assert (location.account, location.bucket, location.prefix) == ("acct1", "c-1", "a b/m")
    assert location.credentials.account_key == "SECRET-KEY"


def test_a_blob_of_another_account_is_not_asked_for_with_the_default_key() -> None:
    location = resolve("https://acct2.blob.core.windows.net/c-1/m", None, {"default_azure": AZURE})
    assert isinstance(location, AzureLocation)
    assert location.account == "acct2"
    assert location.credentials.anonymous


def test_a_signed_link_to_a_blob_is_http() -> None:
    uri = "https://acct1.blob.core.windows.net/c-1/m?sv=1&sig=SECRET"
    location = resolve(uri, None, {"default_azure": AZURE})
    assert isinstance(location, HttpLocation)
    assert location.url == uri
    assert location.uri == "https://acct1.blob.core.windows.net/c-1/m?…"


def test_a_service_principal_of_the_environment_reads_any_account() -> None:
    env = {"AZURE_CLIENT_ID": "i", "AZURE_CLIENT_SECRET": "s", "AZURE_TENANT_ID": "t"}
    location = resolve("https://acct9.blob.core.windows.net/c-1/m", **env)
    assert isinstance(location, AzureLocation)
    assert location.credentials.client_secret == "s"


def test_a_connection_string_is_taken_apart() -> None:
    text = (
        "DefaultEndpointsProtocol=https;AccountName=acct1;AccountKey=ab==;"
        "EndpointSuffix=core.chinacloudapi.cn"
    )
    entry = {"type": "azure", "container": "c-1", "connection_string": text}
    location = resolve("m", NAMED, {"k": entry})
    assert isinstance(location, AzureLocation)
    assert location.credentials.account_key == "ab=="
    assert location.where == "https://acct1.blob.core.chinacloudapi.cn"


def test_an_http_key_gives_everything_below_its_url() -> None:
    by_path = resolve("a b/m.zip", NAMED, {"k": HTTP})
    by_uri = resolve("https://files.example/models/a%20b/m.zip", NAMED, {"k": HTTP})
    assert isinstance(by_path, HttpLocation)
    assert by_path == by_uri
    assert by_path.headers == {"Authorization": "SECRET-TOKEN"}
    assert (by_path.client_certificate_pem, by_path.client_key_pem) == ("CLIENT", "SECRET-KEY")


@pytest.mark.parametrize("headers", ['{"A": "b"}', {"A": ["b"]}, {"A": "b"}])
def test_headers_as_text_or_lists_are_headers(headers: Any) -> None:
    location = resolve("m", NAMED, {"k": {**HTTP, "headers": headers}})
    assert isinstance(location, HttpLocation)
    assert location.headers == {"A": "b"}


@pytest.mark.parametrize(
    "uri",
    [
        "https://other.example/models/m",
        "http://files.example/models/m",
        "https://files.example/modelsm",
        "https://files.example:444/models/m",
    ],
)
def test_a_default_http_key_goes_nowhere_else(uri: str) -> None:
    location = resolve(uri, None, {"default_http": HTTP})
    assert isinstance(location, HttpLocation)
    assert (location.headers, location.client_key_pem) == ({}, "")


@pytest.mark.parametrize(
    ("path", "key", "entry", "says"),
    [
        ("m", NAMED, {"type": "gcs"}, "no bucket for path"),
        ("m", NAMED, {**GCS, "private_key": ""}, "only one of client_email and private_key"),
        ("m", NAMED, {"type": "azure"}, "no container for path"),
        ("m", NAMED, {**AZURE, "account_name": ""}, "no account_name"),
        ("m", NAMED, {**AZURE, "client_id": "x"}, "only some of client_id"),
        ("m", NAMED, {**AZURE, "connection_string": "SECRET"}, "not NAME=VALUE"),
        ("m", NAMED, {**AZURE, "connection_string": "AccountName=a"}, "has no AccountKey"),
        ("azure://C/m", NAMED, AZURE, "not the name of a container"),
        ("azure://c-1/m", None, GCS, "no storage account"),
        ("https://acct2.blob.core.windows.net/c-1/m", NAMED, AZURE, "names account 'acct2'"),
        ("gs://b-1/m", NAMED, AZURE, "of type 'azure', which cannot read gs://b-1"),
        ("https://other.example/m", NAMED, HTTP, "does not lie below the 'url'"),
        ("m", NAMED, {"type": "http"}, "has no 'url'"),
        ("m", NAMED, {**HTTP, "client_key": ""}, "only one of client_certificate"),
        ("m", NAMED, {**HTTP, "headers": "x"}, "not an object of strings"),
        ("m", NAMED, {**HTTP, "headers": {"Host": "x"}}, "may not set the header 'Host'"),
        ("m", NAMED, {**HTTP, "headers": {"A": "SECRET\r\nB: c"}}, "no text that a header"),
        ("../m", NAMED, HTTP, "'..'"),
        ("http://user:SECRET@h/m", None, GCS, "carries a user name"),
        ("http://h/a/%2e%2e/m", None, GCS, "'..'"),
        ("http:///m", None, GCS, "not http://HOST/PATH"),
        ("http://h:x/m", None, GCS, "cannot be read as a URL"),
        (
            "m",
            {**NAMED, "storage_params": {"url": "http://evil"}},
            HTTP,
            "'url' cannot be set by a model",
        ),
        (
            "m",
            {**NAMED, "storage_params": {"account_name": "evil"}},
            AZURE,
            "'account_name' cannot be set by a model",
        ),
    ],
)
def test_what_is_refused(path: str, key: Any, entry: dict[str, Any], says: str) -> None:
    with pytest.raises(LoadFailed, match=says) as caught:
        resolve(path, key, {"k": entry})
    assert caught.value.code is Code.FAILED_PRECONDITION
    assert "SECRET" not in f"{caught.value!r} {caught.value.__cause__!r}"


@pytest.mark.parametrize("entry", [GCS, AZURE, HTTP])
def test_no_secret_shows_in_a_repr(entry: dict[str, Any]) -> None:
    assert "SECRET" not in repr(resolve("m", NAMED, {"k": entry}))
