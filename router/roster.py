"""Which other routers there are, and what they are asked: their decisions.

Routers share one address, so that a client cannot choose which of them it talks to. Each stands in
the store at ``routers/<router_id>`` under a lease of its own, with the address of its metrics
listener, and is asked there. Nothing that serves requests depends on this: while the store is away
the last known ones are asked, and one that does not answer is named with the reason.
"""

from __future__ import annotations

import asyncio
import logging
import re
import socket
from collections.abc import Mapping
from contextlib import suppress
from typing import Final

import aiohttp
import orjson

from mesh.core.errors import MeshError, Unavailable
from mesh.registry import ROUTERS_PREFIX, escape
from mesh.store.api import Delete, KeyValue, KVStore, Lease, Put, Snapshot

log = logging.getLogger(__name__)

PREFIX: Final = ROUTERS_PREFIX
# As long as an instance's: who is gone is not asked for longer than that.
TTL_MS: Final = 10_000
# The pause after the store refused or was away, before the next try to be written down.
_AGAIN_S: Final = 2.0
# Ten thousand decisions of the largest size; nobody needs as many.
_ANSWER_MAX_BYTES: Final = 16 * 1024 * 1024
# Nothing else of a URL: who writes to the store must not choose what a router asks for.
_HOST_AND_PORT: Final = re.compile(r"(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9._-]{1,253}):[0-9]{1,5}")
_ANYWHERE: Final = ("", "0.0.0.0", "::")


class Roster:
    """Run ``run()`` as a task; ``close()`` behind it."""

    def __init__(self, store: KVStore, router_id: str, *, ttl_ms: int = TTL_MS) -> None:
        self._store = store
        self._router_id = router_id
        self._ttl_ms = ttl_ms
        self._address = ""
        self._lease: Lease | None = None
        self._known: dict[str, str] = {}  # key -> address, ours too

    @property
    def others(self) -> dict[str, str]:
        """Addresses of the other routers' metrics listeners, by router."""
        mine = PREFIX + escape(self._router_id)
        return {
            key.removeprefix(PREFIX): address for key, address in self._known.items() if key != mine
        }

    def listens(self, host: str, port: int) -> None:
        """Where this router's metrics are; to be told before ``run``, or others cannot ask it."""
        name = socket.gethostname() if host in _ANYWHERE else host
        self._address = f"[{name}]:{port}" if ":" in name else f"{name}:{port}"

    async def run(self) -> None:
        """For ever."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._follow())
            if self._address:
                group.create_task(self._stand())

    async def _follow(self) -> None:
        async for step in self._store.watch(PREFIX):
            if isinstance(step, Snapshot):
                self._known = {item.key: _address(item) for item in step.items}
                continue
            for event in step.events:
                if isinstance(event, Delete):
                    self._known.pop(event.key, None)
                else:
                    self._known[event.key] = _address(event)

    async def _stand(self) -> None:
        key, value = PREFIX + escape(self._router_id), orjson.dumps({"metrics": self._address})
        while True:
            try:
                self._lease = lease = await self._store.lease(self._ttl_ms)
                await self._store.put(key, value, lease_id=lease.lease_id)
                await lease.wait_lost()
            except MeshError as error:
                log.debug("the roster of routers: %s", error.message)
                await self.close()  # a lease without its key is of no use
                await asyncio.sleep(_AGAIN_S)

    async def close(self) -> None:
        """Leave: the key goes with the lease."""
        lease, self._lease = self._lease, None
        if lease is not None:
            with suppress(MeshError):
                await lease.revoke()

    async def ask(self, router_id: str, path: str, query: Mapping[str, str]) -> bytes:
        """What that router answers at its metrics listener. Raises Unavailable."""
        address = self.others.get(router_id)
        if not address:
            raise Unavailable(f"router {router_id!r} tells no address")
        url = f"http://{address}{path}"
        try:
            async with (
                aiohttp.ClientSession(auto_decompress=False) as session,
                session.get(url, params=query, allow_redirects=False) as reply,
            ):
                if reply.status != 200:
                    raise Unavailable(f"{url}: HTTP {reply.status}")
                body = bytearray()
                async for part in reply.content.iter_any():
                    body += part
                    if len(body) > _ANSWER_MAX_BYTES:
                        raise Unavailable(f"{url}: more than {_ANSWER_MAX_BYTES} bytes")
        except (aiohttp.ClientError, OSError, ValueError) as error:  # ValueError: no host name
            raise Unavailable(f"{url}: {error}") from error
        return bytes(body)


def _address(item: KeyValue | Put) -> str:
    """ "" for a value that another version wrote differently, or that is no host and port."""
    try:
        address = str(orjson.loads(item.value)["metrics"])
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return ""
    return address if _HOST_AND_PORT.fullmatch(address) else ""
