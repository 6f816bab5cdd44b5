"""From an artifact on disk to a model in memory: its layout, its versions, where it runs, warm-up.

The same for every format; what is special about one is in its runtime's file. A model that is to
run isolated goes to the worker as a whole artifact, and is laid out there again.
"""

from __future__ import annotations

import contextlib
import logging
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from mesh.runtimes.api import AnyModel, LoadedModel, ModelSpec, Runtime, VersionedModel
from mesh.runtimes.layout import Layout, lay_out
from mesh.runtimes.warm_up import warm_up

log = logging.getLogger(__name__)


class Formats(Protocol):
    """``mesh.runtimes.registry.RuntimeRegistry``."""

    def format_runtime(self, name: str) -> Runtime: ...

    def runs_isolated(self, name: str, path: Path) -> bool: ...


class ArtifactRuntime:
    """``mesh.runtimes.api.Runtime`` for all model types."""

    model_types = ()

    def __init__(self, formats: Formats, isolated: Runtime | None) -> None:
        self._formats = formats
        self._isolated = isolated

    def predict_size_bytes(self, spec: ModelSpec) -> int:
        layout = lay_out(spec.path, spec.model_type, spec.model_id)
        if self._isolated is not None and self._runs_isolated(layout):
            return self._isolated.predict_size_bytes(_of(spec, layout))
        runtime = self._formats.format_runtime(layout.format)
        return sum(runtime.predict_size_bytes(one) for one in _versions(spec, layout))

    def load(self, spec: ModelSpec) -> AnyModel:
        layout = lay_out(spec.path, spec.model_type, spec.model_id)
        if self._isolated is not None:  # in a worker there is none, and the pod has said it
            _warn(spec.model_id, layout)
            if self._runs_isolated(layout):
                return self._isolated.load(_of(spec, layout))
        runtime = self._formats.format_runtime(layout.format)
        models: dict[str, LoadedModel] = {}
        try:
            for version, one in zip(layout.versions, _versions(spec, layout), strict=True):
                model = runtime.load(one)
                models[version.name] = model  # type: ignore[assignment]
                warm_up(models[version.name], one)
        except BaseException:
            for model in models.values():
                with contextlib.suppress(Exception):
                    model.unload()
            raise
        options = layout.options
        says = (options.max_batch_size, options.max_latency_us, options.max_concurrency)
        if "" in models and not any(one is not None for one in says):  # no version folders
            return models[""]
        return VersionedModel(models, options)

    def _runs_isolated(self, layout: Layout) -> bool:
        return any(
            self._formats.runs_isolated(layout.format, version.path) for version in layout.versions
        )


def _warn(model_id: str, layout: Layout) -> None:
    options = [layout.options, *filter(None, (version.options for version in layout.versions))]
    for warning in dict.fromkeys(warning for one in options for warning in one.warnings):
        log.warning("model %r: %s", model_id, warning)


def _of(spec: ModelSpec, layout: Layout) -> ModelSpec:
    return replace(spec, model_type=layout.format, options=layout.options)


def _versions(spec: ModelSpec, layout: Layout) -> list[ModelSpec]:
    return [
        replace(
            spec,
            model_type=layout.format,
            path=version.path,
            options=version.options or layout.options,
        )
        for version in layout.versions
    ]
