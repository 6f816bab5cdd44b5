"""What a fork server imports for a format, so that its workers share it instead of each paying.

Names only: a module that is not installed is left out, and the worker's own load then says what
is missing. Whatever starts a thread when it is imported does not belong here.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Mapping, Sequence
from typing import Final

log = logging.getLogger(__name__)

# What every worker imports sooner or later: 30 ms and 5 MB of each.
ALWAYS: Final = (
    *("uvloop", "mesh.runtimes.artifact", "mesh.runtimes.layout", "mesh.runtimes.warm_up"),
)
MODULES: Final[Mapping[str, Sequence[str]]] = {
    # With the families of estimators that nearly every stored model needs. Without skops: its files
    # run no code, so that it is pickles that come here.
    "sklearn": (
        *("joblib", "sklearn.linear_model", "sklearn.ensemble", "sklearn.tree"),
        *("sklearn.pipeline", "sklearn.preprocessing", "sklearn.svm", "sklearn.neighbors"),
        *("sklearn.compose", "mesh.runtimes.sklearn"),
    ),
    "xgboost": ("xgboost", "mesh.runtimes.xgboost"),
    "lightgbm": ("lightgbm", "mesh.runtimes.lightgbm"),
    "pytorch": ("torch", "mesh.runtimes.pytorch"),
    "tensorflow": ("tensorflow", "mesh.runtimes.tensorflow"),
    "tflite": ("ai_edge_litert.interpreter", "mesh.runtimes.tflite"),
    "onnx": ("onnxruntime", "mesh.runtimes.onnx"),
    "python": ("mesh.runtimes.python",),
}

# What a library reads while it is imported, unless the operator has said otherwise: TensorFlow
# would tell each pod's log which processor it was built for.
VARIABLES: Final[Mapping[str, Mapping[str, str]]] = {"tensorflow": {"TF_CPP_MIN_LOG_LEVEL": "3"}}


def preload(format_name: str) -> None:
    for variable, value in VARIABLES.get(format_name, {}).items():
        os.environ.setdefault(variable, value)
    for name in (*ALWAYS, *MODULES.get(format_name, ())):
        try:
            importlib.import_module(name)
        except ImportError as error:
            log.info("%s is not preloaded: %s", name, error)
