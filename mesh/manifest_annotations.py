"""What the annotations of an InferenceService say: our own, and the few of KServe's that count.

A wrong value is ``InvalidArgument`` with the annotation's path, what was expected and what was
found; an annotation of ours that is not known, or one of KServe's that is not acted on, is a
warning.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Final

from mesh.manifest_fields import wrong
from mesh.quantity import parse_duration_ms, parse_quantity

KSERVE_PREFIX: Final = "serving.kserve.io/"
# Our own annotations. ``revision`` means nothing but "load it anew": for an artifact that was
# replaced under the same path. ``any-name`` lifts Kubernetes' rule for names, for a model that
# lives in a folder and not there.
MESH_PREFIX: Final = "mesh.serving/"
PIN: Final = MESH_PREFIX + "pin"
MODEL_SIZE: Final = MESH_PREFIX + "model-size"
MAX_CONCURRENCY: Final = MESH_PREFIX + "max-concurrency"
MAX_BATCH_SIZE: Final = MESH_PREFIX + "max-batch-size"
MAX_BATCH_LATENCY: Final = MESH_PREFIX + "max-batch-latency"
LOAD_TIMEOUT: Final = MESH_PREFIX + "load-timeout"
IDLE_UNLOAD: Final = MESH_PREFIX + "idle-unload-after"
REQUIRED_LABELS: Final = MESH_PREFIX + "required-labels"
PREFERRED_LABELS: Final = MESH_PREFIX + "preferred-labels"
REVISION: Final = MESH_PREFIX + "revision"
ANY_NAME: Final = MESH_PREFIX + "any-name"
_OURS: Final = frozenset(
    {
        *(PIN, MODEL_SIZE, MAX_CONCURRENCY, LOAD_TIMEOUT, IDLE_UNLOAD),
        *(MAX_BATCH_SIZE, MAX_BATCH_LATENCY),
        *(REQUIRED_LABELS, PREFERRED_LABELS, REVISION, ANY_NAME),
    }
)
# KServe's, for the form of a predictor that has no field for it.
SERVING_RUNTIME: Final = KSERVE_PREFIX + "servingRuntime"
DEPLOYMENT_MODE: Final = KSERVE_PREFIX + "deploymentMode"
MODEL_MESH: Final = "ModelMesh"
# Annotations that are part of what the model is.
IDENTITY: Final = (
    KSERVE_PREFIX + "secretKey",
    KSERVE_PREFIX + "schemaPath",
    SERVING_RUNTIME,
    REVISION,
)

# What an instance may call itself (MESH_LABELS, ModelMesh's MM_LABELS): no comma, no blank.
_LABEL: Final = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._/=:-]{0,126}[A-Za-z0-9])?")
_LABELS_MAX: Final = 16
_NEVER: Final = "0"

# Nobody means more: rows of one joined run, and how long a request is held for others.
BATCH_ROWS_MAX: Final = 4_096
BATCH_LATENCY_MAX_MS: Final = 60_000


@dataclass(frozen=True, slots=True)
class Annotated:
    """What our own annotations say; None and () where they are silent."""

    pinned: bool = False
    size_bytes: int | None = None
    max_concurrency: int | None = None
    max_batch_size: int | None = None  # rows; 0: never joined
    max_batch_latency_ms: int | None = None
    load_timeout_ms: int | None = None
    idle_unload_ms: int | None = None  # 0: never
    required_labels: tuple[str, ...] = ()
    preferred_labels: tuple[str, ...] = ()


def annotated(
    annotations: Mapping[str, str], warnings: list[str], *, counted: Collection[str] = IDENTITY
) -> Annotated:
    """``counted``: KServe's annotations that say something of this kind of resource."""
    for name in sorted(annotations):
        if name.startswith(MESH_PREFIX) and name not in _OURS:
            warnings.append(f"{_path(name)}: unknown annotation, ignored")
        elif name.startswith(KSERVE_PREFIX) and name not in counted:
            if name == DEPLOYMENT_MODE and annotations[name] == MODEL_MESH:
                continue
            warnings.append(f"{_path(name)}: kept, not acted on")
    return Annotated(
        pinned=flag(annotations, PIN),
        size_bytes=_size_bytes(annotations, MODEL_SIZE),
        max_concurrency=_whole(annotations, MAX_CONCURRENCY, 1, 999_999),
        max_batch_size=_whole(annotations, MAX_BATCH_SIZE, 0, BATCH_ROWS_MAX),
        max_batch_latency_ms=_batch_latency_ms(annotations),
        load_timeout_ms=_duration_ms(annotations, LOAD_TIMEOUT),
        idle_unload_ms=_idle_unload_ms(annotations),
        required_labels=_labels(annotations, REQUIRED_LABELS),
        preferred_labels=_labels(annotations, PREFERRED_LABELS),
    )


def flag(annotations: Mapping[str, str], name: str) -> bool:
    """``"true"`` or ``"false"``; false when absent."""
    value = annotations.get(name, "false")
    if value not in ("true", "false"):
        raise wrong(_path(name), 'the string "true" or "false"', value)
    return value == "true"


def _path(name: str) -> str:
    return f"metadata.annotations[{name}]"


def _size_bytes(annotations: Mapping[str, str], name: str) -> int | None:
    if name not in annotations:
        return None
    return _positive(parse_quantity(annotations[name], _path(name)), name)


def _duration_ms(annotations: Mapping[str, str], name: str) -> int | None:
    if name not in annotations:
        return None
    return _positive(parse_duration_ms(annotations[name], _path(name)), name)


def _idle_unload_ms(annotations: Mapping[str, str]) -> int | None:
    value = annotations.get(IDLE_UNLOAD)
    if value is None or value == _NEVER:
        return None if value is None else 0
    return parse_duration_ms(value, _path(IDLE_UNLOAD))  # 0s is never, too


def _positive(value: int, name: str) -> int:
    if value <= 0:
        raise wrong(_path(name), "more than nothing", value)
    return value


def _whole(annotations: Mapping[str, str], name: str, least: int, most: int) -> int | None:
    value = annotations.get(name)
    if value is None:
        return None
    digits = value.isascii() and value.isdigit() and len(value) <= 6
    if not (digits and least <= int(value) <= most):
        raise wrong(_path(name), f"a whole number of {least} to {most}", value)
    return int(value)


def _batch_latency_ms(annotations: Mapping[str, str]) -> int | None:
    value = annotations.get(MAX_BATCH_LATENCY)
    if value is None or value == _NEVER:
        return None if value is None else 0
    found_ms = parse_duration_ms(value, _path(MAX_BATCH_LATENCY))
    if found_ms > BATCH_LATENCY_MAX_MS:
        raise wrong(_path(MAX_BATCH_LATENCY), "at most a minute", value)
    return found_ms


def _labels(annotations: Mapping[str, str], name: str) -> tuple[str, ...]:
    """``gpu, large-memory``: each once, in the order written; () when absent or empty."""
    value = annotations.get(name, "").strip()
    if not value:
        return ()
    labels = tuple(dict.fromkeys(label.strip() for label in value.split(",")))
    for label in labels:
        if not _LABEL.fullmatch(label):
            expected = "labels of instances, separated by commas, such as gpu,large-memory"
            raise wrong(_path(name), expected, value)
    if len(labels) > _LABELS_MAX:
        raise wrong(_path(name), f"at most {_LABELS_MAX} labels", value)
    return labels
