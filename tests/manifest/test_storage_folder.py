"""The storage secret: what is read of a resource, and what becomes of the folder."""

from __future__ import annotations

import base64
import stat
from pathlib import Path
from typing import Any

import pytest

from mesh.core.errors import InvalidArgument
from mesh.storage_folder import applied_secret, data_of, write_folder
from puller.storage_config import read_storage_config

S3 = '{"type":"s3","access_key_id":"a"}'


def secret(**parts: Any) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "storage-config"}, **parts}


def test_plain_text_goes_before_base64_which_may_be_wrapped() -> None:
    wrapped = base64.encodebytes(S3.encode() * 9).decode()
    found = applied_secret(secret(data={"a": wrapped, "b": wrapped}, stringData={"b": S3}))
    assert found == {"a": S3.encode() * 9, "b": S3.encode()}
    assert applied_secret(secret()) == {}


@pytest.mark.parametrize(
    ("sentence", "resource", "told"),
    [
        ("another secret", secret(metadata={"name": "other"}), "metadata.name: the only secret"),
        ("no name", secret(metadata=None), "metadata.name: the only secret"),
        ("another version", secret(apiVersion="v2"), "apiVersion: expected v1"),
        ("no base64", secret(data={"k": "p@ss"}), "data.k: expected base64"),
        ("an object", secret(stringData={"k": {"type": "s3"}}), "stringData.k: expected a string"),
        ("a way out", secret(stringData={"../../k": S3}), "stringData: a key: expected letters"),
        ("a hidden file", secret(data={".written": ""}), "data: a key: expected letters"),
        ("a list", secret(data=["k"]), "data: expected a mapping"),
        ("too much", secret(stringData={"k": "x" * 1_048_577}), "expected at most 1048576"),
    ],
    ids=lambda value: value if isinstance(value, str) and " " in value else "",
)
def test_what_is_wrong_is_named_and_no_value_is_shown(
    sentence: str, resource: dict[str, Any], told: str
) -> None:
    with pytest.raises(InvalidArgument) as caught:
        applied_secret(resource)
    assert caught.value.message.startswith(told) or told in caught.value.message
    assert "p@ss" not in caught.value.message


def test_entries_are_files_that_only_their_owner_reads(tmp_path: Path) -> None:
    folder = tmp_path / "storage-config"
    assert write_folder(folder, {"a": b"1", "b": b"2"}) == "created"
    assert read_storage_config(folder) == {"a": "1", "b": "2"}
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}


def test_what_is_no_entry_any_more_goes_and_what_others_put_there_stays(tmp_path: Path) -> None:
    write_folder(tmp_path, {"a": b"1", "b": b"2"})
    (tmp_path / "by-hand").write_text("3")
    (tmp_path / "folder").mkdir()
    assert write_folder(tmp_path, {"b": b"2"}) == "configured"
    assert read_storage_config(tmp_path) == {"b": "2", "by-hand": "3"}
    assert write_folder(tmp_path, {}) == "configured"
    assert read_storage_config(tmp_path) == {"by-hand": "3"}
    assert (tmp_path / "folder").is_dir()


def test_the_same_again_writes_nothing(tmp_path: Path) -> None:
    write_folder(tmp_path, {"a": b"1"})
    before = {path.name: path.stat().st_ino for path in tmp_path.iterdir()}
    assert write_folder(tmp_path, {"a": b"1"}) == "unchanged"
    assert {path.name: path.stat().st_ino for path in tmp_path.iterdir()} == before
    (tmp_path / "a").write_text("changed by somebody")
    assert write_folder(tmp_path, {"a": b"1"}) == "configured"
    assert read_storage_config(tmp_path) == {"a": "1"}


def test_a_marker_that_cannot_be_read_deletes_nothing(tmp_path: Path) -> None:
    write_folder(tmp_path, {"a": b"1", "b": b"2"})
    (tmp_path / ".written").write_text('["../a", 3')
    write_folder(tmp_path, {"a": b"1"})
    assert read_storage_config(tmp_path) == {"a": "1", "b": "2"}


def test_an_api_servers_secret_is_taken_as_far_as_it_can_be_read() -> None:
    assert data_of({"data": {"a": "MQ==", "b": "!"}}) == {"a": b"1"}
    assert data_of(None) == {} and data_of({"data": None}) == {}


def test_an_entry_that_begins_with_a_dot_is_none_and_cannot_forge_the_marker(
    tmp_path: Path,
) -> None:
    (tmp_path / "a-persons").write_bytes(b"theirs")
    write_folder(tmp_path, {"main": b"ours", ".written": b'["a-persons", ".."]', ".other": b"x"})
    assert sorted(path.name for path in tmp_path.iterdir()) == [".written", "a-persons", "main"]
    write_folder(tmp_path, {})
    assert (tmp_path / "a-persons").read_bytes() == b"theirs"
    assert not (tmp_path / "main").exists()
