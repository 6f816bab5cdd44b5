"""How MLServer and Triton want a model's folder: settings written, the artifact named or linked.

What an artifact says of itself (its own ``model-settings.json``, its own ``config.pbtxt``) is taken
over, but for the name, which is the mesh's. Nothing of an artifact is changed or copied.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import orjson

from mesh.core.errors import InvalidArgument
from mesh.runtimes.external_calls import LoadOrder

SETTINGS: Final = "model-settings.json"
CONFIG: Final = "config.pbtxt"
_TEXT_MAX_BYTES: Final = 1 << 20

_IMPLEMENTATIONS: Final = {
    "sklearn": "mlserver_sklearn.SKLearnModel",
    "joblib": "mlserver_sklearn.SKLearnModel",
    "pickle": "mlserver_sklearn.SKLearnModel",
    "xgboost": "mlserver_xgboost.XGBoostModel",
    "lightgbm": "mlserver_lightgbm.LightGBMModel",
    "catboost": "mlserver_catboost.CatboostModel",
    "mlflow": "mlserver_mlflow.MLflowRuntime",
    "huggingface": "mlserver_huggingface.HuggingFaceRuntime",
}
# Triton: what says how a model is run, and the name of its file in a version.
_BACKENDS: Final = {
    "onnx": ('backend: "onnxruntime"', "model.onnx"),
    "tensorflow": ('platform: "tensorflow_savedmodel"', "model.savedmodel"),
    "pytorch": ('platform: "pytorch_libtorch"', "model.pt"),
    "tensorrt": ('platform: "tensorrt_plan"', "model.plan"),
    "python": ('backend: "python"', "model.py"),
}


class MLServerLayout:
    """``model-settings.json`` with the artifact's absolute path."""

    unloads_later = False
    formats = tuple(_IMPLEMENTATIONS)

    def write(self, folder: Path, name: str, order: LoadOrder) -> None:
        artifact = order.path
        own = artifact / SETTINGS
        settings = _settings_of(own) if own.is_file() else {}
        parameters = settings.get("parameters") or {}
        if not isinstance(parameters, dict):
            raise InvalidArgument(f"{SETTINGS}: parameters: expected a mapping")
        if not settings.get("implementation"):
            implementation = _IMPLEMENTATIONS.get(order.model_type)
            if implementation is None:
                raise InvalidArgument(
                    f"MLServer has no implementation for the format {order.model_type!r}; known "
                    f"are {', '.join(_IMPLEMENTATIONS)}, or name one in {SETTINGS}"
                )
            settings["implementation"] = implementation
        settings["name"] = name
        settings["parameters"] = {**parameters, "uri": str(_model_file(artifact, parameters))}
        (folder / SETTINGS).write_bytes(orjson.dumps(settings))


def _settings_of(path: Path) -> dict[str, Any]:
    try:
        settings = orjson.loads(_bounded(path))
    except orjson.JSONDecodeError as error:
        raise InvalidArgument(f"{SETTINGS} is no JSON: {error}") from None
    if not isinstance(settings, dict):
        raise InvalidArgument(f"{SETTINGS}: expected a mapping")
    return settings


def _model_file(artifact: Path, parameters: dict[str, Any]) -> Path:
    """What the artifact's own settings name inside it, else its only file, else all of it."""
    said = parameters.get("uri")
    if said is not None:
        inside = (artifact / str(said)).resolve()
        if not inside.is_relative_to(artifact.resolve()):
            raise InvalidArgument(f"{SETTINGS}: parameters.uri leads out of the model: {said!r}")
        return inside
    if artifact.is_dir():
        files = [entry for entry in artifact.iterdir() if entry.name != SETTINGS]
        if len(files) == 1 and files[0].is_file():
            return files[0]
    return artifact


class TritonLayout:
    """``config.pbtxt``, a folder of links for each version, and links to what lies beside them
    (labels, warm-up data). Folders of our own, as Triton's Python writes its byte code there."""

    unloads_later = True
    formats = tuple(_BACKENDS)

    def write(self, folder: Path, name: str, order: LoadOrder) -> None:
        artifact = _inner(order.path)
        backend, default_file = _BACKENDS.get(order.model_type, ("", ""))
        own = artifact / CONFIG
        config = (
            without_name(_bounded(own).decode("utf-8", "replace")) if own.is_file() else backend
        )
        (folder / CONFIG).write_text(f'name: "{name}"\n{config}\n')
        versions = list(_versions(artifact))
        for version in versions:
            (folder / version.name).mkdir()
            for entry in version.iterdir():
                (folder / version.name / entry.name).symlink_to(entry)
        if not versions:
            (folder / "1").mkdir()
            for link, target in _links(artifact, default_file):
                (folder / "1" / link).symlink_to(target)
        if own.is_file():
            for entry in artifact.iterdir():
                if entry not in versions and entry.name != CONFIG:
                    (folder / entry.name).symlink_to(entry)


def _inner(artifact: Path) -> Path:
    """Triton's ``NAME/VERSION/...``: the folder that has the versions."""
    if artifact.is_dir() and not (artifact / CONFIG).exists():
        entries = list(artifact.iterdir())
        if len(entries) == 1 and entries[0].is_dir() and any(_versions(entries[0])):
            return entries[0]
    return artifact


def _versions(folder: Path) -> Iterator[Path]:
    if folder.is_dir():
        for entry in sorted(folder.iterdir()):
            if entry.is_dir() and entry.name.isascii() and entry.name.isdigit():
                yield entry


def _links(artifact: Path, default_file: str) -> Iterator[tuple[str, Path]]:
    """(name in the version's folder, what it stands for)"""
    if artifact.is_file():
        yield default_file or artifact.name, artifact
        return
    if default_file.endswith(".savedmodel") and (artifact / "saved_model.pb").is_file():
        yield default_file, artifact
        return
    files = [entry for entry in sorted(artifact.iterdir()) if entry.name != CONFIG]
    if len(files) == 1 and default_file:
        yield default_file, files[0]
        return
    for file in files:
        yield file.name, file


_TOKEN: Final = re.compile(r'#[^\n]*|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])*\'|[{}\[\]<>]|name\b')
_NAME: Final = re.compile(r"name\s*:\s*(\"(?:\\.|[^\"\\\n])*\"|'(?:\\.|[^'\\\n])*')\s*[,;]?")


def without_name(config: str) -> str:
    """A ``config.pbtxt`` without the model's name at its top level; names inside stay."""
    depth = at = 0
    out: list[str] = []
    for token in _TOKEN.finditer(config):
        text = token.group()
        if text in "{[<":
            depth += 1
        elif text in "}]>":
            depth -= 1
        elif text == "name" and depth == 0 and token.start() >= at:
            before = config[token.start() - 1 : token.start()]
            named = _NAME.match(config, token.start())
            if named is not None and not (before.isalnum() or before == "_"):
                out.append(config[at : token.start()])
                at = named.end()
    out.append(config[at:])
    return "".join(out)


def _bounded(path: Path) -> bytes:
    if path.stat().st_size > _TEXT_MAX_BYTES:
        raise InvalidArgument(f"{path.name} is larger than {_TEXT_MAX_BYTES} bytes")
    return path.read_bytes()
