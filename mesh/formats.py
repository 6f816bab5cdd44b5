"""The names of model formats, and how files tell one. Pure: names and first bytes come in.

Whoever serves, registers or lays out a model asks here, so that all agree. What cannot be told is
``FormatUnclear``, in words that its catcher puts a place in front of.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import PurePath
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
# Endings that more than one framework writes: the first bytes are looked at.
AMBIGUOUS_ENDINGS: Final[dict[str, str]] = {
    ".bst": "xgboost or lightgbm",
    ".json": "xgboost, or no model at all",
    ".txt": "lightgbm, or no model at all",
}
# Of these, a file whose first bytes tell nothing is still meant to be a model.
_ALWAYS_A_MODEL: Final = (".bst",)
# A version's folder may hold the model as a folder, named as Triton names it.
FORMAT_OF_FOLDER_ENDING: Final[dict[str, str]] = {".onnx": "onnx", ".savedmodel": "tensorflow"}
SAVED_MODEL: Final = "saved_model.pb"
PYTHON_MODEL: Final = "model.py"
# What a model may say of itself, for Triton and for MLServer.
CONFIG_PBTXT: Final = "config.pbtxt"
MODEL_SETTINGS: Final = "model-settings.json"

# xgboost writes its "learner" first, after the version at most.
HEAD_BYTES: Final = 4096
# Files of one folder whose first bytes are looked at; a folder with more is not one model.
_HEADS_MAX: Final = 100
# Version numbers are int64 in Triton's protocol.
_VERSION_DIGITS: Final = 18
_SHOWN: Final = 5
_PATH_CHARS: Final = 1024
_NAME_BYTES: Final = 255

# How xgboost's files begin. In UBJSON the key's length (7) comes before it, in 8, 4, 2 bytes or 1.
_LEARNER_JSON: Final = re.compile(
    rb'\s*\{\s*("version"\s*:\s*\[[^\]]*\]\s*,\s*)?"learner"\s*:\s*\{'
)
_LEARNER_UBJSON: Final = re.compile(rb"\{(L.{7}|l.{3}|I.|[iU])\x07learner\{", re.DOTALL)

HeadOf = Callable[[str], bytes]


class FormatUnclear(Exception):
    """Nothing tells the format, or several things do."""


def is_version(name: str) -> bool:
    """Whether a folder's name is a version: a whole number, leading zeros allowed (KServe's
    TensorFlow samples have ``0001``)."""
    return name.isascii() and name.isdigit() and len(name) <= _VERSION_DIGITS


def is_inside(name: str) -> bool:
    """Whether a description's name of a file can only be below the folder it is meant for (links
    apart), and is one that a file system takes."""
    path = PurePath(name)
    fits = len(name) <= _PATH_CHARS and all(
        len(part.encode()) <= _NAME_BYTES for part in path.parts
    )
    return fits and not path.is_absolute() and ".." not in path.parts and "\0" not in name


def format_of_file(name: str, head_of: HeadOf) -> str:
    """The format of one file; "" when it is none of a model's.

    ``head_of(name)`` is asked for the first ``HEAD_BYTES`` only where the name does not tell.
    """
    if name == SAVED_MODEL:
        return "tensorflow"
    if name == PYTHON_MODEL:
        return "python"
    suffix = PurePath(name).suffix.lower()
    either = AMBIGUOUS_ENDINGS.get(suffix)
    if either is None or name == MODEL_SETTINGS:
        return FORMAT_OF_ENDING.get(suffix, "")
    told = _format_of_head(head_of(name))
    if not told and suffix in _ALWAYS_A_MODEL:
        raise FormatUnclear(
            f"{name} may be {either}, and its first bytes do not tell; say modelFormat in the "
            "resource (a manifest)"
        )
    return told


def format_of_folder(name: str) -> str:
    """The format of a folder that is itself the model, by its name; "" for any other folder."""
    return FORMAT_OF_FOLDER_ENDING.get(PurePath(name).suffix.lower(), "")


def candidates(
    files: Iterable[str], folders: Iterable[str], head_of: HeadOf
) -> Mapping[str, tuple[str, ...]]:
    """What in one folder may be the model: format to names, sorted. Hidden names are ignored."""
    found: dict[str, list[str]] = {}
    looked_into = 0
    for name in sorted(files):
        if name.startswith("."):
            continue
        looked_into += PurePath(name).suffix.lower() in AMBIGUOUS_ENDINGS
        if looked_into > _HEADS_MAX:
            raise FormatUnclear(
                f"more than {_HEADS_MAX} files that end in {', '.join(AMBIGUOUS_ENDINGS)}: this "
                "is not the folder of one model. Say modelFormat in the resource (a manifest)"
            )
        if told := format_of_file(name, head_of):
            found.setdefault(told, []).append(name)
    for name in sorted(folders):
        if not name.startswith(".") and (told := format_of_folder(name)):
            found.setdefault(told, []).append(name)
    return {told: tuple(names) for told, names in found.items()}


def only_format(found: Mapping[str, tuple[str, ...]]) -> str:
    """The one format of what ``candidates`` found."""
    if not found:
        raise FormatUnclear(f"{EXPECTED_FILES}; found none")
    if len(found) > 1:
        told = ", ".join(
            f"{name} ({told})" for told, names in sorted(found.items()) for name in names[:_SHOWN]
        )
        raise FormatUnclear(
            f"expected the files of one model; found several formats: {told}. Give each model a "
            "folder of its own, or say modelFormat in the resource (a manifest)"
        )
    told, names = next(iter(found.items()))
    if len(names) > 1 and not any(
        PurePath(name).stem in ("model", "saved_model") for name in names
    ):
        raise FormatUnclear(
            f"expected one model file, or one that is named model.*; found "
            f"{', '.join(names[:_SHOWN])}. Give each model a folder of its own"
        )
    return told


def may_be_model(name: str) -> bool:
    """Whether a file of this name, alone in a folder of models, is meant to be one of them."""
    suffix = PurePath(name).suffix.lower()
    return suffix in FORMAT_OF_ENDING or suffix in _ALWAYS_A_MODEL


EXPECTED_FILES: Final = (
    f"expected a model file ({', '.join(sorted({*FORMAT_OF_ENDING, *_ALWAYS_A_MODEL}))}, "
    f"xgboost's .json, lightgbm's .txt, {SAVED_MODEL} or {PYTHON_MODEL})"
)


def _format_of_head(head: bytes) -> str:
    if head.startswith((b"tree\n", b"tree\r\n")):
        return "lightgbm"
    if head.startswith(b"binf"):  # xgboost before 3; its runtime says what to do with it
        return "xgboost"
    return "xgboost" if _LEARNER_JSON.match(head) or _LEARNER_UBJSON.match(head) else ""
