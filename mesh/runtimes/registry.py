"""Which runtime executes which model format, in this process or in a worker.

Owns the list of formats, of the extra that brings each framework, and of what runs isolated. A
runtime is made when its first model comes, so a framework that nobody uses is never imported. An
unknown format or a missing framework is a ``LoadFailed`` that says what to install. Safe for
concurrent use.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from mesh.core.errors import LoadFailed
from mesh.formats import ALIASES, DETECTED
from mesh.runtimes.api import Runtime
from mesh.runtimes.native_memory import NativeHeap
from mesh.runtimes.settings import RuntimeSettings

__all__ = ["SOURCES", "RuntimeRegistry", "RuntimeSettings", "RuntimeSource"]


@dataclass(frozen=True, slots=True)
class RuntimeSource:
    """How to make a runtime. ``extra`` of this package brings the ``modules`` that it imports.

    ``isolated(path)`` tells whether a version's files run in a worker process unless the operator
    says otherwise; it looks at names, and imports nothing.
    """

    make: Callable[[RuntimeSettings, NativeHeap], Runtime]
    modules: tuple[str, ...]
    extra: str | None = None
    isolated: Callable[[Path], bool] = lambda path: False


def _onnx(settings: RuntimeSettings, heap: NativeHeap) -> Runtime:
    from mesh.runtimes.onnx import OnnxRuntime, OnnxSettings

    return OnnxRuntime(OnnxSettings(intra_op_threads=settings.intra_op_threads), heap)


def _sklearn(settings: RuntimeSettings, heap: NativeHeap) -> Runtime:
    from mesh.runtimes.sklearn import SklearnRuntime

    return SklearnRuntime(
        allow_pickle=settings.allow_pickle,
        trusted_types=settings.trusted_types,
        heap=heap,
        threads=settings.intra_op_threads,
    )


def _xgboost(settings: RuntimeSettings, heap: NativeHeap) -> Runtime:
    from mesh.runtimes.xgboost import XgboostRuntime

    return XgboostRuntime(settings, heap)


def _lightgbm(settings: RuntimeSettings, heap: NativeHeap) -> Runtime:
    from mesh.runtimes.lightgbm import LightgbmRuntime

    return LightgbmRuntime(settings, heap)


def _pytorch(settings: RuntimeSettings, heap: NativeHeap) -> Runtime:
    from mesh.runtimes.pytorch import PytorchRuntime

    return PytorchRuntime(settings, heap)


def _tensorflow(settings: RuntimeSettings, heap: NativeHeap) -> Runtime:
    from mesh.runtimes.tensorflow import TensorflowRuntime

    return TensorflowRuntime(settings, heap)


def _tflite(settings: RuntimeSettings, heap: NativeHeap) -> Runtime:
    from mesh.runtimes.tflite import TfliteRuntime

    return TfliteRuntime(settings, heap)


def _python(settings: RuntimeSettings, heap: NativeHeap) -> Runtime:
    from mesh.runtimes.python import PythonRuntime

    return PythonRuntime(settings, heap)


def _always(path: Path) -> bool:
    return True


def _pickled(path: Path) -> bool:
    from mesh.runtimes.sklearn import PICKLE_SUFFIXES, SKOPS_SUFFIX

    if path.is_file():
        return path.suffix in PICKLE_SUFFIXES
    names = [entry.suffix for entry in path.iterdir()]
    return SKOPS_SUFFIX not in names and any(suffix in PICKLE_SUFFIXES for suffix in names)


def _exported(path: Path) -> bool:
    """``torch.export`` archives hold pickles; those that are known to run code are refused, which
    is no proof of the others."""
    if path.is_dir():
        return any(entry.suffix == ".pt2" for entry in path.iterdir())
    return path.suffix == ".pt2"


SOURCES: Final[Mapping[str, RuntimeSource]] = {
    "onnx": RuntimeSource(_onnx, ("onnxruntime",)),
    "sklearn": RuntimeSource(_sklearn, ("sklearn", "skops", "joblib"), "sklearn", _pickled),
    "xgboost": RuntimeSource(_xgboost, ("xgboost",), "xgboost"),
    "lightgbm": RuntimeSource(_lightgbm, ("lightgbm",), "lightgbm"),
    "pytorch": RuntimeSource(_pytorch, ("torch",), "pytorch", _exported),
    # Its memory does not come back in its process; a worker's end gives it back.
    "tensorflow": RuntimeSource(_tensorflow, ("tensorflow",), "tensorflow", _always),
    "tflite": RuntimeSource(_tflite, ("ai_edge_litert",), "tflite"),
    "python": RuntimeSource(_python, (), None, _always),
}


class RuntimeRegistry:
    """Model type to runtime; one runtime object for each format.

    ``isolated`` runs what is to run in worker processes; without one everything runs here.
    """

    def __init__(
        self,
        settings: RuntimeSettings | None = None,
        sources: Mapping[str, RuntimeSource] = SOURCES,
        *,
        isolated: Runtime | None = None,
    ) -> None:
        from mesh.runtimes.artifact import ArtifactRuntime

        self.settings = settings or RuntimeSettings()
        self._sources = sources
        self._heap = NativeHeap()
        self._made: dict[str, Runtime] = {}
        self._lock = threading.Lock()
        self._artifacts = ArtifactRuntime(self, isolated)

    @property
    def model_types(self) -> tuple[str, ...]:
        aliases = (alias for alias, name in ALIASES.items() if name in self._sources)
        return (*self._sources, *aliases, *DETECTED)

    def runtime_for(self, model_type: str) -> Runtime:
        """What loads artifacts of this type. An unknown one is refused by the load."""
        return self._artifacts

    def format_runtime(self, name: str) -> Runtime:
        """What loads one version of this format in this process. Call it in a worker thread: the
        first call for a format may import a framework."""
        source = self._source(name)
        with self._lock:
            runtime = self._made.get(name)
            if runtime is None:
                _require(name, source)
                runtime = self._made[name] = source.make(self.settings, self._heap)
        return runtime

    def runs_isolated(self, name: str, path: Path) -> bool:
        """Whether one version's files of this format run in a worker process."""
        said = self.settings.isolation.get(name)
        return self._source(name).isolated(path) if said is None else said

    def _source(self, name: str) -> RuntimeSource:
        source = self._sources.get(name)
        if source is None:
            known = ", ".join(sorted(self._sources))
            raise LoadFailed(
                f"no runtime here executes the model format {name!r}; known are {known}"
            )
        return source


def _require(model_type: str, source: RuntimeSource) -> None:
    missing = [module for module in source.modules if find_spec(module) is None]
    if not missing:
        return
    package = f"modelmesh-py[{source.extra}]" if source.extra else "modelmesh-py"
    raise LoadFailed(
        f"the model format {model_type!r} needs {', '.join(missing)}, which this instance lacks: "
        f"pip install '{package}'"
    )
