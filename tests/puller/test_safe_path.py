from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from puller.safe_path import UnsafePathError, resolve_below, safe_relative_path


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("", "empty"),
        ("/etc/passwd", "absolute"),
        ("//host/share", "absolute"),
        ("..", "'..'"),
        ("../evil", "'..'"),
        ("a/../../evil", "'..'"),
        ("a/..", "'..'"),
        ("./a", "'.'"),
        ("a/./b", "'.'"),
        ("a//b", "empty segment"),
        ("a/", "empty segment"),
        ("a\\..\\b", "backslash"),
        ("C:\\windows", "backslash"),
        ("a\0b", "control"),
        ("a\nb", "control"),
        ("a\x7fb", "control"),
        ("a\ud800b", "Unicode"),
        ("x" * 256, "255 bytes"),
        ("ü" * 128, "255 bytes"),
        ("/".join(["abcdefgh"] * 300), "2048 bytes"),
        ("/".join("a" * 65), "64 folders"),
    ],
)
def test_unsafe_names_are_refused(name: str, says: str) -> None:
    with pytest.raises(UnsafePathError, match=says):
        safe_relative_path(name)


@pytest.mark.parametrize(
    "name", ["a", "a/b.onnx", "..a/b..", "...", "a b/ü%2e%2e", "x" * 255, ".hidden", "C:x", "~"]
)
def test_odd_but_harmless_names_stay_as_they_are(name: str) -> None:
    assert str(safe_relative_path(name)) == name


@given(st.text(alphabet=st.sampled_from("ab./\\\0~:é"), max_size=30))
def test_what_is_accepted_never_leaves_its_root(name: str) -> None:
    try:
        path = safe_relative_path(name)
    except UnsafePathError:
        return
    root = Path("/srv/root")
    normal = os.path.normpath(os.path.join(root, path))  # noqa: PTH118 - text, as an attacker's
    assert normal == f"{root}/{name}"


def test_a_link_out_is_refused_and_a_link_inside_followed(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    (root / "real").mkdir(parents=True)
    outside.mkdir()
    (root / "out").symlink_to(outside)
    (root / "in").symlink_to("real")
    assert resolve_below(root, root / "in") == (root / "real").resolve()
    with pytest.raises(UnsafePathError, match="leads out"):
        resolve_below(root, root / "out")


def test_a_sibling_with_the_same_beginning_is_outside(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "root2").mkdir()
    with pytest.raises(UnsafePathError):
        resolve_below(tmp_path / "root", tmp_path / "root2")


def test_a_root_behind_a_link_is_a_root(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real/model").touch()
    (tmp_path / "root").symlink_to("real")
    found = resolve_below(tmp_path / "root", tmp_path / "root/model")
    assert found == (tmp_path / "real/model").resolve()


def test_a_loop_of_links_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises((UnsafePathError, OSError)):
        resolve_below(tmp_path, tmp_path / "a")
