"""Whether this router serves: live, ready, draining; and who wants to know when that changes.

Ready means that the view of the mesh has come once and that the router is not on its way out. It
says nothing of instances: a model that cannot be loaded is that model's error.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import asdict, dataclass


@dataclass(frozen=True, slots=True)
class State:
    """The document behind ``/readyz``; each field is a reason of its own."""

    ready: bool
    synced: bool
    draining: bool
    store_connected: bool
    instances: int
    models: int
    leader: str  # id of the elected leader as far as is known here, "" for nobody
    view_revision: int

    def document(self) -> dict[str, object]:
        return asdict(self)


class Readiness:
    """``synced`` and ``draining`` are set by the composition root, once each."""

    def __init__(self) -> None:
        self.synced = False
        self.draining = False
        self._changed: set[Callable[[], None]] = set()

    @property
    def ready(self) -> bool:
        return self.synced and not self.draining

    def set_synced(self) -> None:
        self.synced = True
        self._tell()

    def set_draining(self) -> None:
        self.draining = True
        self._tell()

    async def wait_changed(self) -> None:
        """Return at the next change. Look at ``ready`` and call it in one turn of the loop."""
        changed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def tell() -> None:
            if not changed.done():
                changed.set_result(None)

        self._changed.add(tell)
        try:
            await changed
        finally:
            self._changed.discard(tell)

    def _tell(self) -> None:
        for tell in tuple(self._changed):
            tell()
