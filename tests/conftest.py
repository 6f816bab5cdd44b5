"""The same examples in each run: a test that fails, fails for whoever looks at it next.

`HYPOTHESIS_PROFILE=explore make test` draws new ones. No example has to be quick: the machine may
be busy.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

from tests.kube_server import KubeNotFound, KubeServer

ANY_SPEED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("same", ANY_SPEED, derandomize=True)
settings.register_profile("explore", ANY_SPEED, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))


@pytest.fixture(scope="session")
def kube() -> Iterator[KubeServer]:
    """One real API server with the project's CRDs for all tests: each makes its own namespace, and
    one that stops it, pauses it or wants other flags starts a ``KubeServer`` of its own."""
    try:
        server = KubeServer()
    except KubeNotFound as error:
        pytest.skip(str(error))
    with server:
        server.install_crds()
        yield server
