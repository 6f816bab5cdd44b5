"""ServingRuntimes that were applied to this mesh: kept in the live setting ``servingruntimes``.

Nobody starts pods for them here: they say which runtime a model goes to, by KServe's rules, among
the instances that somebody started with that runtime's label. In a cluster the controller looks
after runtimes and this setting is empty; then no model's runtime is chosen here.

The setting is one JSON object, ``Kind/name`` to the resource. An entry that this version cannot
read counts as absent, and stays. Writes compare-and-swap, and fail as ``LiveSettings`` does.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import orjson

from mesh.core.errors import InvalidArgument
from mesh.core.live_config import SERVING_RUNTIMES
from mesh.core.names import check_resource_name
from mesh.core.types import InstanceState
from mesh.core.view import ClusterView
from mesh.kserve_status import rfc3339
from mesh.runtime_selection import Chosen, RuntimeOffer
from mesh.serving_runtime import KINDS, ServingRuntime, parse_serving_runtime, runtime_label
from router.live_settings import Config, LiveSettings

log = logging.getLogger(__name__)

Obj = dict[str, Any]

# All of them are one value in etcd, which takes 1.5 MB.
RUNTIMES_MAX_BYTES: Final = 1 << 20
_SHOWN_MAX: Final = 5  # instances in a warning
_CLUSTER: Final = "ClusterServingRuntime"
# What an API server and kubectl write into a resource.
_NOT_KEPT: Final = frozenset({"managedFields", "resourceVersion", "uid", "generation", "selfLink"})
_LAST_APPLIED: Final = "kubectl.kubernetes.io/last-applied-configuration"


@dataclass(slots=True)
class ServingRuntimes:
    """``now_ms`` is the wall clock's reading."""

    view: ClusterView
    settings: LiveSettings
    now_ms: Callable[[], int]
    _read: tuple[object, tuple[RuntimeOffer, ...]] = field(default=(None, ()))

    def resources(self) -> list[Obj]:
        """As they were applied, by kind and name."""
        kept = self.view.config.get(SERVING_RUNTIMES, {})
        return [value for _, value in sorted(kept.items()) if isinstance(value, dict)]

    def offers(self) -> tuple[RuntimeOffer, ...]:
        """What a model's runtime is chosen among; () where no runtime was applied."""
        config = self.view.config.get(SERVING_RUNTIMES)
        if self._read[0] is not config:  # a change is another object
            found = (_offer(resource) for resource in self.resources())
            self._read = config, tuple(offer for offer in found if offer is not None)
        return self._read[1]

    async def apply(self, resource: Obj) -> tuple[str, str, list[str]]:
        """Name, action and warnings. Raises InvalidArgument."""
        runtime = parse_serving_runtime(resource)
        check_resource_name(runtime.name, "metadata.name")
        key = f"{resource['kind']}/{runtime.name}"
        action = "unchanged"

        def changed(config: Config) -> Config:
            nonlocal action
            before = config.get(key)
            wanted = _kept(resource, before, self.now_ms())
            action = "created" if before is None else "configured"
            if wanted == before:
                action = "unchanged"
            after = {**config, key: wanted}
            if len(orjson.dumps(after)) > RUNTIMES_MAX_BYTES:
                raise InvalidArgument(
                    f"expected all runtimes to be at most {RUNTIMES_MAX_BYTES} bytes of JSON; "
                    f"with {runtime.name!r} they are more"
                )
            return after

        await self.settings.change(SERVING_RUNTIMES, changed)
        log.info("apply %s: %s", key, action)
        warnings = [*runtime.warnings, *self._told(runtime)]
        if action != "unchanged" and self.view.vmodels:
            warnings.append(
                "what is registered keeps the runtime that it was applied with: apply the "
                "InferenceServices again to have it chosen anew"
            )
        return runtime.name, action, warnings

    async def delete(self, name: str, kind: str) -> bool:
        """Whether there was one. Models that run on it stay where they are. ``kind``: "" for
        either."""
        if kind not in ("", *KINDS):
            raise InvalidArgument(f"kind: expected {' or '.join(KINDS)}; found {kind!r}")
        keys = {f"{one}/{name}" for one in ([kind] if kind else KINDS)}
        gone: set[str] = set()

        def changed(config: Config) -> Config:
            gone.clear()
            gone.update(keys & config.keys())
            return {key: value for key, value in config.items() if key not in keys}

        await self.settings.change(SERVING_RUNTIMES, changed)
        log.info("delete runtime %s", ", ".join(sorted(gone)) or name)
        return bool(gone)

    def _told(self, runtime: ServingRuntime) -> Iterable[str]:
        label = runtime_label(runtime.name)
        able = self._running(runtime.model_types)
        own = [name for name, labels in able if label in labels]
        others = [name for name, labels in able if label not in labels]
        said = f"spec: no pods are started for {runtime.name!r} here"
        if own:
            said += f"; its instances: {_some(own)}"
        else:
            said += "; start `mesh instance --serving-runtime FILE` to have an instance of it"
        if others:
            said += f"; models of its formats that do not name it may also run on {_some(others)}"
        yield said
        if not runtime.multi_model:
            yield "spec.multiModel: not true, so that no model is put on it"

    def chosen_warnings(self, chosen: Chosen, model_type: str) -> list[str]:
        """What the user of a runtime has to know: that nobody runs it, where the model needs it."""
        label = runtime_label(chosen.name)
        if not chosen.explicit or any(label in found for _, found in self._running((model_type,))):
            return []
        return [
            f"spec: no instance of the runtime {chosen.name!r} serves {model_type!r} now: the "
            "model waits for one (`mesh instance --serving-runtime FILE`)"
        ]

    def _running(self, model_types: Iterable[str]) -> list[tuple[str, frozenset[str]]]:
        """READY instances that run one of the formats, with their labels."""
        wanted = set(model_types)
        return [
            (instance_id, frozenset(slot.labels))
            for instance_id, slot in sorted(self.view.instances.items())
            if slot.record.state is InstanceState.READY
            and not wanted.isdisjoint(slot.record.model_types)
        ]


def _offer(resource: Mapping[str, Any]) -> RuntimeOffer | None:
    try:
        runtime = parse_serving_runtime(resource)
    except InvalidArgument as error:
        log.warning("a runtime in config/%s cannot be read: %s", SERVING_RUNTIMES, error.message)
        return None
    created_at = resource["metadata"].get("creationTimestamp")
    return RuntimeOffer(
        runtime,
        cluster=resource["kind"] == _CLUSTER,
        created_at=created_at if isinstance(created_at, str) else "",
    )


def _kept(resource: Mapping[str, Any], before: object, now_ms: int) -> Obj:
    """Without what an API server wrote, with when it was first applied here."""
    metadata = {k: v for k, v in resource["metadata"].items() if k not in _NOT_KEPT}
    annotations = metadata.get("annotations")
    if isinstance(annotations, dict):
        metadata["annotations"] = {k: v for k, v in annotations.items() if k != _LAST_APPLIED}
    created_at: object = rfc3339(now_ms)
    if isinstance(before, dict):
        created_at = before["metadata"].get("creationTimestamp", created_at)
    metadata["creationTimestamp"] = created_at
    return {
        **{key: value for key, value in resource.items() if key != "status"},
        "metadata": metadata,
    }


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN_MAX} more" if len(names) > _SHOWN_MAX else ""
    return ", ".join(names[:_SHOWN_MAX]) + more
