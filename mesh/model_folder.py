"""Models laid out as files: one folder or one file is one model, its name is the model's name.

``models/iris/model.onnx``, ``models/iris/3/model.onnx`` (all numbered versions are served) and
``models/digits.skops`` each become an InferenceService with a ``file://`` URI. The format is told
as the serving pod tells it: by a ``config.pbtxt`` or ``model-settings.json``, else by the files.
The size and change time of the files are part of what the model is, so that replacing one is a
changed spec: the new one is loaded before it is switched to.

It reads names, sizes, times, first bytes and descriptions, never weights. What it cannot tell is
``InvalidArgument`` with the path, and what to do: usually, write a manifest.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from mesh.core.errors import InvalidArgument, LoadFailed
from mesh.core.names import check_model_id, is_resource_name
from mesh.formats import (
    EXPECTED_FILES,
    HEAD_BYTES,
    format_of_file,
    may_be_model,
)
from mesh.manifest import ANY_NAME, API_VERSION, REVISION, AppliedModel, parse_resource
from mesh.runtimes.layout import lay_out

# One model's files: an artifact with more is not one model.
_MAX_FILES: Final = 10_000


def looks_like_model(path: Path) -> bool:
    """Whether an entry of a models folder is to be given to ``model_from_path``.

    Any folder that is not hidden is, and every file with an ending of a model, or with one that
    models share and a model's first bytes; manifests, hidden and other files are not.
    """
    if path.name.startswith("."):
        return False
    if path.is_dir() or may_be_model(path.name):
        return True
    try:
        # Alone in a folder of models, a model.py may be anybody's script.
        return format_of_file(path.name, lambda name: _head(path)) not in ("", "python")
    except OSError:
        return False


def model_from_path(path: Path, *, now_ms: int = 0) -> AppliedModel:
    """One model's folder or file as what applying it means."""
    return parse_resource(resource_from_path(path), now_ms=now_ms)


def resource_from_path(path: Path) -> dict[str, Any]:
    """One model's folder or file as the InferenceService that says the same."""
    path = path.absolute()
    if not path.exists():
        raise InvalidArgument(f"{path}: expected a model's folder or file; found nothing")
    name = path.name if path.is_dir() else path.stem
    model_type = _format_of(path)
    annotations = {REVISION: _stamp(path)}
    if not is_resource_name(name):
        check_model_id(name, f"{path}: the name")
        annotations[ANY_NAME] = "true"
    model = {"modelFormat": {"name": model_type}, "storageUri": path.as_uri()}
    return {
        "apiVersion": API_VERSION,
        "kind": "InferenceService",
        "metadata": {"name": name, "annotations": annotations},
        "spec": {"predictor": {"model": model}},
    }


def _format_of(path: Path) -> str:
    if path.is_file() and not looks_like_model(path):
        raise InvalidArgument(f"{path}: {EXPECTED_FILES}; found {path.suffix or 'none'}")
    try:
        return lay_out(path, "auto", path.name).format
    except LoadFailed as error:
        message = error.message.removeprefix(f"model {path.name!r}: ")
        raise InvalidArgument(f"{path}: {message}") from None


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(HEAD_BYTES)


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
