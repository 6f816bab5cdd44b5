"""Which of a runtime's words mean that it does not have the model any more.

As Triton 2.51 and MLServer 1.7 were seen to say it, and as ModelMesh's adapters expect it of older
ones.
"""

from __future__ import annotations

import pytest

from mesh.core.errors import Code
from mesh.runtimes.external_model import is_lost
from mesh.wire.client import RpcError

UNKNOWN = "Request for unknown model: 'm' "


@pytest.mark.parametrize(
    ("code", "text", "lost"),
    [
        (Code.NOT_FOUND, "model 'm' is not loaded", True),
        (Code.NOT_FOUND, UNKNOWN + "is not found", True),
        (Code.NOT_FOUND, UNKNOWN + "has no available versions", True),
        (Code.NOT_FOUND, UNKNOWN + "version 9 is not found", False),
        (Code.UNAVAILABLE, UNKNOWN + "is not found", True),
        (Code.UNAVAILABLE, UNKNOWN + "has no available versions", True),
        (Code.UNAVAILABLE, UNKNOWN + "version 1 is not at ready state", True),
        (Code.UNAVAILABLE, UNKNOWN + "version 9 is not found", False),
        (Code.UNAVAILABLE, "the queue is full", False),
        (Code.NOT_FOUND, "Model m not found", True),
        (Code.NOT_FOUND, "Model m with version 9 not found", False),
        (Code.INVALID_ARGUMENT, "Model m not found", True),
        (Code.INVALID_ARGUMENT, "Model m with version 9 not found", False),
        (Code.INVALID_ARGUMENT, "Model m not found in the text of a request", False),
        (Code.INVALID_ARGUMENT, UNKNOWN + "is not found", False),
        (Code.INTERNAL, "Model m not found", False),
    ],
)
def test_what_is_a_lost_model(code: Code, text: str, lost: bool) -> None:
    assert is_lost(RpcError(code, text)) is lost
