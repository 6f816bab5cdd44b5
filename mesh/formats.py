"""The names of model formats, and how a file's ending tells one. Facts, no code but look-ups.

Whoever serves, registers or lays out a model asks here, so that all agree.
"""

from __future__ import annotations

from typing import Final

FORMATS: Final = (
    "onnx",
    "sklearn",
    "xgboost",
    "lightgbm",
    "pytorch",
    "tensorflow",
    "tflite",
    "python",
)
# Other names of a format, as users and KServe's runtimes write them.
ALIASES: Final[dict[str, str]] = {
    "keras": "tensorflow",
    "savedmodel": "tensorflow",
    "litert": "tflite",
    "torchscript": "pytorch",
    "pytorch_libtorch": "pytorch",
}
# Types that say nothing of the format: the artifact is looked at.
DETECTED: Final = ("auto", "triton", "mlserver")

FORMAT_OF_ENDING: Final[dict[str, str]] = {
    ".onnx": "onnx",
    ".skops": "sklearn",
    ".joblib": "sklearn",
    ".pkl": "sklearn",
    ".pickle": "sklearn",
    ".ubj": "xgboost",
    ".pt": "pytorch",
    ".pth": "pytorch",
    ".pt2": "pytorch",
    ".keras": "tensorflow",
    ".h5": "tensorflow",
    ".tflite": "tflite",
}
# Endings that more than one framework writes.
AMBIGUOUS_ENDINGS: Final[dict[str, str]] = {
    ".bst": "xgboost or lightgbm",
    ".json": "xgboost, or no model at all",
    ".txt": "lightgbm, or no model at all",
}
SAVED_MODEL: Final = "saved_model.pb"
PYTHON_MODEL: Final = "model.py"
