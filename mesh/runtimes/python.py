"""Custom models: a folder with a ``model.py`` whose class loads and predicts.

The class is the one named ``Model``, else the module's only public class. It has
``predict(inputs, parameters)`` (or ``predict(inputs)``), arrays by name in and out, and, where it
wants them, ``load(path, parameters)`` (the model's folder, what its description file says)
and ``unload()``. ``inputs`` and ``outputs``, lists of (name, datatype, shape), declare its tensors;
else the description file does; else any input is accepted.

A ``model.py`` is code: it is refused unless the operator allows it, and runs in a worker process
unless he says otherwise. Each model's modules live under a package name of their own, so that two
models with files of one name do not meet (``from .other import thing`` finds the model's own file);
they are dropped when it is unloaded, and the memory that they held is collected. No byte code is
written beside the files: the artifact stays as it came. ``predict`` may be called from several
threads at once; its arrays may be read-only views of the request, to be copied before they change.

Fails with ``LoadFailed``, at inference with INVALID_ARGUMENT for a ``ValueError`` of the model's,
with INTERNAL for everything else that it raises, ``SystemExit`` included, each with the line of the
model's file, and with INTERNAL for an answer that is no dict of arrays or not what it declares.
"""

from __future__ import annotations

import gc
import importlib.util
import inspect
import itertools
import logging
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import numpy as np

from mesh.core.errors import (
    Code,
    Internal,
    InvalidArgument,
    LoadFailed,
    MeshError,
    ResourceExhausted,
    Unavailable,
)
from mesh.formats import PYTHON_MODEL
from mesh.oip.datatypes import DATATYPES, datatype_name
from mesh.runtimes.api import Array, ModelMetadata, ModelSpec, Tensor, TensorSpec
from mesh.runtimes.native_memory import NativeHeap
from mesh.runtimes.settings import RuntimeSettings

PLATFORM: Final = "python"
CLASS_NAME: Final = "Model"
# The interpreter's objects of a small class and its module.
_OBJECT_BYTES: Final = 256 * 1024
_FILES_MAX: Final = 10_000

_numbers = itertools.count()
log = logging.getLogger(__name__)


class PythonModel:
    """One instance of a user's class. Its ``predict`` may be called from several threads."""

    def __init__(
        self,
        user: Any,
        package: str,
        metadata: ModelMetadata,
        size_bytes: int,
        model_file: Path,
        heap: NativeHeap,
    ) -> None:
        self._heap = heap
        self.metadata = metadata
        self.size_bytes = size_bytes
        self._user = user
        self._package = package
        self._file = model_file
        self._predict: Callable[..., Any] = user.predict
        self._with_parameters = _takes(user.predict, 2)

    def infer(
        self, inputs: Mapping[str, Array], outputs: Sequence[str], parameters: Mapping[str, Any]
    ) -> list[Tensor]:
        arguments = (dict(inputs), dict(parameters)) if self._with_parameters else (dict(inputs),)
        try:
            answer = self._predict(*arguments)
        except MeshError:
            raise
        except ValueError as error:
            where = _where(error, self._file)
            raise InvalidArgument(
                f"the model refused the input: {_line(error)} ({where})"
            ) from None
        except MemoryError:
            raise ResourceExhausted(f"out of memory in predict of {self._file.name}") from None
        except BaseException as error:  # SystemExit would end the process that serves the others
            where = _where(error, self._file)
            raise Internal(
                f"the model failed: {type(error).__name__}: {_line(error)} ({where})"
            ) from None
        return self._tensors(answer, outputs)

    def _tensors(self, answer: Any, outputs: Sequence[str]) -> list[Tensor]:
        if not isinstance(answer, Mapping) or not all(isinstance(name, str) for name in answer):
            raise Internal(
                f"predict of {self._file.name} must return a dict of arrays by name; "
                f"it returned a {type(answer).__name__}"
            )
        missing = [name for name in outputs if name not in answer]
        if missing:
            raise Internal(
                f"predict of {self._file.name} returned no output {missing[0]!r}; "
                f"it returned {sorted(answer)}"
            )
        names = outputs or list(answer)
        declared = {spec.name: spec.datatype for spec in self.metadata.outputs}
        return [_tensor(name, answer[name], declared.get(name)) for name in names]

    def unload(self) -> None:
        user, self._user, self._predict = self._user, None, _unloaded
        try:
            if callable(getattr(user, "unload", None)):
                user.unload()
        except BaseException as error:
            log.warning(
                "unload of %s failed: %s: %s (%s)",
                *(self._file.name, type(error).__name__, _line(error), _where(error, self._file)),
            )
        del user
        _forget(self._package)
        gc.collect()  # a module and its functions refer to each other
        self._heap.released(self.size_bytes)


class PythonRuntime:
    """Loads a folder with a ``model.py``."""

    model_types = ("python",)

    def __init__(self, settings: RuntimeSettings, heap: NativeHeap) -> None:
        self._settings = settings
        self._heap = heap

    def predict_size_bytes(self, spec: ModelSpec) -> int:
        return _content_bytes(self._allowed_file(spec).parent) + _OBJECT_BYTES

    def _allowed_file(self, spec: ModelSpec) -> Path:
        """Asked before any memory is thought of: what is refused needs none."""
        file = _model_file(spec)
        if not self._settings.allow_python:
            raise LoadFailed(
                f"model {spec.model_id!r}: {file.name} is code, which runs when it is loaded. If "
                "you trust everybody who can register a model, let the operator start the instance "
                "with --allow-python (MESH_ALLOW_PYTHON=1), or with a ServingRuntime whose "
                "supportedModelFormats lists python (--serving-runtime FILE)"
            )
        return file

    def load(self, spec: ModelSpec) -> PythonModel:
        file = self._allowed_file(spec)
        # Byte code would change the artifact, and be believed when the file is replaced by one of
        # equal size within a second.
        sys.dont_write_bytecode = True
        package = f"_mesh_model_{next(_numbers)}"
        try:
            with self._heap.measure() as growth:
                user = _made(spec, file, package)
            metadata = _metadata(user, spec, file)
        except BaseException:
            _forget(package)
            raise
        size_bytes = _content_bytes(file.parent) + _OBJECT_BYTES
        if growth.bytes_ is not None:
            size_bytes = max(size_bytes, growth.bytes_ + _OBJECT_BYTES)
        return PythonModel(user, package, metadata, size_bytes, file, self._heap)


def _model_file(spec: ModelSpec) -> Path:
    path = spec.path
    file = path if path.is_file() else path / (spec.options.file or PYTHON_MODEL)
    if not file.is_file() or file.suffix != ".py":
        raise LoadFailed(
            f"model {spec.model_id!r}: the folder has no {PYTHON_MODEL}, the file with its class"
        )
    return file


def _content_bytes(folder: Path) -> int:
    total = 0
    for count, entry in enumerate(folder.rglob("*")):
        if count >= _FILES_MAX:
            break
        if entry.is_file():
            total += entry.stat().st_size
    return total


def _made(spec: ModelSpec, file: Path, package: str) -> Any:
    """The user's object, loaded."""
    try:
        module = _import(file, package)
    except MemoryError:
        raise _no_memory(spec, file) from None
    except BaseException as error:  # a model that calls sys.exit ends its load, not the pod
        raise _failed(spec, file, "cannot be imported", error) from None
    kind = _class_of(module, spec, file)
    try:
        user = kind()
        if callable(getattr(user, "load", None)):
            parameters = dict(spec.options.parameters)
            takes_both = _takes(user.load, 2)
            user.load(*((str(file.parent), parameters) if takes_both else (str(file.parent),)))
    except MemoryError:
        raise _no_memory(spec, file) from None
    except BaseException as error:
        raise _failed(spec, file, "could not load", error) from None
    return user


def _import(file: Path, package: str) -> ModuleType:
    """As module ``package.model`` of a package whose path is the model's folder, so that relative
    imports of its other files work and nothing else sees them."""
    parent = ModuleType(package)
    parent.__path__ = [str(file.parent)]
    sys.modules[package] = parent
    name = f"{package}.{file.stem}"
    found = importlib.util.spec_from_file_location(name, file)
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module
    found.loader.exec_module(module)
    return module


def _forget(package: str) -> None:
    for name in [n for n in sys.modules if n == package or n.startswith(package + ".")]:
        del sys.modules[name]


def _class_of(module: ModuleType, spec: ModelSpec, file: Path) -> Callable[[], Any]:
    own = {
        name: value
        for name, value in vars(module).items()
        if inspect.isclass(value) and value.__module__ == module.__name__ and name[0] != "_"
    }
    kind = own.get(CLASS_NAME)
    if kind is None and len(own) == 1:
        kind = next(iter(own.values()))
    if kind is None:
        found = ", ".join(sorted(own)) or "none"
        raise LoadFailed(
            f"model {spec.model_id!r}: {file.name} needs one class, or one named {CLASS_NAME}; "
            f"found {found}"
        )
    if not callable(getattr(kind, "predict", None)):
        raise LoadFailed(
            f"model {spec.model_id!r}: class {kind.__name__} of {file.name} has no method predict"
        )
    return kind


def _takes(method: Callable[..., Any], count: int) -> bool:
    try:
        inspect.signature(method).bind(*range(count))
    except (TypeError, ValueError):
        return False
    return True


def _metadata(user: Any, spec: ModelSpec, file: Path) -> ModelMetadata:
    inputs = spec.options.inputs or _declared(user, "inputs", spec, file)
    outputs = spec.options.outputs or _declared(user, "outputs", spec, file)
    return ModelMetadata(
        platform=PLATFORM,
        versions=(),
        inputs=inputs,
        outputs=outputs,
        accepts_any_input=not inputs,
    )


def _declared(user: Any, what: str, spec: ModelSpec, file: Path) -> tuple[TensorSpec, ...]:
    declared: Any = None
    try:
        declared = getattr(user, what, ())
        specs = tuple(
            TensorSpec(str(name), str(kind), tuple(int(axis) for axis in shape))
            for name, kind, shape in declared
        )
    except Exception:
        specs = (TensorSpec("", "", ()),)
    names = {one.name for one in specs}
    for one in specs:
        if one.datatype not in DATATYPES or len(names) < len(specs) or min((0, *one.shape)) < -1:
            raise LoadFailed(
                f"model {spec.model_id!r}: {what} of {file.name} must be a list of (name, "
                f"datatype, shape), such as ('x', 'FP32', [-1, 4]); found {declared!r:.200}"
            )
    return specs


def _tensor(name: str, value: Any, declared: str | None) -> Tensor:
    array = _array(name, value)
    if array.dtype.kind == "O":
        found, array = "BYTES", _encoded(name, array)
    else:
        found = datatype_name(array.dtype) or ""
    if not found:
        raise Internal(f"output {name!r} is an array of {array.dtype}, which no datatype carries")
    if declared in (None, found) or (declared == "BF16" and found == "UINT16"):
        return Tensor(name, declared or found, array)
    if declared == "BF16" and array.dtype.kind == "f":
        return Tensor(name, declared, _bfloat16(array))
    if "BYTES" not in (declared, found) and declared != "BF16":
        wanted = np.dtype(DATATYPES[declared or found].dtype)
        if np.can_cast(array.dtype, wanted, "same_kind"):
            return Tensor(name, declared or found, array.astype(wanted))
    raise Internal(f"output {name!r} is declared as {declared}; predict returned {found}")


def _array(name: str, value: Any) -> Array:
    """Text as an array of objects: numpy's own drops zeros at the end of bytes."""
    try:
        array: Array = np.asarray(value)
        if array.dtype.kind in "SU" and not isinstance(value, np.ndarray):
            array = np.array(value, dtype=object)
    except Exception as error:  # rows of unequal length, or a user's __array__
        raise Internal(
            f"output {name!r} is a {type(value).__name__} that makes no array: {_line(error)}"
        ) from None
    return array.astype(object) if array.dtype.kind in "SU" else array


def _encoded(name: str, array: Array) -> Array:
    encoded = np.empty(array.shape, dtype=object)
    flat = encoded.reshape(-1)
    for index, element in enumerate(array.reshape(-1).tolist()):
        if not isinstance(element, str | bytes):
            raise Internal(
                f"output {name!r} is an array of objects; element {index} is a "
                f"{type(element).__name__}, neither str nor bytes"
            )
        flat[index] = element if isinstance(element, bytes) else element.encode()
    return encoded


def _bfloat16(array: Array) -> Array:
    """The upper half of a float32's bits, rounded to even."""
    bits = np.ascontiguousarray(array, np.float32).view(np.uint32).reshape(array.shape)
    rounded: Array = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    rounded[np.isnan(array)] = 0x7FC0
    return rounded


def _unloaded(*arguments: Any) -> Any:
    raise Unavailable("the model was unloaded; try again")


def _no_memory(spec: ModelSpec, file: Path) -> LoadFailed:
    return LoadFailed(
        f"model {spec.model_id!r}: out of memory while loading {file.name}", code=Code.UNAVAILABLE
    )


def _failed(spec: ModelSpec, file: Path, what: str, error: BaseException) -> LoadFailed:
    hint = ""
    if isinstance(error, ModuleNotFoundError) and error.name is not None:
        sibling = error.name.partition(".")[0]
        if (file.parent / f"{sibling}.py").exists() or (file.parent / sibling).is_dir():
            hint = f"; its own files are imported as 'from .{sibling} import ...'"
    return LoadFailed(
        f"model {spec.model_id!r}: {file.name} {what}: {type(error).__name__}: {_line(error)} "
        f"({_where(error, file)}){hint}"
    )


def _where(error: BaseException, file: Path) -> str:
    """The last line of the model's own files that the error came through."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{Path(error.filename).name}:{error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if Path(frame.filename).is_relative_to(file.parent)]
    return f"{Path(own[-1].filename).name}:{own[-1].lineno}" if own else file.name


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:500]
