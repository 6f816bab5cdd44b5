from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.core.errors import LoadFailed
from puller.manifest import (
    Manifest,
    RemoteObject,
    check_bounds,
    folder_manifest,
    md5_of,
    parse_sha256sums,
    plan_parts,
    single_manifest,
)


def objects(**sizes: int) -> list[RemoteObject]:
    return [RemoteObject(key, size, f'"{key}"') for key, size in sizes.items()]


def folder(prefix: str, sizes: dict[str, int]) -> Manifest | None:
    return folder_manifest(prefix, objects(**sizes), "s3://b/x")


def test_a_folder_keeps_relative_names_in_order() -> None:
    manifest = folder("m", {"m/b": 2, "m/a/c": 3})
    assert manifest is not None
    assert [(file.path, file.source.key) for file in manifest.files] == [
        ("a/c", "m/a/c"),
        ("b", "m/b"),
    ]
    assert manifest.size_bytes == 5
    assert not manifest.single


def test_markers_of_folders_are_no_files() -> None:
    manifest = folder("m", {"m": 0, "m/sub": 0, "m/sub/b": 2})
    assert manifest is not None
    assert [file.path for file in manifest.files] == ["sub/b"]


def test_a_folder_with_only_its_marker_does_not_exist() -> None:
    assert folder("m", {"m": 0}) is None
    assert folder("m", {}) is None


def test_an_object_that_is_also_a_folder_is_an_error() -> None:
    with pytest.raises(LoadFailed, match="'a' is an object and a folder"):
        folder("m", {"m/a": 1, "m/a/b": 1})


@pytest.mark.parametrize("name", ["../evil", "/abs", "a\\b", "a/../../evil", "a\0b", "x" * 300])
def test_an_unsafe_object_name_refuses_the_artifact(name: str) -> None:
    with pytest.raises(LoadFailed, match="unsafe"):
        folder("m", {f"m/{name}": 1, "m/good": 1})
    with pytest.raises(LoadFailed, match="unsafe"):
        folder("", {name: 1})


def test_an_object_outside_the_prefix_is_refused() -> None:
    with pytest.raises(LoadFailed, match="does not lie there"):
        folder("m", {"mx/a": 1})


def test_the_version_changes_with_every_object() -> None:
    versions = {
        Manifest.version.fget(manifest)  # type: ignore[attr-defined]
        for manifest in (
            folder("m", {"m/a": 1}),
            folder("m", {"m/b": 1}),
            folder("m", {"m/a": 2}),
            folder("m", {"m/a": 1, "m/b": 1}),
            folder_manifest("m", [RemoteObject("m/a", 1, '"other"')], "s3://b/m"),
        )
    }
    assert len(versions) == 5


def test_a_single_object_keeps_its_name() -> None:
    manifest = single_manifest(RemoteObject("dir/model.onnx", 7, None), "s3://b/dir/model.onnx")
    assert manifest.single
    assert manifest.files[0].path == "model.onnx"


def test_bounds() -> None:
    manifest = folder("m", {"m/a": 10})
    assert manifest is not None
    check_bounds(manifest, "s3://b/m", max_bytes=10)
    with pytest.raises(LoadFailed, match="10 bytes, more than the 9"):
        check_bounds(manifest, "s3://b/m", max_bytes=9)


@given(st.integers(0, 10_000), st.integers(1, 1_000))
def test_parts_cover_an_object_once(size_bytes: int, part_bytes: int) -> None:
    parts = plan_parts(size_bytes, part_bytes)
    at = 0
    for start, end in parts:
        assert start == at
        assert 0 < end - start <= part_bytes
        at = end
    assert at == size_bytes
    if parts:
        lengths = [end - start for start, end in parts]
        assert max(lengths) - min(lengths) <= 1


@pytest.mark.parametrize(
    ("etag", "expected"),
    [
        ('"D41D8CD98F00B204E9800998ECF8427E"', "d41d8cd98f00b204e9800998ecf8427e"),
        ("d41d8cd98f00b204e9800998ecf8427e", "d41d8cd98f00b204e9800998ecf8427e"),
        ('"d41d8cd98f00b204e9800998ecf8427e-3"', None),
        ('W/"d41d8cd98f00b204e9800998ecf8427e"', None),
        (None, None),
        ("", None),
    ],
)
def test_which_etags_are_an_md5(etag: str | None, expected: str | None) -> None:
    assert md5_of(RemoteObject("k", 1, etag)) == expected


def test_checksum_files() -> None:
    a, b = "A" * 64, "b" * 64
    assert parse_sha256sums(f"{a}  ./x/y.bin\n\n{b} *z\n", "u") == {"x/y.bin": "a" * 64, "z": b}
    with pytest.raises(LoadFailed, match="line 1"):
        parse_sha256sums("zzz  x", "u")
    with pytest.raises(LoadFailed, match="unsafe"):
        parse_sha256sums(f"{b}  ../x", "u")
