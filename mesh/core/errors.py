"""The one error hierarchy of the mesh.

Every error that can reach a client is a ``MeshError`` with a ``Code``; ``router`` and ``instance``
map a code to a gRPC status and to an HTTP status through the two tables below, and nowhere else.
A retryable error says so, and may carry a hint when to come back: nothing transient is INTERNAL.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Final


class Code(IntEnum):
    """gRPC status codes; the numbers are those of the gRPC specification."""

    OK = 0
    CANCELLED = 1
    UNKNOWN = 2
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    ALREADY_EXISTS = 6
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    ABORTED = 10
    OUT_OF_RANGE = 11
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14
    DATA_LOSS = 15
    UNAUTHENTICATED = 16


HTTP_STATUS: Final[dict[Code, int]] = {
    Code.OK: 200,
    Code.CANCELLED: 499,
    Code.UNKNOWN: 500,
    Code.INVALID_ARGUMENT: 400,
    Code.DEADLINE_EXCEEDED: 504,
    Code.NOT_FOUND: 404,
    Code.ALREADY_EXISTS: 409,
    Code.PERMISSION_DENIED: 403,
    Code.RESOURCE_EXHAUSTED: 429,
    Code.FAILED_PRECONDITION: 412,
    Code.ABORTED: 409,
    Code.OUT_OF_RANGE: 400,
    Code.UNIMPLEMENTED: 501,
    Code.INTERNAL: 500,
    Code.UNAVAILABLE: 503,
    Code.DATA_LOSS: 500,
    Code.UNAUTHENTICATED: 401,
}

RETRYABLE: Final[frozenset[Code]] = frozenset(
    {Code.UNAVAILABLE, Code.RESOURCE_EXHAUSTED, Code.ABORTED}
)


class MeshError(Exception):
    """An error with a gRPC code, a message for a person, and an optional retry hint.

    ``message`` says what is wrong, where, and what to do. ``retry_after_ms`` is only meaningful
    for a retryable code; it travels as the ``grpc-retry-pushback-ms`` trailer and as HTTP
    ``Retry-After``.
    """

    code: Code = Code.INTERNAL

    def __init__(
        self, message: str, *, code: Code | None = None, retry_after_ms: int | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        if code is not None:
            self.code = code
        self.retry_after_ms = retry_after_ms

    @property
    def retryable(self) -> bool:
        return self.code in RETRYABLE


class InvalidArgument(MeshError):
    """The request is wrong and will stay wrong."""

    code = Code.INVALID_ARGUMENT


class NotFound(MeshError):
    """No such model, alias, version or method parameter."""

    code = Code.NOT_FOUND


class AlreadyExists(MeshError):
    """The name is taken by something different."""

    code = Code.ALREADY_EXISTS


class FailedPrecondition(MeshError):
    """The system is in a state in which this cannot work, and a retry alone will not mend it."""

    code = Code.FAILED_PRECONDITION


class Unavailable(MeshError):
    """Transient: the same request may well succeed later or elsewhere."""

    code = Code.UNAVAILABLE


class ResourceExhausted(MeshError):
    """A limit (message size, queue, memory) was hit."""

    code = Code.RESOURCE_EXHAUSTED


class DeadlineExceeded(MeshError):
    """The caller's time is used up."""

    code = Code.DEADLINE_EXCEEDED


class Unimplemented(MeshError):
    """This server does not do that."""

    code = Code.UNIMPLEMENTED


class Internal(MeshError):
    """A defect of ours or of a runtime."""

    code = Code.INTERNAL


class LoadFailed(MeshError):
    """A model could not be loaded.

    ``code`` is FAILED_PRECONDITION when the artifact or its description is at fault (corrupt,
    missing, wrong format, refused format), UNAVAILABLE when the world is (store unreachable,
    disk full, time-out).
    """

    code = Code.FAILED_PRECONDITION
