"""How many threads one call into a numeric library may use: OpenBLAS, MKL, OpenMP.

A worker inherits one of each from its fork server, which must not start any. Where the operator or
the model's own file says more, it is set when the model is there, and with it its libraries, in
each thread that runs it: OpenMP keeps the number a thread. Needs threadpoolctl, which scikit-learn
brings along; without it the number stays one. Safe for concurrent use.
"""

from __future__ import annotations

import logging
import threading
from typing import Any

log = logging.getLogger(__name__)


class LibraryThreads:
    """``limited`` are the threads (``get_ident``) for which the number is set."""

    __slots__ = ("_controller", "_count", "_lock", "limited")

    def __init__(self, count: int) -> None:
        self._count = count
        self._controller: Any = None
        self._lock = threading.Lock()
        self.limited: set[int] = set()

    def limit(self, thread: int) -> None:
        """In that thread. Takes milliseconds the first time."""
        with self._lock:
            self.limited.add(thread)
            if self._count == 1:
                return
            if self._controller is None:
                self._controller = _controller()
            if self._controller is not None:
                self._controller.limit(limits=self._count)


def _controller() -> Any:
    try:
        import threadpoolctl  # type: ignore[import-untyped]
    except ImportError:
        log.warning("libraries use one thread each: threadpoolctl is not installed")
        return None
    return threadpoolctl.ThreadpoolController()
