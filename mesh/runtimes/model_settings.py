"""What a model's ``model-settings.json`` (MLServer's description of a model) means here.

Read are the fields that say which format it is, where its file is, what its tensors are and how it
is batched; others are ignored, ``parallel_workers`` with a warning. What MLServer alone can run
(its MLflow, Hugging Face and custom implementations) is refused. Every fault is a ``LoadFailed``
with the field and what to do, for whoever lays the model out to put the model's name in front.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Final

import orjson

from mesh.core.errors import InvalidArgument, LoadFailed
from mesh.formats import ALIASES, FORMATS, MODEL_SETTINGS, is_inside
from mesh.manifest_fields import Fields, wrong
from mesh.oip.datatypes import DATATYPES
from mesh.runtimes.api import ModelOptions, TensorSpec
from mesh.runtimes.model_config import LATENCY_MAX_US, RANK_MAX, TENSORS_MAX

# The module part of ``implementation``, or of its class alone.
_FORMAT_OF_IMPLEMENTATION: Final[dict[str, str]] = {
    "mlserver_sklearn": "sklearn",
    "mlserver_xgboost": "xgboost",
    "mlserver_lightgbm": "lightgbm",
    "mlserver_onnx": "onnx",
}
_WORKERS_IN_VAIN: Final = (
    f"{MODEL_SETTINGS}: parallel_workers has no effect: the instance runs all its models' requests "
    "in its own threads (mesh instance --threads)"
)
_BATCH_MAX: Final = 1 << 31
_NAME_MAX_CHARS: Final = 128


@dataclass(frozen=True, slots=True)
class Settings:
    """``uri``: the model's file or folder, relative to this file; "" when it does not say.
    ``version``: the version's name, "" when it does not say."""

    options: ModelOptions
    uri: str
    version: str


def read_model_settings(text: str) -> Settings:
    try:
        document = orjson.loads(text)
    except ValueError as error:
        raise LoadFailed(f"{MODEL_SETTINGS}: not JSON: {str(error)[:200]}") from None
    try:
        return _settings(document)
    except InvalidArgument as error:
        raise LoadFailed(f"{MODEL_SETTINGS}: {error.message.removeprefix(': ')}") from None


def _settings(document: object) -> Settings:
    top = Fields(document, "", [])
    top.text("name")
    workers = top.integer("parallel_workers", minimum=0)
    for index, version in enumerate(_list(top, "versions")):
        if not isinstance(version, str):
            raise wrong(f"versions[{index}]", "a string (put it in quotes)", version)
    parameters = top.optional_fields("parameters") or Fields({}, "parameters", [])
    options = ModelOptions(
        source=MODEL_SETTINGS,
        format=_format(top),
        inputs=_tensors(top, "inputs"),
        outputs=_tensors(top, "outputs"),
        max_batch_size=_max_batch_size(top),
        max_latency_us=_max_latency_us(top),
        parameters=_extra(parameters),
        warnings=(_WORKERS_IN_VAIN,) if workers else (),
    )
    return Settings(options, _uri(parameters), _version(parameters))


def _format(top: Fields) -> str:
    implementation = top.text("implementation")
    platform = top.text("platform").lower()
    if not implementation:
        # MLServer does not act on it, but who writes "sklearn" means it.
        name = ALIASES.get(platform, platform)
        return name if name in FORMATS else ""
    module = implementation.partition(".")[0]
    if told := _FORMAT_OF_IMPLEMENTATION.get(module):
        return told
    known = ", ".join(sorted(_FORMAT_OF_IMPLEMENTATION))
    raise InvalidArgument(
        f"implementation: no runtime of the mesh stands for {implementation[:100]!r}, it is code "
        f"of MLServer or for it; known are {known}. Run it in MLServer behind the mesh, or as a "
        "python model"
    )


def _list(fields: Fields, key: str) -> list[Any]:
    value = fields.take(key)
    if value is None:
        return []
    if not isinstance(value, list) or len(value) > TENSORS_MAX:
        raise wrong(fields.at(key), f"a list of at most {TENSORS_MAX}", value)
    return value


def _tensors(top: Fields, key: str) -> tuple[TensorSpec, ...]:
    specs: dict[str, TensorSpec] = {}
    for index, item in enumerate(_list(top, key)):
        tensor = Fields(item, f"{key}[{index}]", [])
        name = tensor.text("name", required="the tensor's name")
        if name in specs:
            raise wrong(tensor.at("name"), "each name once", name)
        datatype = tensor.text("datatype", required="a datatype such as FP32").upper()
        if datatype not in DATATYPES:
            raise wrong(tensor.at("datatype"), f"one of {', '.join(DATATYPES)}", datatype)
        specs[name] = TensorSpec(name, datatype, *_shape(tensor))
    return tuple(specs.values())


def _shape(tensor: Fields) -> tuple[tuple[int, ...], bool]:
    """(the axes, whether their number is not known)"""
    shape = tensor.take("shape")
    if shape is None:
        return (), True
    if not isinstance(shape, list) or len(shape) > RANK_MAX:
        raise wrong(tensor.at("shape"), f"a list of at most {RANK_MAX} sizes", shape)
    for index, axis in enumerate(shape):
        whole = isinstance(axis, int) and not isinstance(axis, bool)
        if not whole or (axis < 1 and axis != -1):
            at = f"{tensor.at('shape')}[{index}]"
            raise wrong(at, "a size of at least 1, or -1 for a free axis", axis)
    return tuple(shape), False


def _max_batch_size(top: Fields) -> int | None:
    size = top.integer("max_batch_size", minimum=0)
    if size is not None and size > _BATCH_MAX:
        raise wrong("max_batch_size", f"at most {_BATCH_MAX}", size)
    return 0 if size == 1 else size  # one request at a time is no batching


def _max_latency_us(top: Fields) -> int | None:
    """None where it is 0: MLServer would not batch, the mesh waits as it does for every model."""
    seconds = top.take("max_batch_time")
    if seconds is None:
        return None
    number = isinstance(seconds, int | float) and not isinstance(seconds, bool)
    if not number or not math.isfinite(seconds) or not 0 <= seconds <= LATENCY_MAX_US / 1e6:
        raise wrong("max_batch_time", "seconds from 0 to 60", seconds)
    return round(seconds * 1e6) or None


def _uri(parameters: Fields) -> str:
    uri = parameters.text("uri")
    if not is_inside(uri) or "://" in uri:
        raise wrong(
            parameters.at("uri"),
            f"a path relative to {MODEL_SETTINGS}, inside the model's artifact",
            uri,
        )
    path = str(PurePosixPath(uri))
    return "" if path == "." else path


def _version(parameters: Fields) -> str:
    version = parameters.text("version")
    if len(version) > _NAME_MAX_CHARS or not version.isprintable() or "/" in version:
        raise wrong(
            parameters.at("version"),
            f"at most {_NAME_MAX_CHARS} printable characters without /",
            version,
        )
    return version


def _extra(parameters: Fields) -> dict[str, str]:
    """What a runtime may be told: ``extra``'s entries as text, and how the content is packed."""
    said: dict[str, str] = {}
    for key in ("format", "content_type"):
        if text := parameters.text(key):
            said[key] = text
    extra = parameters.optional_fields("extra")
    for key, value in extra.raw.items() if extra else ():
        try:
            said[key] = value if isinstance(value, str) else orjson.dumps(value).decode()
        except TypeError:
            raise InvalidArgument(f"parameters.extra: {key[:100]!r}: nested too deep") from None
    return said
