"""Which back end opens which location; the library of each comes with the first that needs it."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from puller.location import HttpLocation, LocalArchiveLocation, RemoteLocation
from puller.settings import PullerSettings
from puller.source import OpenSource, RemoteSource

if TYPE_CHECKING:
    from puller.stores import Stores


def open_backend(settings: PullerSettings) -> OpenSource:
    """Opens sources. What it gives may block (it imports and reads certificates)."""
    stores: list[Stores] = []
    importing = threading.Lock()

    def open_it(location: RemoteLocation) -> RemoteSource:
        if isinstance(location, LocalArchiveLocation):
            from puller.local_archive import LocalArchiveSource

            return LocalArchiveSource(location, settings)
        if isinstance(location, HttpLocation):
            from puller.http import open_http

            return open_http(location, settings)
        with importing:
            if not stores:
                from puller.stores import Stores

                stores.append(Stores(settings))
        return stores[0].open(location)

    return open_it
