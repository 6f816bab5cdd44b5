"""What executes a pod's models, as its settings say: frameworks in it, or a runtime beside it.

Part of the composition root. Reads the ServingRuntime file, waits for an external runtime to be
ready, and gives the settings as that runtime bounds them (memory, loads at once, load time-out).
Fails with ``MeshError`` naming the file or the endpoint.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from mesh.core.errors import FailedPrecondition, InvalidArgument
from mesh.formats import ALIASES, DETECTED
from mesh.instance.loader import Runtimes
from mesh.instance.settings import InstanceSettings
from mesh.manifest import load_documents
from mesh.runtimes.external import ExternalRuntimes
from mesh.runtimes.external_choice import adapted, external_runtimes
from mesh.runtimes.isolated import IsolatedRuntime, IsolationLimits
from mesh.runtimes.registry import SOURCES, RuntimeRegistry
from mesh.serving_runtime import ServingRuntime, parse_serving_runtime, runtime_label


class Closable(Protocol):
    async def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Chosen:
    settings: InstanceSettings
    runtimes: Runtimes
    closable: Closable  # to be closed behind the pod


async def choose_runtimes(settings: InstanceSettings) -> Chosen:
    """Returns when whatever executes models is ready."""
    resource = None
    if settings.serving_runtime is not None:
        resource = await asyncio.to_thread(_read, settings.serving_runtime)
        labels = dict.fromkeys((*settings.labels, runtime_label(resource.name)))
        settings = replace(settings, labels=tuple(labels))
    elif settings.adapter:
        resource = adapted(settings.adapter)
    if resource is not None:
        external = external_runtimes(
            resource,
            endpoint=settings.runtime_endpoint,
            data_endpoint=settings.runtime_data_endpoint,
            adapter=settings.adapter,
            capacity_bytes=settings.capacity_bytes,
            env=settings.adapter_env,
        )
        if external is not None:
            return await _external(settings, external)
    elif settings.runtime_endpoint:
        raise InvalidArgument(
            "--runtime-endpoint needs --serving-runtime FILE, whose supportedModelFormats tell "
            "what the runtime serves, or --adapter"
        )
    return _in_pod(settings, resource)


def _read(path: Path) -> ServingRuntime:
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgument(f"{path} cannot be read: {error}") from None
    documents = load_documents(text, str(path))
    if len(documents) != 1:
        raise InvalidArgument(f"{path}: expected one ServingRuntime; found {len(documents)}")
    try:
        resource = parse_serving_runtime(documents[0])
    except InvalidArgument as error:
        raise InvalidArgument(f"{path}: {error.message}") from None
    if resource.disabled:
        raise FailedPrecondition(f"{path}: ServingRuntime {resource.name!r} is disabled")
    return resource


async def _external(settings: InstanceSettings, runtimes: ExternalRuntimes) -> Chosen:
    try:
        status = await runtimes.start()
    except BaseException:
        await runtimes.close()
        raise
    policy = replace(
        settings.policy,
        load_slots=max(1, status.max_loading_concurrency),
        load_timeout_ms=status.loading_timeout_ms,
        default_model_size_bytes=status.default_model_size_bytes,
    )
    bounded = replace(settings, capacity_bytes=status.capacity_bytes, policy=policy)
    return Chosen(bounded, runtimes, runtimes)


def _in_pod(settings: InstanceSettings, resource: ServingRuntime | None) -> Chosen:
    sources = SOURCES
    runtimes = settings.runtimes
    if resource is not None:
        # What is listed is served, and allowed also where its files are code.
        listed = {ALIASES.get(name, name) for name in resource.model_types}
        if resource.allows_pickle:
            listed.add("sklearn")
        if not listed & set(DETECTED):
            sources = {name: source for name, source in SOURCES.items() if name in listed}
        if not sources:
            raise FailedPrecondition(
                f"{settings.serving_runtime}: none of the formats {', '.join(sorted(listed))} is "
                f"known here; known are {', '.join(SOURCES)}"
            )
        runtimes = replace(
            runtimes,
            allow_pickle=runtimes.allow_pickle or resource.allows_pickle,
            allow_python=runtimes.allow_python or resource.allows_python,
        )
    isolated = IsolatedRuntime(
        runtimes,
        IsolationLimits(
            settings.worker_memory_bytes or settings.capacity_bytes,
            load_timeout_ms=settings.policy.load_timeout_ms,
            max_message_bytes=settings.limits.max_message_bytes,
        ),
        asyncio.get_running_loop(),
    )
    registry = RuntimeRegistry(runtimes, sources, isolated=isolated)
    return Chosen(replace(settings, runtimes=runtimes), registry, isolated)
