"""A measured size goes into the model's record: the next load's prediction, wherever that is."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Final

from mesh import registry
from mesh.core.errors import MeshError
from mesh.core.types import ModelRecord
from mesh.store.api import KVStore, ModRevisionIs, Put

log = logging.getLogger(__name__)

# A measured size is written back when it differs by more than this share.
SIZE_CHANGE_SHARE: Final = 0.1
ATTEMPTS: Final = 3


def differs(record: ModelRecord, size_bytes: int) -> bool:
    known = record.size_bytes_measured
    return known is None or abs(known - size_bytes) > known * SIZE_CHANGE_SHARE


async def write_back(store: KVStore, model_id: str, size_bytes: int) -> None:
    """By compare-and-swap; gives up quietly, as the next load measures again."""
    key = registry.model_key(model_id)
    try:
        for _ in range(ATTEMPTS):
            item = await store.get(key)
            if item is None:
                return
            record = replace(
                registry.decode_model(model_id, item.value), size_bytes_measured=size_bytes
            )
            result = await store.txn(
                [ModRevisionIs(key, item.mod_revision)], [Put(key, registry.encode(record))]
            )
            if result.succeeded:
                return
    except MeshError as error:
        log.info("the size of %s was not written back: %s", model_id, error)
