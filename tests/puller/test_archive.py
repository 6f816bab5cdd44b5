"""Archives from outside: what comes out of good ones, and that nothing does of bad ones."""

from __future__ import annotations

import gzip
import io
import stat
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from mesh.core.errors import Code, LoadFailed
from puller.archive import Bounds, unpack
from puller.disk import RealDisk
from tests.puller.conftest import OpenPuller, entries, leftovers, request
from tests.puller.fakes import FakeStore, content

BOUNDS = Bounds(max_bytes=1 << 20, max_files=20, max_ratio=10)
MIB = 1 << 20


def zipped(*members: tuple[str, bytes], packed: int = zipfile.ZIP_DEFLATED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", packed) as archive:
        for name, data in members:
            archive.writestr(name, data)
    return out.getvalue()


def tarred(*members: tuple[str, bytes] | tarfile.TarInfo, mode: str = "w") -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as archive:  # type: ignore[call-overload]
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                archive.addfile(member)
                continue
            info = tarfile.TarInfo(member[0])
            info.size = len(member[1])
            archive.addfile(info, io.BytesIO(member[1]))
    return out.getvalue()


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def unpacked(directory: Path, name: str, data: bytes, bounds: Bounds = BOUNDS) -> dict[str, int]:
    (directory / name).write_bytes(data)
    return unpack(
        directory / name,
        directory / "content",
        f"s3://b/{name}",
        bounds=bounds,
        disk=RealDisk(),
        cover=lambda total_bytes: None,
    )


FILES = (("model.onnx", b"model"), ("sub/labels.txt", b"labels"))


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("a.zip", lambda: zipped(*FILES)),
        ("A.ZIP", lambda: zipped(*FILES)),
        ("a.tar", lambda: tarred(*FILES)),
        ("a.tar.gz", lambda: tarred(*FILES, mode="w:gz")),
        ("a.tgz", lambda: tarred(("./model.onnx", b"model"), FILES[1], mode="w:gz")),
    ],
)
def test_every_kind_gives_its_files(tmp_path: Path, name: str, make: Callable[[], bytes]) -> None:
    assert unpacked(tmp_path, name, make()) == {"model.onnx": 5, "sub/labels.txt": 6}
    assert (tmp_path / "content/sub/labels.txt").read_bytes() == b"labels"


def test_one_folder_alone_at_the_top_is_taken_off(tmp_path: Path) -> None:
    data = tarred(special("m", tarfile.DIRTYPE), ("m/1/model.onnx", b"model"))
    assert unpacked(tmp_path, "a.tar", data) == {"1/model.onnx": 5}
    assert (tmp_path / "content/1/model.onnx").is_file()


def test_a_version_alone_at_the_top_stays(tmp_path: Path) -> None:
    assert unpacked(tmp_path, "a.zip", zipped(("3/model.onnx", b"x"))) == {"3/model.onnx": 1}


def symlink_in_zip() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        info = zipfile.ZipInfo("link")
        info.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(info, "/etc/passwd")
    return out.getvalue()


def large_header() -> bytes:
    info = tarfile.TarInfo("m")
    info.pax_headers = {"comment": "x" * (2 * MIB)}
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
        archive.addfile(info)
    return out.getvalue()


@pytest.mark.parametrize(
    ("name", "make", "says"),
    [
        ("a.zip", lambda: zipped(("../../evil", b"x")), "'..'"),
        ("a.zip", lambda: zipped(("/etc/evil", b"x")), "absolute"),
        ("a.tar", lambda: tarred(("m/../../evil", b"x")), "'..'"),
        ("a.tar", lambda: tarred(("/etc/evil", b"x")), "absolute"),
        ("a.zip", symlink_in_zip, "link or a device"),
        ("a.tar", lambda: tarred(special("l", tarfile.SYMTYPE, "/etc/passwd")), "is a link"),
        ("a.tar", lambda: tarred(special("l", tarfile.LNKTYPE, "../x")), "is a link"),
        ("a.tar", lambda: tarred(special("d", tarfile.CHRTYPE)), "a device"),
        ("a.tar", lambda: tarred(("m", b"1"), ("m", b"2")), "more than once"),
        ("a.tar", lambda: tarred(("m", b"1"), ("m/x", b"2")), "more than once"),
        ("a.tar", large_header, "larger than any name"),
        ("a.zip", lambda: zipped(*((str(i), b"") for i in range(21))), "more than 20 files"),
        ("a.zip", lambda: zipped(("m", bytes(MIB + 1))), "more than the 1048576 bytes"),
        ("a.tgz", lambda: tarred(("m", bytes(MIB + 1)), mode="w:gz"), "more than the 1048576"),
        ("a.zip", lambda: zipped(), "no file in it"),
        ("a.zip", lambda: zipped(("m", content(9_000)))[:-100], "cut off"),
        ("a.tar", lambda: tarred(("m", content(9_000)))[:5_000], "cut off|ends within"),
        ("a.tar", lambda: tarred(("m", b"1"), ("n", b"2"))[:1024], "cut off"),
        ("a.tgz", lambda: tarred(("m", content(9_000)), mode="w:gz")[:-9], "cut off"),
        ("a.tgz", lambda: b"not gzip at all", "no gzip file"),
        ("a.tar", lambda: content(2_000), "not what its name says"),
    ],
)
def test_bad_archives_are_refused(
    tmp_path: Path, name: str, make: Callable[[], bytes], says: str
) -> None:
    (tmp_path / "in").mkdir()
    with pytest.raises(LoadFailed, match=says) as caught:
        unpacked(tmp_path / "in", name, make())
    assert caught.value.code is Code.FAILED_PRECONDITION
    assert f"s3://b/{name}" in caught.value.message
    assert [path.name for path in tmp_path.iterdir()] == ["in"]  # nothing came out beside it


def test_a_bomb_is_refused_by_its_ratio(tmp_path: Path) -> None:
    bounds = Bounds(max_bytes=1 << 40, max_files=20, max_ratio=10)
    data = gzip.compress(tarred(("m", bytes(65 * MIB))), compresslevel=1)
    with pytest.raises(LoadFailed, match="more than 10 times its size"):
        unpacked(tmp_path, "a.tgz", data, bounds)


async def test_a_remote_archive_becomes_a_folder_in_the_cache(
    open_puller: OpenPuller, cache_dir: Path
) -> None:
    data = zipped(("model.bin", bytes(300_000)), ("labels", b"abc"))
    store = FakeStore({"m.zip": data})
    puller = open_puller(store)
    artifact = await puller.fetch(request("s3://bucket/m.zip"))
    assert (artifact.path / "labels").read_bytes() == b"abc"
    assert artifact.size_bytes == 300_003  # of what came out: far more than the archive has
    assert [entry.rpartition("-")[2] for entry in entries(cache_dir)] == ["300003"]
    assert leftovers(cache_dir) == []
    reads = len(store.reads)
    assert (await puller.fetch(request("s3://bucket/m.zip"))).cached
    assert len(store.reads) == reads


async def test_an_archive_that_unpacks_to_more_than_the_cache_holds(
    open_puller: OpenPuller, cache_dir: Path
) -> None:
    store = FakeStore({"m.zip": zipped(("m", bytes(300_000)))})
    with pytest.raises(LoadFailed, match="more than the whole artifact cache"):
        await open_puller(store, cache_capacity_bytes=200_000).fetch(request("s3://bucket/m.zip"))
    assert leftovers(cache_dir) == entries(cache_dir) == []


async def test_a_truncated_archive_is_refused_and_not_kept(
    open_puller: OpenPuller, cache_dir: Path
) -> None:
    store = FakeStore({"m.tgz": tarred(("m", content(9_000)), mode="w:gz")[:-500]})
    with pytest.raises(LoadFailed, match="cut off") as caught:
        await open_puller(store).fetch(request("s3://bucket/m.tgz"))
    assert caught.value.code is Code.FAILED_PRECONDITION
    assert leftovers(cache_dir) == entries(cache_dir) == []
    assert list((cache_dir / "partial").iterdir()) == []


async def test_an_archive_on_this_machine_is_unpacked_into_the_cache(
    open_puller: OpenPuller, tmp_path: Path, cache_dir: Path
) -> None:
    folder = tmp_path / "models"
    folder.mkdir()
    (folder / "m.zip").write_bytes(zipped(*FILES))
    puller = open_puller(file_roots=(folder,))
    artifact = await puller.fetch(request(f"file://{folder}/m.zip"))
    assert (artifact.path / "model.onnx").read_bytes() == b"model"
    assert artifact.path.is_relative_to(cache_dir)
    (folder / "m.zip").write_bytes(zipped(("model.onnx", b"changed")))
    again = await puller.fetch(request(f"file://{folder}/m.zip"))
    assert (again.path / "model.onnx").read_bytes() == b"changed"
