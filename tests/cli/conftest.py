"""The command, run in this process against a scripted router."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from typer.testing import CliRunner, Result

from mesh.cli.main import app
from tests.cli.fake_router import FakeRouter

Mesh = Callable[..., Result]


@pytest.fixture
def router() -> Iterator[FakeRouter]:
    fake = FakeRouter()
    fake.start()
    yield fake
    fake.stop()


@pytest.fixture
def mesh(router: FakeRouter) -> Mesh:
    """``mesh("get", "models")``: a command line against the fake router."""

    def run(*args: str, stdin: str | None = None) -> Result:
        return CliRunner().invoke(app, ["--address", router.address, *args], input=stdin)

    return run
