"""Requests for models that run in other processes: passed on as they came, and their answers back.

Bounds, counts and errors are as in ``mesh.instance.executor``: at most ``max_concurrency`` of a
copy at once, ``max_queued_per_copy`` behind them, beyond that RESOURCE_EXHAUSTED with the trailer
``mesh-error: overloaded``. A stream counts as one from its start to its end, however much goes
through it. What the process answers is the model's own and goes to the client
unchanged, but for the name that it used. A unary call makes no task; a stream makes two.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from time import monotonic, perf_counter_ns
from typing import Final, Protocol

from mesh.core.errors import Code, Internal, MeshError, ResourceExhausted
from mesh.core.policy import Policy
from mesh.instance.executor import NOT_HERE, OVERLOADED
from mesh.instance.servable import Servable
from mesh.metrics import InstanceMetrics
from mesh.oip.protobuf_fields import read_varint
from mesh.runtimes.api import ModelLost, RemoteModel
from mesh.wire import hpack
from mesh.wire.client import Begun, Reply, RpcError
from mesh.wire.head import Field, RequestHead
from mesh.wire.messages import Metadata
from mesh.wire.server import StreamCall

log = logging.getLogger(__name__)

INFERENCE_SERVICE: Final = "/inference.GRPCInferenceService/"
_MESH_PREFIXES: Final = (b"mm-", b"mesh-")
# Of a reply: gRPC's and HTTP's own, which are written anew.
_OWN_FIELDS: Final = frozenset(
    {b"content-type", b"grpc-status", b"grpc-message", b"grpc-encoding", b"grpc-accept-encoding"}
)


class CarriedCall(Protocol):
    """A client's call (``ServerCall``), or what stands for it."""

    on_cancel: Callable[[], None] | None

    @property
    def head(self) -> RequestHead: ...

    @property
    def deadline_s(self) -> float: ...

    @property
    def cancelled(self) -> bool: ...

    def reply(self, message: bytes, *, initial: Metadata = (), trailers: Metadata = ()) -> None: ...

    def fail(self, error: MeshError, *, trailers: Metadata = ()) -> None: ...


class Carried:
    """One unary request on its way."""

    __slots__ = ("arrived_ns", "begun", "call", "message", "method", "path", "servable")

    def __init__(
        self, servable: Servable, call: CarriedCall, message: bytes, path: str, method: str
    ) -> None:
        self.servable = servable
        self.call = call
        self.message = message
        self.path = path
        self.method = method
        self.arrived_ns = perf_counter_ns()
        self.begun: Begun | None = None


# In a copy's queue: a unary request, or a stream's turn.
Waiting = Carried | asyncio.Future[None]


class Carrier:
    """See the module's docstring; the callbacks are those of ``Executor``."""

    def __init__(
        self,
        policy: Policy,
        metrics: InstanceMetrics,
        clock_offset_ms: int,
        *,
        on_idle: Callable[[str], None],
        idle_wanted: Callable[[], bool],
        on_lost: Callable[[str], None],
    ) -> None:
        self.use_policy(policy)
        self._metrics = metrics
        self._offset_ms = clock_offset_ms
        self._on_idle = on_idle
        self._idle_wanted = idle_wanted
        self._on_lost = on_lost
        self._loop = asyncio.get_running_loop()
        self.requests = 0  # since the start
        self.queued = 0
        self.running = 0

    def use_policy(self, policy: Policy) -> None:
        self._max_queued = policy.max_queued_per_copy

    @property
    def busy(self) -> int:
        """Requests that have not been answered."""
        return self.queued + self.running

    # ---- unary ----

    def unary(self, servable: Servable, call: CarriedCall, message: bytes, path: str) -> None:
        """Answers through ``call``, later."""
        remote = servable.remote
        assert remote is not None
        carried = Carried(servable, call, message, path, path.rpartition("/")[2])
        self._arrived(servable)
        refusal = remote.admit(path)
        if refusal is not None:
            self._fail(carried, refusal)
            return
        overload = self._overload(servable)
        if overload is not None:
            self._fail(carried, overload, OVERLOADED)
            return
        servable.use.in_flight += 1
        if servable.running < servable.max_concurrency:
            self._start(carried)
        else:
            self.queued += 1
            servable.carried.append(carried)

    def _arrived(self, servable: Servable) -> None:
        self.requests += 1
        use = servable.use
        use.last_used_at_ms = self._offset_ms + perf_counter_ns() // 1_000_000
        use.uses += 1

    def _start(self, carried: Carried) -> None:
        servable, call = carried.servable, carried.call
        remote = servable.remote
        assert remote is not None
        self._take_place(servable)
        try:
            message = remote.request(carried.path, carried.message)
            block = _request_block(call.head, servable.model_id, remote)
        except MeshError as error:
            # Later, or a queue full of such requests would be as many calls deep.
            self._loop.call_soon(self._ended, carried, error)
            return
        except Exception as error:
            log.exception("a request could not be passed on to model %r", servable.model_id)
            defect = Internal(f"the request could not be passed on: {error}")
            self._loop.call_soon(self._ended, carried, defect)
            return
        call.on_cancel = lambda: self._cancelled(carried)
        carried.begun = remote.channel.begin(
            carried.path,
            message,
            block,
            call.deadline_s,
            lambda outcome: self._answered(carried, outcome),
        )

    def _cancelled(self, carried: Carried) -> None:
        if carried.begun is not None:
            carried.begun.cancel()
        self._leave(carried.servable)

    def _answered(self, carried: Carried, outcome: Reply | RpcError) -> None:
        call, remote = carried.call, carried.servable.remote
        assert remote is not None
        call.on_cancel = None
        if isinstance(outcome, RpcError):
            error = remote.error(carried.path, outcome)
            own = outcome.trailers if error.code == outcome.code else ()
            self._ended(carried, error, _passed_on(own, remote))
            return
        name = _client_name(call.head, carried.path, carried.message)
        try:
            message = remote.reply(carried.path, outcome.message, name)
        except MeshError as error:
            self._ended(carried, error)
            return
        call.reply(
            message,
            initial=_passed_on(outcome.initial, remote),
            trailers=_passed_on(outcome.trailers, remote),
        )
        ended_ns = perf_counter_ns()
        statistics = carried.servable.statistics
        statistics.success_count += 1
        statistics.success_ns += ended_ns - carried.arrived_ns
        statistics.queue_count += 1
        statistics.infer_ns += ended_ns - carried.arrived_ns
        self._metrics.invoke_done(
            carried.method,
            0,
            (ended_ns - carried.arrived_ns) / 1e6,
            carried.servable.model_id,
        )
        self._leave(carried.servable)

    def _ended(self, carried: Carried, error: MeshError, trailers: Metadata = ()) -> None:
        self._fail(carried, error, trailers)
        self._leave(carried.servable)

    def _fail(self, carried: Carried, error: MeshError, trailers: Metadata = ()) -> None:
        servable = carried.servable
        spent_ns = perf_counter_ns() - carried.arrived_ns
        servable.statistics.fail_count += 1
        servable.statistics.fail_ns += spent_ns
        if isinstance(error, ModelLost):
            self._on_lost(servable.model_id)
            trailers = NOT_HERE
        carried.call.fail(error, trailers=trailers)
        self._metrics.invoke_done(
            carried.method, int(error.code), spent_ns / 1e6, servable.model_id
        )

    def _overload(self, servable: Servable) -> MeshError | None:
        """Why there is no place for one more, not even to wait; or None."""
        waiting = servable.running + len(servable.carried)
        if waiting < servable.max_concurrency + self._max_queued:
            return None
        return ResourceExhausted(
            f"model {servable.model_id!r} has {waiting} requests waiting or running on this "
            "instance; retry later",
            retry_after_ms=100,
        )

    def _leave(self, servable: Servable) -> None:
        """One request less; the next that waits takes its place."""
        self.running -= 1
        servable.running -= 1
        self._end_use(servable)
        self._fill_places(servable)

    def _fill_places(self, servable: Servable) -> None:
        while servable.carried and servable.running < servable.max_concurrency:
            waiting = servable.carried.popleft()
            self.queued -= 1
            if isinstance(waiting, asyncio.Future):
                if not waiting.cancelled():
                    self._take_place(servable)
                    waiting.set_result(None)
            elif waiting.call.cancelled or waiting.call.deadline_s <= monotonic():
                self._end_use(servable)  # its own deadline answers, or has answered
            else:
                self._start(waiting)

    def _take_place(self, servable: Servable) -> None:
        self.running += 1
        servable.running += 1

    def _end_use(self, servable: Servable) -> None:
        servable.use.in_flight -= 1
        if not servable.use.in_flight and self._idle_wanted():
            self._on_idle(servable.model_id)

    # ---- streams ----

    async def stream(
        self, servable: Servable, call: StreamCall, path: str, first: bytes | None = None
    ) -> None:
        """Messages both ways until the process ends the call. ``first``: one that was taken from
        ``call`` already. Raises MeshError."""
        remote = servable.remote
        assert remote is not None
        refusal = remote.admit(path)
        if refusal is not None:
            raise refusal
        self._arrived(servable)
        overload = self._overload(servable)
        servable.use.in_flight += 1
        started_ns, code, placed = perf_counter_ns(), 0, False
        try:
            if overload is not None:
                code = int(overload.code)
                call.fail(overload, trailers=OVERLOADED)
                return
            await self._place(servable)
            placed = True
            await self._pump(servable, remote, call, path, first)
        except RpcError as error:
            found = remote.error(path, error)
            code = int(found.code)
            own = error.trailers if found.code == error.code else ()
            self._end_stream(servable, call, found, _passed_on(own, remote))
        except ModelLost as lost:
            code = int(lost.code)
            self._end_stream(servable, call, lost, ())
        except MeshError as error:
            code = int(error.code)
            raise
        except asyncio.CancelledError:
            code = int(Code.CANCELLED)
            raise
        finally:
            servable.statistics.success_count += code == 0
            servable.statistics.fail_count += code != 0
            elapsed_ms = (perf_counter_ns() - started_ns) / 1e6
            self._metrics.invoke_done(path.rpartition("/")[2], code, elapsed_ms, servable.model_id)
            if placed:
                self._leave(servable)
            else:
                self._end_use(servable)

    def _end_stream(
        self, servable: Servable, call: StreamCall, error: MeshError, trailers: Metadata
    ) -> None:
        if isinstance(error, ModelLost):
            self._on_lost(servable.model_id)
            trailers = NOT_HERE
        call.fail(error, trailers=trailers)

    async def _place(self, servable: Servable) -> None:
        """Return when the stream is one of those that its process takes at once."""
        if servable.running < servable.max_concurrency:
            self._take_place(servable)
            return
        turn = self._loop.create_future()
        self.queued += 1
        servable.carried.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn in servable.carried:
                servable.carried.remove(turn)
                self.queued -= 1
            elif not turn.cancelled():  # it came at the same moment
                self.running -= 1
                servable.running -= 1
                self._fill_places(servable)
            raise

    async def _pump(
        self,
        servable: Servable,
        remote: RemoteModel,
        call: StreamCall,
        path: str,
        first: bytes | None,
    ) -> None:
        head = call.head
        timeout_s = None if call.deadline_s == float("inf") else call.deadline_s - monotonic()
        metadata = [
            (name.decode("latin-1"), value)
            for name, value in _request_fields(head, servable.model_id, remote)
        ]
        stream = remote.channel.stream(path, metadata=metadata, timeout_s=timeout_s)
        names = [head.vmodel_id or ""]

        async def send(message: bytes) -> None:
            if not names[0]:
                names[0] = _client_name(head, path, message)
            await stream.send(remote.request(path, message))

        async def requests() -> None:
            if first is not None:
                await send(first)
            async for message in call:
                await send(message)
            await stream.half_close()

        async def replies() -> None:
            async for message in stream:
                await call.send(remote.reply(path, message, names[0] or servable.model_id))

        sending, receiving = asyncio.ensure_future(requests()), asyncio.ensure_future(replies())
        try:
            await asyncio.wait({sending, receiving}, return_when=asyncio.FIRST_COMPLETED)
            wrong = sending.exception() if sending.done() else None
            # The client cancelled, or sent what cannot be passed on: no answer is to be waited
            # for. That the process takes no more is its own to explain, by how it ends the call.
            if wrong is not None and not isinstance(wrong, RpcError):
                raise wrong
            await receiving
        finally:
            sending.cancel()
            receiving.cancel()
            stream.cancel()
            await asyncio.gather(sending, receiving, return_exceptions=True)


def _request_fields(head: RequestHead, model_id: str, remote: RemoteModel) -> list[Field]:
    fields: list[Field] = [(b"mm-model-id", model_id.encode()), *head.metadata]
    if remote.internal:
        if head.vmodel_id is not None:
            fields.append((b"mm-vmodel-id", head.vmodel_id.encode()))
        fields += [field for field in head.fields if field[0].startswith(b"mesh-")]
    return fields


def _request_block(head: RequestHead, model_id: str, remote: RemoteModel) -> bytes:
    """Encoded once for each header block that clients send; ``relay_prefix`` is the head's place
    for what a relay makes of it."""
    block = head.relay_prefix
    if block is None or head.model_id is None:  # by the body: another request may name another
        block = head.relay_prefix = hpack.encode(_request_fields(head, model_id, remote))
    return block


def _passed_on(fields: tuple[Field, ...], remote: RemoteModel) -> Metadata:
    """The process's own metadata of a reply."""
    if len(fields) <= 1:
        return ()
    return [
        (name.decode("latin-1"), value)
        for name, value in fields
        if name[:1] != b":"
        and name not in _OWN_FIELDS
        and (remote.internal or not name.startswith(_MESH_PREFIXES))
    ]


def _client_name(head: RequestHead, path: str, message: bytes) -> str:
    """The name by which the client asked: its header's, else that of the message (field 1 of the
    protocol's requests), else the model's id."""
    if head.vmodel_id:
        return head.vmodel_id
    if path.startswith(INFERENCE_SERVICE) and message[:1] == b"\x0a":
        with contextlib.suppress(IndexError, UnicodeDecodeError):
            length, start = read_varint(message, 1)
            return message[start : start + length].decode()
    return head.model_id or ""
