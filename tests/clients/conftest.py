"""The mesh that foreign clients speak to: one of its own, at its defaults."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from mesh.samples import make_samples
from tests.up.live import LiveMesh


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveMesh]:
    models = tmp_path_factory.mktemp("samples")
    make_samples(models, 5)  # iris-0001 is the fifth
    live = LiveMesh(tmp_path_factory.mktemp("clients") / "data", "--models", str(models))
    try:
        yield live.ready()
        assert live.stop() == 0, live.err
    finally:
        live.stop()
