"""The live settings in the store, `config/<name>`: read and changed, each a JSON object.

A change reads what stands there, decides, and writes only if nothing has changed meanwhile; then it
tells the view, so that whoever changed something through this router sees it. After ``MAX_TRIES``
lost races it fails with UNAVAILABLE; while the store is away every change fails so.
"""

from __future__ import annotations

from collections.abc import Callable

from mesh import registry
from mesh.catalog import MAX_TRIES, contended
from mesh.core.errors import FailedPrecondition
from mesh.core.view import ClusterView
from mesh.store.api import Condition, Delete, KeyAbsent, KVStore, ModRevisionIs, Operation, Put

Config = dict[str, object]


class LiveSettings:
    """``on_change`` is called when the view has been told of a change made here."""

    def __init__(self, store: KVStore, view: ClusterView, on_change: Callable[[], None]) -> None:
        self._store = store
        self._view = view
        self._on_change = on_change

    async def change(
        self, name: str, changed: Callable[[Config], Config], *, reset: bool = False
    ) -> Config:
        """Write ``changed(what stands there)`` and return it; an empty object deletes the key.

        ``reset``: as if nothing stood there. Raises what ``changed`` raises, FailedPrecondition
        where what stands there cannot be read, StoreUnavailable.
        """
        key = registry.config_key(name)
        for _ in range(MAX_TRIES):
            found = await self._store.get(key)
            config: Config = {}
            if found is not None and not reset:
                try:
                    config = registry.decode_config(name, found.value)
                except registry.RecordError as error:
                    raise FailedPrecondition(f"{error.message}; replace it as a whole") from error
            wanted = changed(config)
            condition: Condition = (
                KeyAbsent(key) if found is None else ModRevisionIs(key, found.mod_revision)
            )
            write: Operation = Put(key, registry.encode_config(wanted)) if wanted else Delete(key)
            if (await self._store.txn([condition], [write])).succeeded:
                if wanted:
                    self._view.put_config(name, wanted)
                else:
                    self._view.delete_config(name)
                self._on_change()
                return wanted
        raise contended(key)
