"""One real API server with the project's CRDs for the session, and a namespace for each test.

It is the same server for all: a test that stops it, pauses it or wants other flags starts a
``KubeServer`` of its own.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.kube_server import KubeNotFound, KubeServer


@pytest.fixture(scope="session")
def kube() -> Iterator[KubeServer]:
    try:
        server = KubeServer()
    except KubeNotFound as error:
        pytest.skip(str(error))
    with server:
        server.install_crds()
        yield server


@pytest.fixture
def namespace(kube: KubeServer) -> str:
    return kube.create_namespace()
