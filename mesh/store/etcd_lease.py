"""A lease in etcd that keeps itself alive.

One task renews it at a third of its time, and sooner again while etcd does not answer. Only etcd
ends it: as long as etcd cannot be reached the lease may well live, and a restarted etcd gives every
lease its whole time anew. ``lost`` is therefore set when etcd says that the lease is gone, and
``remaining_ms`` tells a lock's holder what it may rely on without asking.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Final

from mesh.store.api import LeaseNotFound, StoreDenied, StoreUnavailable
from mesh.store.etcd_messages import KeySpace
from mesh.store.etcd_rpc import LEASE_KEEP_ALIVE, LEASE_REVOKE, LEASE_TIME_TO_LIVE, EtcdRpc
from protos import etcd_pb2

logger = logging.getLogger(__name__)

_RENEWALS_IN_TTL: Final = 3


class EtcdLease:
    """See ``mesh.store.api.Lease``."""

    def __init__(
        self, rpc: EtcdRpc, keys: KeySpace, lease_id: int, ttl_ms: int, granted_at_s: float
    ) -> None:
        self._rpc = rpc
        self._keys = keys
        self._lease_id = lease_id
        self._ttl_ms = ttl_ms
        self._lost = asyncio.Event()
        self._valid_until_s = granted_at_s + ttl_ms / 1_000
        self._task = asyncio.create_task(self._keep_alive(), name=f"etcd-lease-{lease_id:x}")

    @property
    def lease_id(self) -> int:
        return self._lease_id

    @property
    def ttl_ms(self) -> int:
        """As etcd granted it."""
        return self._ttl_ms

    @property
    def lost(self) -> bool:
        return self._lost.is_set()

    @property
    def remaining_ms(self) -> int:
        if self.lost:
            return 0
        return max(0, int((self._valid_until_s - asyncio.get_running_loop().time()) * 1_000))

    async def wait_lost(self) -> None:
        await self._lost.wait()

    async def keys(self) -> frozenset[str]:
        request = etcd_pb2.LeaseTimeToLiveRequest(ID=self._lease_id, keys=True)
        what = f"the keys of lease {self._lease_id:x}"
        reply = await self._rpc.call(LEASE_TIME_TO_LIVE, request, what, idempotent=True)
        if reply.TTL <= 0:
            raise LeaseNotFound(f"lease {self._lease_id:x} has expired")
        root = self._keys.root.encode()
        return frozenset(self._keys.relative(key) for key in reply.keys if key.startswith(root))

    async def revoke(self) -> None:
        """Its keys go at once. Raises StoreUnavailable; then they go when its time is over."""
        await self.stop()
        request = etcd_pb2.LeaseRevokeRequest(ID=self._lease_id)
        what = f"revoking lease {self._lease_id:x}"
        try:
            await self._rpc.call(LEASE_REVOKE, request, what, idempotent=True)
        except LeaseNotFound:
            return
        finally:
            self._valid_until_s = 0.0

    async def stop(self) -> None:
        """No more renewals."""
        self._task.cancel()
        await asyncio.wait([self._task])

    async def _keep_alive(self) -> None:
        loop = asyncio.get_running_loop()
        failures = 0
        while not self._rpc.closed:
            if failures:
                await self._rpc.pause(failures)
            else:
                await asyncio.sleep(self._ttl_ms / 1_000 / _RENEWALS_IN_TTL)
            asked_at_s = loop.time()
            try:
                ttl_s = await self._renew()
            except (StoreUnavailable, StoreDenied) as error:
                failures += 1
                if failures == 1:
                    logger.warning("lease %x is not renewed: %s", self._lease_id, error)
                continue
            if ttl_s <= 0:
                logger.warning("lease %x has expired in etcd", self._lease_id)
                self._lost.set()
                return
            if failures:
                logger.info("lease %x is renewed again", self._lease_id)
            failures = 0
            self._valid_until_s = asked_at_s + ttl_s

    async def _renew(self) -> int:
        """One renewal; returns the seconds that the lease now has, 0 when it is gone.

        A stream for each renewal costs little at this rate, and fails over as any call does.
        """
        timeout_s = min(self._rpc.options.call_timeout_ms, self._ttl_ms) / 1_000
        what = f"renewing lease {self._lease_id:x}"
        request = etcd_pb2.LeaseKeepAliveRequest(ID=self._lease_id)
        async with self._rpc.stream(LEASE_KEEP_ALIVE, request, what) as stream:
            reply = await stream.read(timeout_s)
            return int(reply.TTL)
