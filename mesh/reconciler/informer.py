"""Keeps all objects of one resource here, as the API server has them: list once, then watch.

``run`` never gives up: a watch that ends or breaks resumes where it was, without listing again; a
version that the server no longer has (Expired) means a fresh list, which tells what came, changed
and went meanwhile. While the server is away, or says no, the store stays as it was, ``error`` says
why, and it is tried again after a backoff. Callbacks tell keys, never contents: level-triggered.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from mesh.reconciler.kube import ApiError, Key, Kube, Obj, Resource


class OnChange(Protocol):
    """Called after the store has changed: that object came, changed or went. Must not block."""

    def __call__(self, resource: Resource, namespace: str, name: str, /) -> None: ...


class Informer:
    """Run ``run()`` as a task. ``store`` is for reading only, its objects too (share, don't edit).

    ``keep`` reduces each object before it is kept; ``metadata.managedFields`` go in any case.
    """

    def __init__(
        self,
        kube: Kube,
        resource: Resource,
        namespace: str | None = None,
        *,
        on_change: OnChange | None = None,
        label_selector: str = "",
        field_selector: str = "",
        keep: Callable[[Obj], Obj] | None = None,
    ) -> None:
        self.store: dict[Key, Obj] = {}
        self.error: ApiError | None = None  # why it is behind, until it no longer is
        self.lists_total = 0
        self.watches_total = 0

    @property
    def synced(self) -> bool:
        """The store has been complete once; what is missing in it does not exist."""
        raise NotImplementedError

    async def wait_synced(self) -> None:
        raise NotImplementedError

    def get(self, namespace: str, name: str) -> Obj | None:
        return self.store.get((namespace, name))

    async def run(self) -> None:
        """Until cancelled."""
        raise NotImplementedError
