"""A namespace's storage-config secret on its way to the serving pods.

In the cluster the kubelet mounts it; a changed secret reaches a mount after up to two minutes, or
at once when something of the pod itself changes: so each serving pod gets the secret's hash as an
annotation. For serving pods elsewhere the secret is written into a folder (``folder``), each entry
a file that only its owner reads, in place and whole.

Models whose last load failed are tried again at once when the secret has changed: it may be what
they lacked. No value of it is in etcd, an event, a status or a log line.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from mesh.reconciler.kube import ApiError, Kube, Obj
from mesh.reconciler.kube_resources import PODS
from mesh.reconciler.meshes import Mesh
from mesh.reconciler.work_queue import Again
from mesh.reconciler.workload import OWNED_SELECTOR
from mesh.storage_folder import data_of, write_folder

log = logging.getLogger(__name__)

SECRET_HASH: Final = "mesh.serving/storage-config-hash"


class StorageSecrets:
    """``folder_of``: where a namespace's secret is written to; None where all of its serving pods
    are in the cluster."""

    def __init__(self, kube: Kube, *, folder_of: Callable[[str], Path | None]) -> None:
        self._kube = kube
        self._folder_of = folder_of
        self._seen: dict[str, str] = {}  # by namespace: the hash of what was handed on

    async def reconcile(self, mesh: Mesh, secret: Obj | None) -> Again | None:
        """Raises ApiError, OSError."""
        data = data_of(secret)
        digest = hash_of(data)
        before = self._seen.get(mesh.namespace)
        if before == digest:
            return None
        folder = self._folder_of(mesh.namespace)
        if folder is not None:
            await asyncio.to_thread(write_folder, folder, data)
        if before is not None:
            await self._touch_pods(mesh.namespace, digest)
            failed = {failure.model_id for failure in mesh.view.all_failures()}
            if failed:
                await mesh.forget_failures(failed)
            log.info("namespace %s: the storage secret has changed", mesh.namespace)
        self._seen[mesh.namespace] = digest
        return None

    def forget(self, namespace: str) -> None:
        """The namespace is not served any more. Raises OSError."""
        self._seen.pop(namespace, None)
        folder = self._folder_of(namespace)
        if folder is not None and folder.is_dir():
            write_folder(folder, {})

    async def _touch_pods(self, namespace: str, digest: str) -> None:
        pods = await self._kube.list(PODS, namespace, label_selector=OWNED_SELECTOR)
        for pod in pods.items:
            annotations = pod["metadata"].get("annotations") or {}
            if annotations.get(SECRET_HASH) == digest:
                continue
            patch = {"metadata": {"annotations": {SECRET_HASH: digest}}}
            try:
                await self._kube.patch(PODS, namespace, pod["metadata"]["name"], patch)
            except ApiError as error:  # it may be gone; its successor mounts the new one
                log.info("pod %s: %s", pod["metadata"]["name"], error)


def entries_of(secret: Obj | None) -> dict[str, Mapping[str, Any]]:
    """Its entries that are JSON objects."""
    found: dict[str, Mapping[str, Any]] = {}
    for key, value in data_of(secret).items():
        try:
            entry = json.loads(value)
        except ValueError:
            continue
        if isinstance(entry, dict):
            found[key] = entry
    return found


def hash_of(data: Mapping[str, bytes]) -> str:
    """Of the whole secret: the same in every controller, so that none touches pods anew."""
    digest = hashlib.sha256()
    for key in sorted(data):
        for part in (key.encode(), data[key]):
            digest.update(len(part).to_bytes(8, "big") + part)
    return digest.hexdigest()[:16]
