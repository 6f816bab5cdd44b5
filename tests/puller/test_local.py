"""file:// and pvc://: used in place, only below their roots."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mesh.core.errors import Code, LoadFailed
from puller.storage_config import read_storage_config
from tests.puller.conftest import OpenPuller, leftovers, request


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "models"
    (root / "a/sub").mkdir(parents=True)
    (root / "a/model.onnx").write_bytes(b"12345")
    (root / "a/sub/more").write_bytes(b"67")
    return root


async def test_a_folder_is_used_in_place(open_puller: OpenPuller, root: Path) -> None:
    puller = open_puller(file_roots=(root,))
    seen: list[tuple[int, int | None]] = []
    artifact = await puller.fetch(
        request(f"file://{root}/a"), lambda done, total: seen.append((done, total))
    )
    assert (artifact.path, artifact.size_bytes) == (root / "a", 7)
    assert artifact.cached
    assert artifact.source == f"file://{root}/a"
    assert seen == [(7, 7)]
    puller.release(artifact)
    assert (root / "a/model.onnx").exists()


async def test_a_file_is_used_in_place(open_puller: OpenPuller, root: Path) -> None:
    puller = open_puller(file_roots=(Path("/nonexistent"), root))
    artifact = await puller.fetch(request(f"file://{root}/a/model.onnx"))
    assert (artifact.path, artifact.size_bytes) == (root / "a/model.onnx", 5)


async def test_local_files_make_no_cache(open_puller: OpenPuller, root: Path) -> None:
    puller = open_puller(file_roots=(root,), cache_dir=Path("/proc/no-such-place"))
    await puller.fetch(request(f"file://{root}/a"))


async def refusal(puller: object, path: str) -> str:
    with pytest.raises(LoadFailed) as caught:
        await puller.fetch(request(path))  # type: ignore[attr-defined]
    assert caught.value.code is Code.FAILED_PRECONDITION
    return caught.value.message


async def test_without_roots_file_is_off_and_the_setting_named(
    open_puller: OpenPuller, root: Path
) -> None:
    message = await refusal(open_puller(), f"file://{root}/a")
    assert "--file-root" in message
    assert "MESH_FILE_ROOTS" in message


async def test_what_is_outside_the_roots_is_refused(open_puller: OpenPuller, root: Path) -> None:
    puller = open_puller(file_roots=(root,))
    (root.parent / "models2").mkdir()
    (root.parent / "models2/secret").touch()
    assert "not below" in await refusal(puller, "file:///etc/passwd")
    assert "not below" in await refusal(puller, f"file://{root}2/secret")
    assert "'..'" in await refusal(puller, f"file://{root}/../models2/secret")


async def test_a_link_out_is_refused(open_puller: OpenPuller, root: Path) -> None:
    puller = open_puller(file_roots=(root,))
    (root / "out").symlink_to("/etc")
    (root / "a/passwd").symlink_to("/etc/passwd")
    assert "leads out" in await refusal(puller, f"file://{root}/out")
    assert "leads out" in await refusal(puller, f"file://{root}/out/passwd")
    assert "leads out" in await refusal(puller, f"file://{root}/a/passwd")
    assert "leads out" in await refusal(puller, f"file://{root}/a")  # it is inside the folder


async def test_a_root_may_be_reached_by_a_link(open_puller: OpenPuller, root: Path) -> None:
    """An operator's root behind a link, named by the link or by where it leads."""
    link = root.parent / "link"
    link.symlink_to(root)
    for named in (root, link):
        puller = open_puller(file_roots=(named,))
        for used in (root, link):
            artifact = await puller.fetch(request(f"file://{used}/a"))
            assert artifact.path == root / "a"


async def test_a_refusal_does_not_tell_what_exists(open_puller: OpenPuller, root: Path) -> None:
    puller = open_puller(file_roots=(root,))
    there = await refusal(puller, "file:///etc/passwd")
    not_there = await refusal(puller, "file:///etc/nonono")
    assert there.replace("passwd", "nonono") == not_there


async def test_links_inside_are_followed_and_counted(open_puller: OpenPuller, root: Path) -> None:
    """As Kubernetes mounts a ConfigMap: names are links through ``..data``."""
    (root / "cm/..2024").mkdir(parents=True)
    (root / "cm/..2024/model.onnx").write_bytes(b"123")
    (root / "cm/..data").symlink_to("..2024")
    (root / "cm/model.onnx").symlink_to("..data/model.onnx")
    (root / "cm/again").symlink_to("../cm")  # a circle must end
    artifact = await open_puller(file_roots=(root,)).fetch(request(f"file://{root}/cm"))
    assert artifact.size_bytes >= 3


async def test_missing_empty_and_odd(open_puller: OpenPuller, root: Path) -> None:
    puller = open_puller(file_roots=(root,))
    (root / "empty").mkdir()
    os.mkfifo(root / "pipe")
    (root / "with-pipe").mkdir()
    os.mkfifo(root / "with-pipe/p")
    assert "does not exist" in await refusal(puller, f"file://{root}/nope")
    assert "does not exist" in await refusal(puller, f"file://{root}/a/model.onnx/x")
    assert "empty folder" in await refusal(puller, f"file://{root}/empty")
    assert "neither a file nor" in await refusal(puller, f"file://{root}/pipe")
    assert "neither a file nor" in await refusal(puller, f"file://{root}/with-pipe")


async def test_bounds_of_size_and_files(open_puller: OpenPuller, root: Path) -> None:
    small = open_puller(file_roots=(root,), max_artifact_bytes=6)
    assert "7 bytes, more than the 6" in await refusal(small, f"file://{root}/a")
    few = open_puller(file_roots=(root,), max_artifact_files=2)
    assert "more than 2 files" in await refusal(few, f"file://{root}/a")


async def test_a_claim_is_read_below_its_mount(open_puller: OpenPuller, tmp_path: Path) -> None:
    claim = tmp_path / "pvc/claim-1"
    (claim / "dir").mkdir(parents=True)
    (claim / "dir/m").write_bytes(b"123")
    (claim / "out").symlink_to("..")
    (tmp_path / "pvc/claim-2").mkdir()
    puller = open_puller(pvc_root=tmp_path / "pvc")
    artifact = await puller.fetch(request("pvc://claim-1/dir"))
    assert (artifact.path, artifact.size_bytes) == (claim / "dir", 3)
    by_key = await puller.fetch(
        request("dir/m", '{"storage_params": {"type": "pvc", "name": "claim-1"}}')
    )
    assert by_key.path == claim / "dir/m"
    assert "leads out" in await refusal(puller, "pvc://claim-1/out/claim-2")
    assert "not mounted" in await refusal(puller, "pvc://claim-3/x")
    assert "does not exist" in await refusal(puller, "pvc://claim-1/nope")


async def test_a_changed_storage_secret_counts_at_once(
    open_puller: OpenPuller, tmp_path: Path
) -> None:
    (tmp_path / "pvc/claim-1").mkdir(parents=True)
    (tmp_path / "pvc/claim-1/m").write_bytes(b"123")
    secret = tmp_path / "storage-config"
    secret.mkdir()
    puller = open_puller(pvc_root=tmp_path / "pvc", storage_config_dir=secret)
    with pytest.raises(LoadFailed, match="'mine' not found in storage secret"):
        await puller.fetch(request("m", '{"storage_key": "mine"}'))
    (secret / "mine").write_text('{"type": "pvc", "name": "claim-1"}')
    artifact = await puller.fetch(request("m", '{"storage_key": "mine"}'))
    assert artifact.size_bytes == 3
    assert leftovers(tmp_path / "cache") == []


def test_the_storage_secret_as_kubernetes_mounts_it(tmp_path: Path) -> None:
    (tmp_path / "..2024").mkdir()
    (tmp_path / "..2024/one").write_text("{}")
    (tmp_path / "..data").symlink_to("..2024")
    (tmp_path / "one").symlink_to("..data/one")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    (tmp_path / "huge").write_bytes(b" " * ((1 << 20) + 1))
    entries = read_storage_config(tmp_path)
    assert entries["one"] == "{}"
    assert sorted(entries) == ["binary", "huge", "one"]
    assert read_storage_config(tmp_path / "nope") == {}
    assert read_storage_config(None) == {}
    with pytest.raises(LoadFailed, match="cannot be read"):
        read_storage_config(tmp_path / "one")
