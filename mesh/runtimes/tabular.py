"""One matrix of features in, columns out: what the runtimes of tabular models share.

As MLServer has it: an input of any name is the matrix, or several inputs are the model's named
features, a column each; a flat answer is a column (``[n, 1]``). Wrong input is INVALID_ARGUMENT.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mesh.core.errors import Code, InvalidArgument, LoadFailed
from mesh.oip.datatypes import datatype_name
from mesh.runtimes.api import Array, ModelMetadata, ModelSpec, Tensor, TensorSpec


def feature_matrix(inputs: Mapping[str, Array], names: Sequence[str] | None) -> Array:
    """``names``: the model's features, None when it has none."""
    if len(inputs) == 1:
        return numbers_or_text(next(iter(inputs.values())))
    if names is None or set(names) != set(inputs):
        wanted = f"its features {list(names)}" if names else "one input"
        raise InvalidArgument(f"the model takes {wanted}; the request has {sorted(inputs)}")
    columns = [numbers_or_text(inputs[name]).reshape(-1, 1) for name in names]
    if len({len(column) for column in columns}) > 1:
        sizes = {name: len(column) for name, column in zip(names, columns, strict=True)}
        raise InvalidArgument(f"the features must have equally many rows; found {sizes}")
    return np.hstack(columns)


def number_matrix(inputs: Mapping[str, Array], names: Sequence[str] | None, width: int) -> Array:
    """As ``feature_matrix``, for models that take numbers only: shape (rows, ``width``)."""
    matrix = feature_matrix(inputs, names)
    if matrix.dtype.kind == "O":
        raise InvalidArgument("the model takes numbers; the request has BYTES")
    if matrix.ndim == 1:
        matrix = matrix.reshape(1, -1)
    if matrix.ndim != 2 or matrix.shape[1] != width:
        raise InvalidArgument(
            f"the model takes rows of {width} features; found the shape {list(matrix.shape)}"
        )
    return matrix


def numbers_or_text(array: Array) -> Array:
    if array.dtype.kind != "O":
        return array
    text = np.empty(array.shape, dtype=object)
    flat = text.ravel()
    for index, element in enumerate(array.ravel().tolist()):
        try:
            flat[index] = element.decode() if isinstance(element, bytes) else element
        except UnicodeDecodeError:
            raise InvalidArgument(f"element {index} of the input is not UTF-8") from None
    return text


def column_tensor(name: str, answer: Any) -> Tensor:
    if hasattr(answer, "toarray"):  # sparse, from a transformer
        answer = answer.toarray()
    array: Array = np.asarray(answer)
    if array.ndim == 1:
        array = array.reshape(-1, 1)
    kind = datatype_of(array)
    if kind != "BYTES":
        return Tensor(name, kind, array)
    encoded = np.empty(array.shape, dtype=object)
    flat = encoded.ravel()
    for index, element in enumerate(array.ravel().tolist()):
        flat[index] = element if isinstance(element, bytes) else str(element).encode()
    return Tensor(name, "BYTES", encoded)


def datatype_of(array: Array) -> str:
    return "BYTES" if array.dtype.kind == "O" else datatype_name(array.dtype) or "FP64"


def described(metadata: ModelMetadata, spec: ModelSpec) -> ModelMetadata:
    """What the model's own description file says takes the place of what was found; a width that
    the model does not have is refused."""
    from dataclasses import replace

    options = spec.options
    if options.inputs and metadata.inputs:
        width = metadata.inputs[0].shape[-1]
        stated = options.inputs[0].shape
        if len(options.inputs) == 1 and width > 0 and stated and stated[-1] not in (-1, width):
            raise LoadFailed(
                f"model {spec.model_id!r}: {options.source} says that input "
                f"{options.inputs[0].name!r} has {stated[-1]} features; the model has {width}"
            )
    return replace(
        metadata,
        inputs=options.inputs or metadata.inputs,
        outputs=_outputs(metadata.outputs, options.outputs),
    )


def _outputs(
    found: tuple[TensorSpec, ...], stated: tuple[TensorSpec, ...]
) -> tuple[TensorSpec, ...]:
    """Names are methods of the model, so only what it has can be described."""
    by_name = {spec.name: spec for spec in stated}
    return tuple(by_name.get(spec.name, spec) for spec in found)


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


def file_bytes(path: Path, spec: ModelSpec) -> int:
    try:
        size_bytes = path.stat().st_size
    except OSError as error:
        raise unreadable(path, spec, error) from None
    if size_bytes == 0:
        raise LoadFailed(f"model {spec.model_id!r}: {path.name} is empty")
    return size_bytes


def unreadable(path: Path, spec: ModelSpec, error: OSError) -> LoadFailed:
    return LoadFailed(
        f"model {spec.model_id!r}: {path.name} cannot be read: {error.strerror or error}",
        code=Code.UNAVAILABLE,
    )


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:500]
