"""Which runtime executes which model format.

Owns the list of formats and of the extra that brings each framework. A runtime is made when its
first model comes, so a framework that nobody uses is never imported. An unknown format or a
missing framework is a ``LoadFailed`` that says what to install. Safe for concurrent use.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Final

from mesh.core.errors import LoadFailed
from mesh.runtimes.api import Runtime
from mesh.runtimes.native_memory import NativeHeap


@dataclass(frozen=True, slots=True)
class RuntimeSettings:
    """``allow_pickle``: joblib and pickle files run code when loaded; only the operator may say
    that they may (``--allow-pickle``, ``MESH_ALLOW_PICKLE``). ``trusted_types``: types that a
    skops file may hold beside those that skops trusts itself."""

    intra_op_threads: int = 1
    allow_pickle: bool = False
    trusted_types: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class RuntimeSource:
    """How to make a runtime. ``extra`` of this package brings the ``modules`` that it imports."""

    make: Callable[[RuntimeSettings, NativeHeap], Runtime]
    modules: tuple[str, ...]
    extra: str | None = None


def _onnx(settings: RuntimeSettings, heap: NativeHeap) -> Runtime:
    from mesh.runtimes.onnx import OnnxRuntime, OnnxSettings

    return OnnxRuntime(OnnxSettings(intra_op_threads=settings.intra_op_threads), heap)


def _sklearn(settings: RuntimeSettings, heap: NativeHeap) -> Runtime:
    from mesh.runtimes.sklearn import SklearnRuntime

    return SklearnRuntime(
        allow_pickle=settings.allow_pickle, trusted_types=settings.trusted_types, heap=heap
    )


SOURCES: Final[Mapping[str, RuntimeSource]] = {
    "onnx": RuntimeSource(_onnx, ("onnxruntime",)),
    "sklearn": RuntimeSource(_sklearn, ("sklearn", "skops", "joblib"), extra="sklearn"),
}


class RuntimeRegistry:
    """Model type to runtime; one runtime object for each."""

    def __init__(
        self,
        settings: RuntimeSettings | None = None,
        sources: Mapping[str, RuntimeSource] = SOURCES,
    ) -> None:
        self._settings = settings or RuntimeSettings()
        self._sources = sources
        self._heap = NativeHeap()
        self._made: dict[str, Runtime] = {}
        self._lock = threading.Lock()

    @property
    def model_types(self) -> tuple[str, ...]:
        return tuple(self._sources)

    def runtime_for(self, model_type: str) -> Runtime:
        """Call it in a worker thread: the first call for a type may import a framework."""
        source = self._sources.get(model_type)
        if source is None:
            known = ", ".join(sorted(self._sources))
            raise LoadFailed(
                f"no runtime here executes the model format {model_type!r}; known are {known}"
            )
        with self._lock:
            runtime = self._made.get(model_type)
            if runtime is None:
                _require(model_type, source)
                runtime = self._made[model_type] = source.make(self._settings, self._heap)
        return runtime


def _require(model_type: str, source: RuntimeSource) -> None:
    missing = [module for module in source.modules if find_spec(module) is None]
    if not missing:
        return
    package = f"modelmesh-py[{source.extra}]" if source.extra else "modelmesh-py"
    raise LoadFailed(
        f"the model format {model_type!r} needs {', '.join(missing)}, which this instance lacks: "
        f"pip install '{package}'"
    )
