"""Runs the requests that a model asks for before it counts as loaded.

A warm-up that fails fails the load: the first client would have met the same. It is the model's
own wish, so it is bounded in number and size before anything is allocated for it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import numpy as np

from mesh.core.errors import Code, LoadFailed, MeshError
from mesh.oip.call import check_names, check_tensor
from mesh.oip.datatypes import DATATYPES
from mesh.oip.raw_bytes import decode_raw
from mesh.runtimes.api import Array, LoadedModel, ModelSpec, TensorSpec, WarmUp

# Of one model, all its samples together; each holds up the load.
REQUESTS_MAX: Final = 100
# Of one request, all its inputs together.
BYTES_MAX: Final = 256 << 20
# Strings have no size in their shape: what one element costs as an object, and the least of its
# form in a file.
_BYTES_ELEMENT: Final = 8


def warm_up(model: LoadedModel, spec: ModelSpec) -> None:
    """Raises LoadFailed with the model's own words."""
    if not spec.options.warm_up:
        return
    where = f"model {spec.model_id!r}: {spec.options.source or 'its description'}"
    check_warm_ups(spec.options.warm_up, where)
    for sample in spec.options.warm_up:
        try:
            check_names([tensor.name for tensor in sample.inputs], model.metadata)
            for tensor in sample.inputs:
                kind = DATATYPES[tensor.datatype]
                check_tensor(tensor.name, kind, tensor.shape, model.metadata)
            inputs = {tensor.name: _content(tensor, sample) for tensor in sample.inputs}
            for _ in range(sample.count):
                model.infer(inputs, (), {})
        except MeshError as error:
            raise LoadFailed(f"{where}: the warm-up request failed: {error.message}") from None
        except OSError as error:
            raise LoadFailed(
                f"{where}: the warm-up's data cannot be read: {error.strerror or error}",
                code=Code.UNAVAILABLE,
            ) from None


def check_warm_ups(samples: Sequence[WarmUp], where: str) -> None:
    """Whether they are few and small enough; allocates nothing. ``where`` begins the message."""
    requests = sum(sample.count for sample in samples)
    if requests > REQUESTS_MAX:
        raise LoadFailed(
            f"{where}: expected at most {REQUESTS_MAX} warm-up requests (count); found {requests}"
        )
    for sample in samples:
        names = [tensor.name for tensor in sample.inputs]
        for tensor in sample.inputs:
            if tensor.datatype not in DATATYPES:
                raise LoadFailed(
                    f"{where}: the warm-up's input {tensor.name!r} has the unknown datatype "
                    f"{tensor.datatype!r}; known are {', '.join(DATATYPES)}"
                )
            if min(tensor.shape, default=0) < 0:
                raise LoadFailed(
                    f"{where}: the warm-up's input {tensor.name!r} must say the size of every "
                    f"axis; found {list(tensor.shape)}"
                )
        size_bytes = sum(_size_bytes(tensor) for tensor in sample.inputs)
        if size_bytes > BYTES_MAX:
            raise LoadFailed(
                f"{where}: expected at most {BYTES_MAX >> 20} MiB in one warm-up request; its "
                f"inputs {', '.join(names[:5])} have {size_bytes >> 20} MiB"
            )


def _size_bytes(tensor: TensorSpec) -> int:
    return math.prod(tensor.shape) * (DATATYPES[tensor.datatype].size_bytes or _BYTES_ELEMENT)


def _content(tensor: TensorSpec, sample: WarmUp) -> Array:
    kind = DATATYPES[tensor.datatype]
    file = sample.data.get(tensor.name)
    if file is not None:
        of = f"the warm-up's {file.name} (input {tensor.name!r})"
        # One byte more than may be there: a longer file is told from a right one.
        with file.open("rb") as stream:
            content = stream.read((_size_bytes(tensor) if kind.size_bytes else BYTES_MAX) + 1)
        return decode_raw(content, kind, tensor.shape, of=of)
    if not kind.size_bytes:
        empty: Array = np.empty(tensor.shape, dtype=object)
        empty.fill(b"")
        return empty
    return np.zeros(tensor.shape, kind.dtype)
