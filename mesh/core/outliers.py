"""Instances that do not answer: who is passed over, for how long, and how one comes back.

An instance is passed over

- while it is **silent**: a PING to it has not been answered. It is asked on, and comes back with
  the first byte;
- after a **connection failed**: there is nobody, or nobody who listens. It comes back when a
  connection could be made;
- after so many **failures in a row** (attempts that ended without an answer of the instance): it
  accepts, but does not do what it should. When its time is over one request is sent there as a
  probe: an answer takes it back, a failure passes it over for twice as long.

The first two are **down**: nothing can come of sending a request there. The third is a suspicion,
so it is bounded: not more than ``Policy.outlier_share_max`` of the instances, and never the last.

It must not call anything and has no clock: events come in with ``now_ms`` (of any steady clock),
what changed goes out as a ``Transition`` with its reason. One router's own view: nothing is shared.
"""

from __future__ import annotations

from dataclasses import dataclass

from mesh.core.policy import Policy

CONNECT_FAILED = "connect_failed"
SILENT = "silent"
FAILURES_IN_A_ROW = "failures_in_a_row"
PROBE_FAILED = "probe_failed"
ANSWERED = "answered"
# Doubling says nothing any more beyond this: it keeps the shift small.
_DOUBLINGS_MAX = 16


@dataclass(frozen=True, slots=True)
class Transition:
    """``kind`` is ``eject`` or ``readmit`` (decision kinds), ``reason`` one of the five above."""

    kind: str
    reason: str
    instance_id: str
    detail: str = ""


@dataclass(slots=True)
class Standing:
    """What is held against one instance; one with nothing against it has none."""

    failures: int = 0  # in a row
    silent: bool = False
    unreachable: bool = False  # no connection could be made
    ejections: int = 0  # in a row; 0: it is not ejected
    until_ms: int = 0  # ... and until then
    probed_at_ms: int | None = None  # its time is over, and a request is on its way to tell

    @property
    def down(self) -> bool:
        return self.silent or self.unreachable


class Outliers:
    """See the module's docstring. ``known`` is how many instances there are."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        # Empty while nothing is held against anybody: only then answers do not matter.
        self.standings: dict[str, Standing] = {}
        self._over: set[str] = set()  # ejected for failures, their time is over
        self.changes = 0  # grows whenever one of these three changes
        self.down: frozenset[str] = frozenset()
        self.avoided: frozenset[str] = frozenset()
        self.passed_over: frozenset[str] = frozenset()

    def use_policy(self, policy: Policy) -> None:
        self._policy = policy

    # ---- what happens -------------------------------------------------------------------------

    def connect_failed(self, instance_id: str, now_ms: int) -> Transition | None:
        """No connection could be made."""
        standing = self._standing(instance_id)
        again = standing.ejections > 0 and now_ms >= standing.until_ms
        if standing.ejections and not again:
            if not standing.unreachable:  # ejected for failures; now it is known to be gone
                standing.unreachable = True
                self._changed()
            return None
        standing.unreachable = True
        ejected = self._eject(instance_id, PROBE_FAILED if again else CONNECT_FAILED, now_ms)
        return None if standing.silent else ejected  # that has been told

    def failed(self, instance_id: str, now_ms: int, *, known: int) -> Transition | None:
        """An attempt there ended without an answer of the instance."""
        standing = self._standing(instance_id)
        standing.failures += 1
        if standing.ejections:
            if now_ms < standing.until_ms or standing.down:
                return None  # it was under way before
            return self._eject(instance_id, PROBE_FAILED, now_ms)
        if standing.failures < self._policy.outlier_failures or not self._may_eject(known):
            return None
        return self._eject(
            instance_id, FAILURES_IN_A_ROW, now_ms, f"{standing.failures} failures in a row"
        )

    def fell_silent(self, instance_id: str, quiet_ms: int) -> Transition | None:
        standing = self._standing(instance_id)
        if standing.silent:
            return None
        standing.silent = True
        self._changed()
        return Transition("eject", SILENT, instance_id, f"no answer for {quiet_ms} ms")

    def heard(self, instance_id: str) -> Transition | None:
        """Something came from an instance that was silent, or a connection to it was made."""
        standing = self.standings.get(instance_id)
        if standing is None or not standing.down:
            return None
        if standing.ejections and not standing.unreachable:
            standing.silent = False  # it is still passed over for its failures
            self._changed()
            return None
        return self._readmit(instance_id)

    def answered(self, instance_id: str, now_ms: int) -> Transition | None:
        """A request was answered there. Only its probe's answer takes one back that failed many:
        what was under way before says nothing new."""
        standing = self.standings.get(instance_id)
        if standing is None or standing.silent:
            return None
        if not standing.ejections:
            del self.standings[instance_id]
            return None
        if standing.unreachable or now_ms >= standing.until_ms:
            return self._readmit(instance_id)
        return None

    def lost_sight(self, instance_id: str, now_ms: int) -> None:
        """The connections that were silent are gone: whether it answers, the next one will tell."""
        standing = self.standings.get(instance_id)
        if standing is not None and standing.silent:
            standing.silent = False
            standing.unreachable = True
            standing.ejections = max(1, standing.ejections)
            standing.until_ms = now_ms
            self._changed()

    def forget(self, instance_id: str) -> None:
        """The instance is gone for good."""
        self.standings.pop(instance_id, None)
        self._over.discard(instance_id)
        if instance_id in self.passed_over:
            self._changed()

    # ---- coming back --------------------------------------------------------------------------

    def tick(self, now_ms: int) -> None:
        """See whose time is over; to be called a few times a second."""
        if not self.standings:
            return
        over = {
            instance_id
            for instance_id, standing in self.standings.items()
            if standing.ejections and not standing.down and now_ms >= standing.until_ms
        }
        if over != self._over:
            self._over = over
            self._changed()

    def to_connect(self, now_ms: int) -> tuple[str, ...]:
        """Instances to which a connection should be tried, to see whether they are back."""
        return tuple(
            instance_id
            for instance_id, standing in self.standings.items()
            if standing.unreachable and now_ms >= standing.until_ms
        )

    def wants_probe(self, instance_id: str, now_ms: int) -> bool:
        """Whether the next request may go to this instance, which is passed over otherwise."""
        standing = self.standings.get(instance_id)
        if instance_id not in self._over or standing is None:
            return False
        probed = standing.probed_at_ms
        return probed is None or now_ms - probed >= self._policy.outlier_eject_ms

    def probe_sent(self, instance_id: str, now_ms: int) -> None:
        """One is under way. When nothing is heard of it (its client went away) another may go."""
        self.standings[instance_id].probed_at_ms = now_ms

    @property
    def probing(self) -> frozenset[str]:
        """Those whose time is over, and which are to be probed."""
        return frozenset(self._over)

    # ---- within -------------------------------------------------------------------------------

    def _standing(self, instance_id: str) -> Standing:
        standing = self.standings.get(instance_id)
        if standing is None:
            standing = self.standings[instance_id] = Standing()
        return standing

    def _may_eject(self, known: int) -> bool:
        ejected = sum(1 for s in self.standings.values() if s.ejections and not s.down)
        return ejected + 1 <= self._policy.outlier_share_max * known and (
            len(self.passed_over) + 1 < known
        )

    def _eject(self, instance_id: str, reason: str, now_ms: int, detail: str = "") -> Transition:
        standing = self.standings[instance_id]
        policy = self._policy
        eject_ms = min(
            policy.outlier_eject_ms << min(standing.ejections, _DOUBLINGS_MAX),
            policy.outlier_eject_max_ms,
        )
        standing.ejections += 1
        standing.until_ms = now_ms + eject_ms
        standing.probed_at_ms = None
        self._over.discard(instance_id)
        self._changed()
        lasting = f"passed over for {eject_ms} ms"
        return Transition(
            "eject", reason, instance_id, f"{detail}, {lasting}" if detail else lasting
        )

    def _readmit(self, instance_id: str) -> Transition:
        del self.standings[instance_id]
        self._over.discard(instance_id)
        self._changed()
        return Transition("readmit", ANSWERED, instance_id)

    def _changed(self) -> None:
        self.changes += 1
        standings = self.standings.items()
        self.down = frozenset(i for i, s in standings if s.down)
        self.passed_over = frozenset(i for i, s in standings if s.down or s.ejections)
        self.avoided = self.passed_over - self._over
