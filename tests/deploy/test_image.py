"""The Dockerfile, whose steps no engine can run here: what it names is there, and what it runs
installs a whole program."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import yaml

from mesh.reconciler.workload_pod import USER
from tests.deploy.manifests import DEPLOY

PROJECT = DEPLOY.parent
DOCKERFILE = (DEPLOY / "Dockerfile").read_text().replace("\\\n", " ")
INSTRUCTIONS = [
    tuple(line.split(None, 1)) for line in DOCKERFILE.splitlines() if re.match(r"[A-Z]+ ", line)
]
SHIPPED = ("mesh", "router", "puller", "protos")


def arguments(name: str) -> list[str]:
    return [rest for word, rest in INSTRUCTIONS if word == name]


def test_what_is_copied_is_there_and_not_ignored() -> None:
    allowed = {
        line[1:] for line in (PROJECT / ".dockerignore").read_text().splitlines() if line[:1] == "!"
    }
    copied = [
        source
        for rest in arguments("COPY")
        if not rest.startswith("--from")
        for source in rest.split()[:-1]
    ]
    assert {"pyproject.toml", *SHIPPED} <= set(copied)
    for source in copied:
        assert (PROJECT / source).exists(), source
        assert source.partition("/")[0] in allowed, source


def test_bases_are_pinned_and_the_same() -> None:
    bases = {rest.partition(" AS ")[0] for rest in arguments("FROM")}
    assert len(bases) == 1  # the environment's interpreter is at the same path in both
    assert re.fullmatch(r"python:3\.\d+\.\d+-slim-[a-z]+", bases.pop())


def test_it_runs_as_the_pods_user() -> None:
    assert arguments("USER") == [f"{USER}:{USER}"]
    assert arguments("ENTRYPOINT") == ['["mesh"]']


def test_extras_are_the_projects() -> None:
    (extras,) = [a for a in arguments("ARG") if a.startswith("EXTRAS=")]
    with (PROJECT / "pyproject.toml").open("rb") as file:
        import tomllib

        known = tomllib.load(file)["project"]["optional-dependencies"]
    assert set(extras.partition("=")[2].split(",")) <= known.keys()
    assert "controller" in extras


def test_the_default_image_serves_the_default_runtime() -> None:
    (resource,) = yaml.safe_load_all((DEPLOY / "runtimes" / "mesh-1.x.yaml").read_text())
    formats = {one["name"] for one in resource["spec"]["supportedModelFormats"]}
    built = " ".join(arguments("ARG"))
    assert all(name == "onnx" or name in built for name in formats)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the image's first stage makes of what is copied into it, but for other packages."""
    folder = tmp_path_factory.mktemp("image")
    source = folder / "src"
    for rest in arguments("COPY"):
        if rest.startswith("--from"):
            continue
        for name in rest.split()[:-1]:
            target = source / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if (PROJECT / name).is_dir():
                shutil.copytree(
                    PROJECT / name, target, ignore=shutil.ignore_patterns("__pycache__")
                )
            else:
                shutil.copy(PROJECT / name, target)
    # The build's only need, by itself: of this environment nothing else may be seen.
    site = Path(sysconfig.get_path("purelib"))
    for path in (site / "setuptools", site / "_distutils_hack", *site.glob("setuptools-*")):
        shutil.copytree(path, folder / "tools" / path.name)
    env = {
        **os.environ,
        "PYTHON": sys.executable,
        "PIP_FLAGS": "--no-deps --no-build-isolation --no-index --no-compile",
        "PYTHONPATH": str(folder / "tools"),
    }
    (command,) = [rest for rest in arguments("RUN") if "install.sh" in rest]
    script = source / command.split()[0]
    ran = subprocess.run(
        [script, folder / "mesh", "controller"],
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr
    return folder / "mesh"


def test_every_module_is_shipped(installed: Path) -> None:
    (site,) = installed.glob("lib/python3*/site-packages")
    for package in SHIPPED:
        for path in (PROJECT / package).rglob("*"):
            if path.suffix in (".py", ".pyi", ".proto") or path.name == "py.typed":
                name = path.relative_to(PROJECT)
                assert (site / name).is_file() or "__pycache__" in name.parts, name


def test_the_program_runs_from_it(installed: Path) -> None:
    env = {**os.environ, "PYTHONPATH": sysconfig.get_path("purelib")}
    ran = subprocess.run(
        [installed / "bin" / "mesh", "controller", "--help"],
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
        cwd="/",
    )
    assert ran.returncode == 0, ran.stderr
    assert "--leader-elect" in ran.stdout


def test_the_installer_leaves_no_installer(installed: Path) -> None:
    assert not list(installed.glob("lib/python3*/site-packages/pip"))
