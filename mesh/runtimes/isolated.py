"""Models in worker processes: a crash, an out-of-memory or a hang costs one model's own requests.

Each model has a process of its own, forked from a fork server of its format (``mesh.worker``),
which has the framework in memory already: a worker shares that, and costs a few megabytes. Requests
go there as they came (``mesh.instance.carrier``), over the mesh's wire on a Unix socket.

Confined is what a model does to its process: its memory is bounded, its end is noticed and mended,
it has none of the pod's environment, descriptors or credentials in variables, and everything that
it starts ends with it. Not confined are files and the network: it runs as the same user, and
another process of that user can be read through ``/proc``. Code that must not be trusted with that
belongs into a pod of its own.
"""

from __future__ import annotations

import asyncio
from typing import Final

from mesh.runtimes.api import ModelSpec
from mesh.runtimes.isolated_fork_server import ForkServers
from mesh.runtimes.isolated_limits import IsolationLimits
from mesh.runtimes.isolated_model import IsolatedModel
from mesh.runtimes.registry import RuntimeRegistry
from mesh.runtimes.settings import RuntimeSettings

__all__ = ["IsolatedModel", "IsolatedRuntime", "IsolationLimits"]

# A worker's own pages before it loads anything, until one has been measured.
_FRESH_BYTES: Final = 12 * 1024 * 1024


class IsolatedRuntime:
    """``mesh.runtimes.api.Runtime`` for every format. ``loop`` is the pod's; ``close`` it there."""

    model_types = ()

    def __init__(
        self,
        settings: RuntimeSettings,
        limits: IsolationLimits,
        loop: asyncio.AbstractEventLoop,
        servers: ForkServers | None = None,
    ) -> None:
        """``servers`` that others use as well are closed by whoever made them."""
        self._settings = settings
        self._limits = limits
        self._loop = loop
        self._here = RuntimeRegistry(settings)  # predicts; nothing is loaded by it
        self._servers = servers or ForkServers()
        self._own_servers = servers is None
        self._fresh_bytes: dict[str, int] = {}
        self._models: set[IsolatedModel] = set()

    def predict_size_bytes(self, spec: ModelSpec) -> int:
        """As in this process, and what a worker has of its own."""
        runtime = self._here.runtime_for(spec.model_type)
        fresh_bytes = self._fresh_bytes.get(spec.model_type, _FRESH_BYTES)
        return runtime.predict_size_bytes(spec) + fresh_bytes

    def load(self, spec: ModelSpec) -> IsolatedModel:
        return asyncio.run_coroutine_threadsafe(self._load(spec), self._loop).result()

    async def _load(self, spec: ModelSpec) -> IsolatedModel:
        name = spec.model_type
        model = IsolatedModel(
            spec,
            self._servers.of(name),
            self._settings,
            self._limits,
            on_fresh=lambda fresh_bytes: self._fresh_bytes.update({name: fresh_bytes}),
            on_closed=lambda: self._models.discard(model),
        )
        await model.start()
        self._models.add(model)
        return model

    def fork_server_pid(self, format_name: str) -> int:
        """0: none runs."""
        return self._servers.of(format_name).pid

    async def close(self) -> None:
        """Ends every worker, and its own fork servers."""
        for model in list(self._models):
            await model.close()
        if self._own_servers:
            await self._servers.close()
