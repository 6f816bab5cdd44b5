"""Runs the requests that a model asks for before it counts as loaded.

A warm-up that fails fails the load: the first client would have met the same.
"""

from __future__ import annotations

import numpy as np

from mesh.core.errors import LoadFailed, MeshError
from mesh.oip.datatypes import DATATYPES
from mesh.runtimes.api import Array, LoadedModel, ModelSpec, TensorSpec


def warm_up(model: LoadedModel, spec: ModelSpec) -> None:
    """Raises LoadFailed with the model's own words."""
    for sample in spec.options.warm_up:
        inputs = {tensor.name: _zeros(tensor) for tensor in sample.inputs}
        for _ in range(sample.count):
            try:
                model.infer(inputs, (), {})
            except MeshError as error:
                raise LoadFailed(
                    f"model {spec.model_id!r}: its warm-up request ({spec.options.source}) "
                    f"failed: {error.message}"
                ) from None


def _zeros(tensor: TensorSpec) -> Array:
    if tensor.datatype == "BYTES":
        empty: Array = np.empty(tensor.shape, dtype=object)
        empty.fill(b"")
        return empty
    return np.zeros(tensor.shape, DATATYPES[tensor.datatype].dtype)
