"""Records events (core/v1 Event) on objects, for ``kubectl describe``. Best effort, bounded."""

from __future__ import annotations

from typing import Literal

from mesh.reconciler.kube import Kube, Obj


class EventRecorder:
    """Run ``run()`` as a task. ``emit`` may be called before that, and never fails or blocks."""

    def __init__(self, kube: Kube, *, component: str, instance: str) -> None:
        raise NotImplementedError

    def emit(
        self, about: Obj, kind: Literal["Normal", "Warning"], reason: str, message: str
    ) -> None:
        """``about`` is the whole object or anything with apiVersion, kind and metadata
        (namespace, name, uid, resourceVersion)."""
        raise NotImplementedError

    async def run(self) -> None:
        """Writes until cancelled."""
        raise NotImplementedError
