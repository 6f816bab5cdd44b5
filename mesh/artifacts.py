"""The port between the serving pod and whatever fetches artifacts (``puller``).

The pod knows only this protocol; its composition root wires the puller in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True, slots=True)
class ArtifactRequest:
    """``path`` and ``key`` are those of the ModelRecord (see ``mesh.core.types``)."""

    model_id: str
    path: str
    key: str
    model_type: str


@dataclass(frozen=True, slots=True)
class Artifact:
    """An artifact on this machine's disk. ``path`` (file or folder) stays valid and unchanged
    until it is released."""

    path: Path
    size_bytes: int
    source: str  # for a person: the URI that it came from
    cached: bool  # it was there already


class ArtifactSource(Protocol):
    async def fetch(
        self, request: ArtifactRequest, progress: Callable[[int, int | None], None] | None = None
    ) -> Artifact:
        """Bring the artifact to the disk (single flight, cached) and hold it there.

        ``progress(done_bytes, total_bytes)``. Raises ``LoadFailed``: FAILED_PRECONDITION for what
        is wrong with the request or the artifact, UNAVAILABLE for what may heal.
        """
        ...

    def release(self, artifact: Artifact) -> None:
        """The artifact may be evicted from the disk cache from now on."""
        ...

    async def close(self) -> None: ...
