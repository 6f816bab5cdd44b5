"""One matrix of features in, columns out: what the runtimes of tabular models share.

As MLServer has it: an input of any name is the matrix, or several inputs are the model's named
features, a column each; a flat answer is a column (``[n, 1]``). What the model's own description
says of names, datatypes and shapes is advertised in place of what was found, and held against it.
Wrong input is INVALID_ARGUMENT; a description that contradicts the model fails the load.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from mesh.core.errors import Code, InvalidArgument, LoadFailed, MeshError, Unavailable
from mesh.formats import FORMATS, HEAD_BYTES
from mesh.oip.datatypes import DATATYPES, datatype_name
from mesh.runtimes.api import Array, ModelMetadata, ModelSpec, Tensor, TensorSpec

# A NamedTuple's own ``__new__`` is a Python function: twice the cost.
_new_tuple: Final = tuple.__new__
# What goes out as it is. BF16 is left out: as an array it cannot be told from UINT16.
_KIND_OF_DTYPE: Final = {
    kind.dtype: kind.name for kind in DATATYPES.values() if kind.name not in ("BYTES", "BF16")
}
_SIGNS: Final[tuple[tuple[str, Callable[[bytes], bool]], ...]] = (
    ("lightgbm", lambda head: head.startswith((b"tree\n", b"tree\r\n"))),
    ("xgboost", lambda head: head.lstrip()[:1] == b"{" and b"learner" in head),
    ("zip", lambda head: head.startswith(b"PK\x03\x04")),
    ("pickle", lambda head: head[:1] == b"\x80" and head[1:2] in b"\x02\x03\x04\x05"),
    ("hdf5", lambda head: head.startswith(b"\x89HDF")),
    ("tflite", lambda head: head[4:8] == b"TFL3"),
)
_SEEMS: Final = {
    "lightgbm": "a LightGBM text",
    "xgboost": "an XGBoost model",
    "zip": "a zip archive (skops and PyTorch write such)",
    "pickle": "a pickle",
    "hdf5": "an HDF5 file (Keras writes such)",
    "tflite": "a LiteRT model",
}


def feature_matrix(inputs: Mapping[str, Array], names: Sequence[str] | None) -> Array:
    """``names``: the model's features, None when it has none."""
    if len(inputs) == 1:
        (array,) = inputs.values()
        return array if array.dtype.kind != "O" else _text(array)
    if names is None or set(names) != set(inputs):
        wanted = f"its features {list(names)}" if names else "one input"
        raise InvalidArgument(f"the model takes {wanted}; the request has {sorted(inputs)}")
    columns = [inputs[name].reshape(-1, 1) for name in names]
    if len({len(column) for column in columns}) > 1:
        sizes = {name: len(column) for name, column in zip(names, columns, strict=True)}
        raise InvalidArgument(f"the features must have equally many rows; found {sizes}")
    if len({column.dtype.kind == "O" for column in columns}) > 1:  # text beside numbers stay both
        columns = [column.astype(object) for column in columns]
    matrix = np.hstack(columns)
    return matrix if matrix.dtype.kind != "O" else _text(matrix)


def number_matrix(
    inputs: Mapping[str, Array],
    names: Sequence[str] | None,
    width: int,
    dtypes: Sequence[np.dtype[Any]],
) -> Array:
    """As ``feature_matrix``, for models that take numbers only: shape (rows, ``width``), of the
    first of ``dtypes`` unless it has one of them. One row may come flat."""
    matrix = feature_matrix(inputs, names)
    if matrix.dtype.kind == "O":
        raise InvalidArgument("the model takes numbers; the request has BYTES")
    if matrix.ndim == 1 and len(matrix) == width:
        matrix = matrix.reshape(1, -1)
    if matrix.ndim != 2 or matrix.shape[1] != width:
        raise InvalidArgument(
            f"the model takes rows of {width} features; found the shape {list(matrix.shape)}"
        )
    if matrix.dtype in dtypes:
        return matrix
    with np.errstate(over="ignore"):  # too large for the type is infinite, and said so
        return matrix.astype(dtypes[0])


def _text(array: Array) -> Array:
    """BYTES as the text that estimators know; numbers among them stay."""
    text = np.empty(array.shape, dtype=object)
    flat = text.ravel()
    for index, element in enumerate(array.ravel().tolist()):
        try:
            flat[index] = element.decode() if isinstance(element, bytes) else element
        except UnicodeDecodeError:
            raise InvalidArgument(f"element {index} of the input is not UTF-8") from None
    return text


def column_tensor(name: str, answer: Any) -> Tensor:
    if type(answer) is np.ndarray:
        kind = _KIND_OF_DTYPE.get(answer.dtype)
        if kind is not None:
            column = answer[:, None] if answer.ndim == 1 else answer
            return _new_tuple(Tensor, (name, kind, column))
    if hasattr(answer, "toarray"):  # sparse, from a transformer
        answer = answer.toarray()
    array: Array = np.asarray(answer)
    if array.ndim == 1:
        array = array.reshape(-1, 1)
    kind = datatype_of(array)
    if kind != "BYTES":
        return Tensor(name, kind, np.asarray(array, dtype=DATATYPES[kind].dtype))
    encoded = np.empty(array.shape, dtype=object)
    flat = encoded.ravel()
    for index, element in enumerate(array.ravel().tolist()):
        flat[index] = element if isinstance(element, bytes) else str(element).encode()
    return Tensor(name, "BYTES", encoded)


def output_tensor(spec: TensorSpec, answer: Any, rows: int) -> Tensor:
    """What a booster answers for ``rows`` rows, as ``spec`` advertises it."""
    if rows == 0:  # libraries differ in what they make of nothing
        answer = np.empty((0, *(max(axis, 0) for axis in spec.shape[1:])))
    return restated(column_tensor(spec.name, answer), spec)


def restated(tensor: Tensor, spec: TensorSpec) -> Tensor:
    """Under the name and in the datatype that are advertised."""
    if tensor.datatype == spec.datatype and tensor.name == spec.name:
        return tensor
    return Tensor(spec.name, spec.datatype, tensor.data.astype(DATATYPES[spec.datatype].dtype))


def datatype_of(array: Array) -> str:
    return "BYTES" if array.dtype.kind == "O" else datatype_name(array.dtype) or "FP64"


def width_of(metadata: ModelMetadata) -> int:
    """How many features the model was found to have; -1 where it does not say."""
    return metadata.inputs[0].shape[-1]


# ---- what the model's description says --------------------------------------------------------


def described(found: ModelMetadata, spec: ModelSpec) -> ModelMetadata:
    """What the model's own description file says takes the place of what was found; what the
    model is not is refused. One stated output of another name renames the model's default."""
    options = spec.options
    where = f"model {spec.model_id!r}: {options.source or 'its description'}"
    if options.inputs:
        _check_inputs(options.inputs, width_of(found), where)
    return replace(
        found,
        inputs=options.inputs or found.inputs,
        outputs=_outputs(found.outputs, options.outputs, where),
    )


def stated_features(names: Sequence[str] | None, spec: ModelSpec) -> Sequence[str] | None:
    """The names that inputs of one column each may have: the description's, or the model's."""
    stated = [tensor.name for tensor in spec.options.inputs]
    return stated if len(stated) > 1 else names


def _check_inputs(stated: Sequence[TensorSpec], width: int, where: str) -> None:
    if len(stated) == 1:
        columns = stated[0].shape[-1] if len(stated[0].shape) > 1 else -1
        if width > 0 and columns not in (-1, width):
            raise LoadFailed(
                f"{where} says that input {stated[0].name!r} has {columns} features; the model "
                f"has {width}"
            )
        return
    for tensor in stated:
        if len(tensor.shape) > 1 and tensor.shape[-1] not in (-1, 1):
            raise LoadFailed(
                f"{where} says that input {tensor.name!r} has {tensor.shape[-1]} columns; several "
                "inputs are the model's features, of one column each"
            )
    if width > 0 and len(stated) != width:
        raise LoadFailed(
            f"{where} names {len(stated)} inputs; the model has {width} features (name one input "
            "for all, or one for each)"
        )


def _outputs(
    found: tuple[TensorSpec, ...], stated: Sequence[TensorSpec], where: str
) -> tuple[TensorSpec, ...]:
    """``found`` with the stated names and datatypes; a shape must agree where it says a number."""
    there = {spec.name: spec for spec in found}
    unknown = [spec.name for spec in stated if spec.name not in there]
    if unknown and (len(stated) > 1 or len(unknown) > 1):
        raise LoadFailed(
            f"{where} names the outputs {', '.join(unknown[:5])}; the model has "
            f"{', '.join(there)}. One alone may have any name"
        )
    renamed = {found[0].name if unknown else spec.name: spec for spec in stated}
    return tuple(
        _output(spec, renamed[spec.name], where) if spec.name in renamed else spec for spec in found
    )


def _output(found: TensorSpec, stated: TensorSpec, where: str) -> TensorSpec:
    if (found.datatype == "BYTES") != (stated.datatype == "BYTES") or stated.datatype == "BF16":
        raise LoadFailed(
            f"{where} says that output {stated.name!r} is {stated.datatype}; the model answers "
            f"{found.datatype}"
        )
    if len(stated.shape) == len(found.shape):
        for said, axis in zip(stated.shape, found.shape, strict=True):
            if -1 not in (said, axis) and said != axis:
                raise LoadFailed(
                    f"{where} says that output {stated.name!r} has the shape "
                    f"{list(stated.shape)}; the model answers {list(found.shape)}"
                )
    # The shape is the model's: what goes out has it.
    return TensorSpec(stated.name, stated.datatype, found.shape)


def unloaded(*arguments: Any, **named: Any) -> Any:
    """In the place of a model that is gone."""
    raise Unavailable("the model was unloaded; try again")


# ---- files ------------------------------------------------------------------------------------


def only_file(spec: ModelSpec, suffixes: Sequence[str], stem: str = "model") -> Path:
    """The model's file: the artifact itself, ``model.<suffix>`` in the folder (the first suffix
    that is there), or the folder's only file with one of the suffixes."""
    path = spec.path
    if path.is_file():
        if path.suffix in suffixes:
            return path
        raise LoadFailed(
            f"model {spec.model_id!r}: {path.name} has none of the suffixes {', '.join(suffixes)}"
        )
    if not path.is_dir():
        raise LoadFailed(f"model {spec.model_id!r}: there is no file or folder at {path.name!r}")
    for suffix in suffixes:
        if (path / (stem + suffix)).is_file():
            return path / (stem + suffix)
    candidates = sorted(entry for entry in path.iterdir() if entry.suffix in suffixes)
    if len(candidates) == 1:
        return candidates[0]
    found = ", ".join(entry.name for entry in candidates[:5]) or "none"
    raise LoadFailed(
        f"model {spec.model_id!r}: the folder has no {stem}{suffixes[0]} and not exactly one "
        f"other model file ({', '.join(suffixes)}); found {found}"
    )


def refuse_foreign(path: Path, start: bytes, spec: ModelSpec, wanted: str) -> None:
    """Says what a file seems to be that is of another format, by its first bytes."""
    head = start[:HEAD_BYTES]
    found = next(
        (name for name, told in _SIGNS if name != wanted and told(head)),
        "",
    )
    if not found:
        return
    advice = f"; say modelFormat {found}" if found in FORMATS else ""
    raise LoadFailed(
        f"model {spec.model_id!r}: {path.name} is no {wanted} model but seems to be "
        f"{_SEEMS[found]}{advice}"
    )


def file_bytes(path: Path, spec: ModelSpec) -> int:
    try:
        size_bytes = path.stat().st_size
    except OSError as error:
        raise unreadable(path, spec, error) from None
    if size_bytes == 0:
        raise LoadFailed(f"model {spec.model_id!r}: {path.name} is empty")
    return size_bytes


def settled_bytes(
    measured_bytes: int | None, predicted_bytes: int, content_bytes: int, base_bytes: int
) -> int:
    """The measured size within what is possible; the prediction when there was no measurement.
    Never less than the content: what is small and Python's own does not show on the C heap."""
    if measured_bytes is None:
        return max(predicted_bytes, content_bytes + base_bytes)
    lowest = content_bytes + base_bytes
    return max(min(measured_bytes + base_bytes, 2 * predicted_bytes), lowest)


def unreadable(path: Path, spec: ModelSpec, error: OSError) -> LoadFailed:
    return LoadFailed(
        f"model {spec.model_id!r}: {path.name} cannot be read: {error.strerror or error}",
        code=Code.UNAVAILABLE,
    )


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:500]


@contextlib.contextmanager
def loading(
    spec: ModelSpec,
    path: Path,
    library: str,
    cause: Callable[[Exception], str] | None = None,
) -> Iterator[None]:
    """What a library raises over a model's file, as the LoadFailed that it means."""
    try:
        yield
    except MeshError:
        raise
    except MemoryError:
        raise LoadFailed(
            f"model {spec.model_id!r}: out of memory while loading {path.name}",
            code=Code.UNAVAILABLE,
        ) from None
    except Exception as error:
        told = (cause or one_line)(error)
        raise LoadFailed(
            f"model {spec.model_id!r}: {library} cannot load {path.name}: {told}"
        ) from None
