"""What the API server may answer instead of an object.

Each error names the verb, the resource, the namespace and the object, so that one line of a log
says what was refused; ``reason`` and ``causes`` are the API server's own words.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Final

from mesh.reconciler.kube_resources import Resource


@dataclass(frozen=True, slots=True)
class Request:
    """What was asked, for counters and for messages."""

    verb: str  # get list watch create update patch delete, as RBAC names them
    resource: Resource
    namespace: str | None = None
    name: str = ""
    subresource: str = ""

    def __str__(self) -> str:
        what = str(self.resource) + (f"/{self.subresource}" if self.subresource else "")
        name = f" {self.name}" if self.name else ""
        if not self.resource.namespaced:
            return f"{self.verb} {what}{name}"
        where = f"namespace {self.namespace}" if self.namespace else "all namespaces"
        return f"{self.verb} {what}{name} in {where}"


@dataclass(frozen=True, slots=True)
class Cause:
    """One thing that is wrong with an object: the path of the field, and what is wrong with it."""

    field: str
    message: str


class ApiError(Exception):
    """The API server refused. ``status`` is the HTTP status, ``reason`` Kubernetes' own
    (``NotFound``, ``Conflict``, ``Forbidden``, ...)."""

    def __init__(
        self,
        request: Request,
        message: str,
        *,
        status: int = 0,
        reason: str = "",
        causes: tuple[Cause, ...] = (),
    ) -> None:
        said = f" ({status} {reason})" if status else ""
        super().__init__(f"cannot {request}{said}: {message}")
        self.request = request
        self.message = message
        self.status = status
        self.reason = reason
        self.causes = causes


class ApiAway(ApiError):
    """Not reached, out of time, overloaded (429) or failing (5xx): the same call may work later.

    What was written may or may not have been: read before you lean on either. ``retry_after_s``
    is what the server asked for (0 where it asked for nothing).
    """

    def __init__(
        self,
        request: Request,
        message: str,
        *,
        status: int = 0,
        reason: str = "",
        retry_after_s: float = 0.0,
    ) -> None:
        super().__init__(request, message, status=status, reason=reason)
        self.retry_after_s = retry_after_s


class ApiNotFound(ApiError):
    """404: no such object, or no such resource (its CRD is missing)."""


class ApiExists(ApiError):
    """409 on create: the name is taken."""


class ApiConflict(ApiError):
    """409: the object is not at that resourceVersion or uid any more, or a field is owned."""


class ApiForbidden(ApiError):
    """403: RBAC, a quota or an admission plugin says no."""


class ApiExpired(ApiError):
    """410: that resourceVersion or page is gone: list again."""


class ApiInvalid(ApiError):
    """422 or 400: the object is wrong; ``causes`` name the fields."""


_BY_STATUS: Final[dict[int, type[ApiError]]] = {
    400: ApiInvalid,
    403: ApiForbidden,
    404: ApiNotFound,
    409: ApiConflict,
    410: ApiExpired,
    422: ApiInvalid,
}
# What an error page of a proxy before the API server may add to a log line, in characters.
_MESSAGE_LIMIT: Final = 2_000
_SECONDS: Final = re.compile(r"\d{1,6}(\.\d+)?")


def error_of(
    request: Request, status: int, body: Any, *, retry_after: str | None = None
) -> ApiError:
    """The error for an answer. ``body`` is a parsed ``Status``, or text where it was none.

    ``retry_after`` is the header; the body's ``details.retryAfterSeconds`` stands in for it.
    """
    said: dict[str, Any] = body if isinstance(body, dict) else {}
    message = str(said.get("message") or (body if isinstance(body, str) else "") or "no message")
    message = message[:_MESSAGE_LIMIT]
    reason = str(said.get("reason") or "")
    details = said.get("details") or {}
    if status == 429 or status >= 500:
        wait = retry_after or str(details.get("retryAfterSeconds") or "")
        retry_after_s = float(wait) if _SECONDS.fullmatch(wait) else 0.0
        return ApiAway(request, message, status=status, reason=reason, retry_after_s=retry_after_s)
    causes = tuple(
        Cause(str(cause.get("field") or ""), str(cause.get("message") or ""))
        for cause in details.get("causes") or ()
    )
    kind = _BY_STATUS.get(status, ApiError)
    if reason == "AlreadyExists":
        kind = ApiExists
    elif reason in ("Expired", "Gone"):
        kind = ApiExpired
    return kind(request, message, status=status, reason=reason, causes=causes)
