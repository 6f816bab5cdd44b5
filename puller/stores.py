"""Opens sources of the object stores, and keeps the stores used last.

Making one costs about 8 ms (the system's certificates), and a kept one has its connections open.
Blocks; used from several threads.
"""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import TYPE_CHECKING, Final, assert_never

from cachetools import LRUCache

from puller.azure import open_azure
from puller.gcs import open_gcs
from puller.location import AzureLocation, GcsLocation, S3Location, StoreLocation
from puller.object_store import StoreSource
from puller.s3 import open_s3, read_certificate
from puller.settings import PullerSettings

if TYPE_CHECKING:
    from obstore.store import ObjectStore

_STORES_MAX: Final = 32  # buckets times credentials in use; each holds a few connections


class Stores:
    def __init__(self, settings: PullerSettings) -> None:
        self._settings = settings
        self._mutex = threading.Lock()
        self._stores: LRUCache[StoreLocation, ObjectStore] = LRUCache(_STORES_MAX)

    def open(self, location: StoreLocation) -> StoreSource:
        key: StoreLocation = replace(location, prefix="")
        if isinstance(key, S3Location):
            # The certificate is part of the key: a renewed file makes a new store.
            key = replace(key, certificate_pem=key.certificate_pem or read_certificate(key))
        with self._mutex:
            store = self._stores.get(key)
            if store is None:
                store = self._stores[key] = self._open(key)
        return StoreSource(location, store, self._settings)

    def _open(self, key: StoreLocation) -> ObjectStore:
        match key:
            case S3Location():
                return open_s3(key, self._settings)
            case GcsLocation():
                return open_gcs(key, self._settings)
            case AzureLocation():
                return open_azure(key, self._settings)
            case _:
                assert_never(key)
