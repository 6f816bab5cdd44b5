"""What goes before a load: the model's record is read and the copy is claimed, in one round trip.

While the store is away there is nobody to ask: then a load begins by the record that came with the
wish, without a claim, and the copy is published when the store is back (``mesh.instance.publisher``
is level-triggered). The price is that two instances may load one model; scaling trims that. Such
copies are remembered until the store has said that their models still are registered.

Bounds: the store has ``STORE_PATIENCE_S`` to answer, and none at all once it is known to be away.
A store that answers is always believed: a model that it does not know is not loaded, and no load
begins without a claim where a claim can be had. Errors that are not the store's absence are raised.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Final

from mesh import registry
from mesh.core.demand import predict_size_bytes
from mesh.core.errors import MeshError, NotFound
from mesh.core.policy import Policy
from mesh.core.types import CopyRecord, CopyState, ModelRecord
from mesh.instance.answers import LoadAnswer, LoadOutcome
from mesh.instance.clock import Clock
from mesh.instance.flights import Wish
from mesh.instance.publisher import Claim, ClaimedElsewhere, Publisher
from mesh.store.api import KeyValue, KVStore, LeaseNotFound, StoreUnavailable

log = logging.getLogger(__name__)

# An etcd under load answers in tens of milliseconds; one that elects a leader in a second or two. A
# request with a deadline of 10 s still gets its answer.
STORE_PATIENCE_S: Final = 3.0


@dataclass(frozen=True, slots=True)
class Ready:
    """The load may begin. ``revision`` is the claim's; 0 for one without a claim.
    ``record_revision`` is of the record's last change; 0 when it came with the wish."""

    record: ModelRecord
    revision: int
    claimed_at_ms: int
    record_revision: int = 0

    def record_after(self, told: tuple[int, ModelRecord | None] | None) -> ModelRecord | None:
        """The record to load by, after what a watch told meanwhile; None: it has been deleted."""
        if told is None or told[0] <= self.record_revision:
            return self.record
        if told[1] is None and not self.record_revision:
            return self.record  # it came along: the store is asked again, and that counts
        return told[1]


class Claims:
    """See the module's docstring."""

    def __init__(
        self, instance_id: str, store: KVStore, publisher: Publisher, clock: Clock
    ) -> None:
        self._instance_id = instance_id
        self._store = store
        self._publisher = publisher
        self._clock = clock
        self.unconfirmed: set[str] = set()  # loaded by records that the store has not confirmed

    async def claim(self, wish: Wish, policy: Policy) -> Ready | LoadAnswer:
        """Claimed, or why there is nothing to load here. Raises NotFound, StoreUnavailable,
        LeaseNotFound and what is wrong with the record."""
        copy = CopyRecord(
            wish.model_id,
            self._instance_id,
            CopyState.LOADING,
            size_bytes=_predicted_bytes(wish, policy),
            claimed_at_ms=self._clock.now_ms(),
        )
        if wish.record and self._publisher.away:
            return self._without(wish, copy, "the store is away")
        try:
            async with asyncio.timeout(STORE_PATIENCE_S):
                return await self._in_store(wish, copy)
        except (StoreUnavailable, TimeoutError) as error:
            if isinstance(error, TimeoutError):
                self._publisher.not_answered()
            why = str(error) or f"no answer from the store in {STORE_PATIENCE_S:g} s"
            if not wish.record:
                self._publisher.remove_copy(wish.model_id)
                raise StoreUnavailable(why) from error
            return self._without(wish, copy, why)

    async def _in_store(self, wish: Wish, copy: CopyRecord) -> Ready | LoadAnswer:
        try:
            item, claim = await self._ask(wish, copy)
        except LeaseNotFound:
            if not wish.record:
                raise  # the router knows more than we: elsewhere there is a lease
            await self._publisher.wait_lease()  # a new one is on its way
            item, claim = await self._ask(wish, copy)
        if isinstance(claim, ClaimedElsewhere):
            return LoadAnswer(
                LoadOutcome.CLAIMED_ELSEWHERE,
                f"model {wish.model_id!r} was claimed elsewhere in the meantime",
                claimed_instance_id=claim.instance_id,
                copy_revision=claim.copy_revision,
            )
        try:
            record, record_revision = self._record(wish, item)
        except BaseException:
            self._publisher.remove_copy(wish.model_id)
            raise
        return Ready(record, claim.revision, copy.claimed_at_ms, record_revision)

    async def _ask(
        self, wish: Wish, copy: CopyRecord
    ) -> tuple[KeyValue | BaseException | None, Claim]:
        item, claim = await asyncio.gather(
            self._store.get(registry.model_key(wish.model_id)),
            self._publisher.claim(copy, wish.revision),
            return_exceptions=True,
        )
        if isinstance(claim, BaseException):
            raise claim
        return item, claim

    def _record(self, wish: Wish, item: KeyValue | BaseException | None) -> tuple[ModelRecord, int]:
        """And the revision of its last change."""
        if isinstance(item, StoreUnavailable) and wish.record:
            # The claim went through, so the model was registered just now.
            self.unconfirmed.add(wish.model_id)
            return registry.decode_model(wish.model_id, wish.record), 0
        if isinstance(item, BaseException):
            raise item
        if item is None:
            raise NotFound(f"model {wish.model_id!r} is not registered")
        return registry.decode_model(wish.model_id, item.value), item.mod_revision

    def _without(self, wish: Wish, copy: CopyRecord, why: str) -> Ready:
        record = registry.decode_model(wish.model_id, wish.record)
        log.warning("loading %s without a claim: %s", wish.model_id, why)
        self.unconfirmed.add(wish.model_id)
        self._publisher.put_copy(copy)
        return Ready(record, 0, copy.claimed_at_ms)

    async def confirmed(self) -> AsyncIterator[tuple[str, ModelRecord | None]]:
        """What the store says of the models loaded without it; None: not registered.

        Ends early, to be called again, when the store is away again.
        """
        for model_id in tuple(self.unconfirmed):
            # Before the store is asked: a load that begins without it meanwhile counts anew.
            self.unconfirmed.discard(model_id)
            try:
                item = await self._store.get(registry.model_key(model_id))
                record = None if item is None else registry.decode_model(model_id, item.value)
            except registry.RecordError as error:
                log.warning("model record skipped: %s", error)
                continue
            except MeshError as error:
                self.unconfirmed.add(model_id)
                log.info("models loaded without the store are not confirmed yet: %s", error)
                return
            yield model_id, record


def _predicted_bytes(wish: Wish, policy: Policy) -> int:
    """What others count for the copy from now on. With 0 an empty instance would look empty however
    many loads are queued there, and would get all the others too."""
    if not wish.record:
        return policy.default_model_size_bytes
    try:
        return predict_size_bytes(registry.decode_model(wish.model_id, wish.record), policy)
    except registry.RecordError:
        return policy.default_model_size_bytes
