"""Models laid out as files: one folder or one file is one model, its name is the model's name.

``models/iris/model.onnx``, ``models/iris/3/model.onnx`` (the highest number is taken) and
``models/digits.skops`` each become an InferenceService with a ``file://`` URI. The
format is told by the file's ending. The size and change time of the files are part of what the
model is, so that replacing one is a changed spec: the new one is loaded before it is switched to.

It reads names, sizes and times, never contents. What it cannot tell is ``InvalidArgument`` with
the path, and what to do: usually, write a manifest.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from mesh.core.errors import InvalidArgument
from mesh.core.names import check_model_id, is_resource_name
from mesh.manifest import ANY_NAME, API_VERSION, REVISION, AppliedModel, parse_resource

FORMAT_OF_ENDING: Final[dict[str, str]] = {
    ".onnx": "onnx",
    ".skops": "sklearn",
    ".joblib": "sklearn",
    ".pkl": "sklearn",
    ".pickle": "sklearn",
    ".ubj": "xgboost",
    ".pt": "pytorch",
    ".pth": "pytorch",
    ".tflite": "tflite",
}
# Endings that more than one framework writes.
_AMBIGUOUS: Final[dict[str, str]] = {".bst": "xgboost or lightgbm"}
_SAVED_MODEL: Final = "saved_model.pb"
MANIFEST_ENDINGS: Final = (".yaml", ".yml", ".json")
# One model's files: an artifact with more is not one model.
_MAX_FILES: Final = 10_000


def looks_like_model(path: Path) -> bool:
    """Whether an entry of a models folder is to be given to ``model_from_path``.

    Any folder that is not hidden is, and every file with an ending of a model; manifests, hidden
    and other files are not.
    """
    if path.name.startswith("."):
        return False
    suffix = path.suffix.lower()
    return path.is_dir() or suffix in FORMAT_OF_ENDING or suffix in _AMBIGUOUS


def model_from_path(path: Path, *, now_ms: int = 0) -> AppliedModel:
    """One model's folder or file as what applying it means."""
    return parse_resource(resource_from_path(path), now_ms=now_ms)


def resource_from_path(path: Path) -> dict[str, Any]:
    """One model's folder or file as the InferenceService that says the same."""
    path = path.absolute()
    if not path.exists():
        raise InvalidArgument(f"{path}: expected a model's folder or file; found nothing")
    if path.is_dir():
        name = path.name
        artifact, model_type = _look_into(path)
    else:
        name = path.stem
        artifact, model_type = path, _format_of(path)
        if not model_type:
            raise InvalidArgument(f"{path}: {_expected_endings()}; found {path.suffix or 'none'}")
    annotations = {REVISION: _stamp(artifact)}
    if not is_resource_name(name):
        check_model_id(name, f"{path}: the name")
        annotations[ANY_NAME] = "true"
    model = {"modelFormat": {"name": model_type}, "storageUri": artifact.as_uri()}
    return {
        "apiVersion": API_VERSION,
        "kind": "InferenceService",
        "metadata": {"name": name, "annotations": annotations},
        "spec": {"predictor": {"model": model}},
    }


def _look_into(folder: Path) -> tuple[Path, str]:
    """(the folder of the artifact: this one, or its highest numbered child; the format)"""
    model_type = _format_in(folder)
    if model_type:
        return folder, model_type
    numbered = [p for p in _visible(folder) if p.is_dir() and p.name.isascii() and p.name.isdigit()]
    if numbered:
        latest = max(numbered, key=lambda p: (int(p.name), p.name))
        model_type = _format_in(latest)
        if model_type:
            return latest, model_type
        folder = latest
    raise InvalidArgument(f"{folder}: {_expected_endings()} in this folder; found none")


def _format_in(folder: Path) -> str:
    """The one format of the files right in ``folder``; "" when no file tells one."""
    entries = _visible(folder)
    if any(p.name == _SAVED_MODEL for p in entries):
        return "tensorflow"
    formats = {p.name: _format_of(p) for p in entries if p.is_file() and _format_of(p)}
    if len(set(formats.values())) > 1:
        told = ", ".join(f"{name} ({kind})" for name, kind in sorted(formats.items())[:5])
        raise InvalidArgument(
            f"{folder}: expected the files of one model; found several formats: {told}. "
            "Give each model a folder of its own, or write a manifest with modelFormat"
        )
    named_model = [name for name in formats if Path(name).stem == "model"]
    if len(formats) > 1 and len(named_model) != 1:
        raise InvalidArgument(
            f"{folder}: expected one model file, or one that is named model.*; found "
            f"{', '.join(sorted(formats)[:5])}. Give each model a folder of its own"
        )
    return next(iter(formats.values()), "")


def _format_of(path: Path) -> str:
    suffix = path.suffix.lower()
    if either := _AMBIGUOUS.get(suffix):
        raise InvalidArgument(
            f"{path}: the ending {suffix} may be {either}; write a manifest that says modelFormat"
        )
    return FORMAT_OF_ENDING.get(suffix, "")


def _visible(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if not p.name.startswith("."))


def _files(artifact: Path) -> Iterator[Path]:
    if artifact.is_file():
        yield artifact
        return
    for base, folders, names in os.walk(artifact):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        yield from (Path(base) / name for name in sorted(names) if not name.startswith("."))


def _stamp(artifact: Path) -> str:
    """A text that changes when a file is added, taken away or written."""
    total_bytes, latest_ns, count = 0, 0, 0
    for file in _files(artifact):
        count += 1
        if count > _MAX_FILES:
            raise InvalidArgument(f"{artifact}: expected at most {_MAX_FILES} files in one model")
        try:
            seen = file.stat()
        except FileNotFoundError:  # a dangling link, or it went while we looked
            continue
        total_bytes += seen.st_size
        latest_ns = max(latest_ns, seen.st_mtime_ns)
    return f"{count}-{total_bytes}-{latest_ns}"


def _expected_endings() -> str:
    return f"expected a model file ({', '.join(sorted(FORMAT_OF_ENDING))} or {_SAVED_MODEL})"
