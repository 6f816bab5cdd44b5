"""Calls to etcd over gRPC: connections, failover, time-outs, authentication, meaning of errors.

One channel an endpoint. A call goes to an endpoint that is connected, the one that worked last
first; where that fails the next is tried. What certainly was not sent is tried again, and so is
what may be repeated (``idempotent``); a write that may have arrived is not, and raises
``StoreUnavailable``. Every call has a time-out; a stream has one for each answer it waits for and
is watched by HTTP/2 keep-alive in between.

It knows nothing of keys, prefixes or records. Errors leave as those of ``mesh.store.api``.
"""

from __future__ import annotations

import asyncio
import random
import re
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final, NoReturn

import grpc
import grpc.aio

from mesh.core.errors import FailedPrecondition, InvalidArgument
from mesh.store.api import LeaseNotFound, StoreDenied, StoreFull, StoreUnavailable
from mesh.store.etcd_options import EtcdOptions, split_endpoint
from protos import etcd_pb2

# Tries of one call beside one for every endpoint: enough to ride over one lost connection.
_EXTRA_TRIES: Final = 2
_PROBE_S: Final = 0.1  # for a call that is expected to fail at once
# What gRPC puts in front of a reason: its own code, and the address that the message has anyway.
_WHERE: Final = re.compile(r"^[A-Z_]+: (?:ipv4|ipv6|unix):\S+: ")


@dataclass(frozen=True, slots=True)
class Method:
    """One of etcd's rpcs."""

    path: str
    request: Any
    response: Any
    streaming: bool = False


RANGE: Final = Method("/etcdserverpb.KV/Range", etcd_pb2.RangeRequest, etcd_pb2.RangeResponse)
PUT: Final = Method("/etcdserverpb.KV/Put", etcd_pb2.PutRequest, etcd_pb2.PutResponse)
DELETE_RANGE: Final = Method(
    "/etcdserverpb.KV/DeleteRange", etcd_pb2.DeleteRangeRequest, etcd_pb2.DeleteRangeResponse
)
TXN: Final = Method("/etcdserverpb.KV/Txn", etcd_pb2.TxnRequest, etcd_pb2.TxnResponse)
COMPACT: Final = Method(
    "/etcdserverpb.KV/Compact", etcd_pb2.CompactionRequest, etcd_pb2.CompactionResponse
)
WATCH: Final = Method(
    "/etcdserverpb.Watch/Watch", etcd_pb2.WatchRequest, etcd_pb2.WatchResponse, streaming=True
)
LEASE_GRANT: Final = Method(
    "/etcdserverpb.Lease/LeaseGrant", etcd_pb2.LeaseGrantRequest, etcd_pb2.LeaseGrantResponse
)
LEASE_REVOKE: Final = Method(
    "/etcdserverpb.Lease/LeaseRevoke", etcd_pb2.LeaseRevokeRequest, etcd_pb2.LeaseRevokeResponse
)
LEASE_KEEP_ALIVE: Final = Method(
    "/etcdserverpb.Lease/LeaseKeepAlive",
    etcd_pb2.LeaseKeepAliveRequest,
    etcd_pb2.LeaseKeepAliveResponse,
    streaming=True,
)
LEASE_TIME_TO_LIVE: Final = Method(
    "/etcdserverpb.Lease/LeaseTimeToLive",
    etcd_pb2.LeaseTimeToLiveRequest,
    etcd_pb2.LeaseTimeToLiveResponse,
)
AUTHENTICATE: Final = Method(
    "/etcdserverpb.Auth/Authenticate", etcd_pb2.AuthenticateRequest, etcd_pb2.AuthenticateResponse
)
STATUS: Final = Method(
    "/etcdserverpb.Maintenance/Status", etcd_pb2.StatusRequest, etcd_pb2.StatusResponse
)
_METHODS: Final = (
    RANGE,
    PUT,
    DELETE_RANGE,
    TXN,
    COMPACT,
    WATCH,
    LEASE_GRANT,
    LEASE_REVOKE,
    LEASE_KEEP_ALIVE,
    LEASE_TIME_TO_LIVE,
    AUTHENTICATE,
    STATUS,
)


class Compacted(Exception):
    """The revision that was asked for is history that etcd no longer has."""


class LeaseExists(Exception):
    """A lease of the id that we chose is there: an earlier try of the same call made it."""


class _TokenRefused(Exception):
    """etcd no longer knows our token (it restarted, or the token's time is over)."""


def meaning_of(error: grpc.aio.AioRpcError, what: str, endpoint: str) -> Exception:
    """The error of ours for one of gRPC's. ``what`` is for the message: ``put of 'models/a'``."""
    code = error.code()
    details = error.details() or code.name
    text = f"etcd at {endpoint} refused {what}: {details}"
    if "database space exceeded" in details:
        return StoreFull(
            f"etcd at {endpoint} has used up its space quota (alarm NOSPACE) and refused {what}: "
            "compact and defragment it, then `etcdctl alarm disarm`, or raise "
            "--quota-backend-bytes"
        )
    if "requested lease not found" in details:
        return LeaseNotFound(text)
    if "lease already exists" in details:
        return LeaseExists(text)
    if code is grpc.StatusCode.OUT_OF_RANGE and "compacted" in details:
        return Compacted(text)
    if "invalid auth token" in details or "revision of auth store is old" in details:
        return _TokenRefused(text)
    if code in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED) or any(
        sign in details for sign in ("authentication failed", "user name is empty", "is not enabl")
    ):
        return StoreDenied(f"{text} (check the etcd user, password and role)")
    if code is grpc.StatusCode.INVALID_ARGUMENT:
        return InvalidArgument(text)
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return FailedPrecondition(f"{text}: this is no etcd with the v3 API")
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return StoreUnavailable(f"etcd at {endpoint} did not answer {what} in time")
    return StoreUnavailable(f"etcd at {endpoint} cannot be reached for {what}: {details}")


class _Endpoint:
    """One etcd member: its channel and the callables on it."""

    def __init__(self, address: str, options: EtcdOptions) -> None:
        self.address = address
        arguments = [
            ("grpc.max_receive_message_length", -1),
            ("grpc.max_send_message_length", -1),
            ("grpc.keepalive_time_ms", options.keepalive_time_ms),
            ("grpc.keepalive_timeout_ms", options.keepalive_timeout_ms),
            ("grpc.http2.max_pings_without_data", 0),
            ("grpc.initial_reconnect_backoff_ms", options.backoff_min_ms),
            ("grpc.min_reconnect_backoff_ms", options.connect_timeout_ms),
            ("grpc.max_reconnect_backoff_ms", options.backoff_max_ms // 2),
            # No channel shares a connection with another store of this process.
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.enable_http_proxy", 0),
            ("grpc.enable_retries", 0),
        ]
        tls = options.tls
        self._tls = tls is not None
        if tls is None:
            self.channel = grpc.aio.insecure_channel(address, options=arguments)
        else:
            if tls.server_name:
                arguments.append(("grpc.ssl_target_name_override", tls.server_name))  # type: ignore[arg-type]
            credentials = grpc.ssl_channel_credentials(tls.ca, tls.key, tls.certificate)
            self.channel = grpc.aio.secure_channel(address, credentials, options=arguments)
        self.callables: dict[str, Any] = {}
        for method in _METHODS:
            make = self.channel.stream_stream if method.streaming else self.channel.unary_unary
            self.callables[method.path] = make(
                method.path,
                request_serializer=method.request.SerializeToString,
                response_deserializer=method.response.FromString,
            )

    @property
    def connected(self) -> bool:
        return bool(self.channel.get_state() is grpc.ChannelConnectivity.READY)

    async def connect(self, timeout_s: float) -> None:
        """Until connected. Raises StoreUnavailable; nothing was sent then.

        A channel that has failed stays in TRANSIENT_FAILURE until it is connected, and tries
        again by itself: waiting here would only hold up the next endpoint.
        """
        state = self.channel.get_state(try_to_connect=True)
        if state is grpc.ChannelConnectivity.READY:
            return
        try:
            async with asyncio.timeout(timeout_s):
                while state is not grpc.ChannelConnectivity.READY:
                    if state is grpc.ChannelConnectivity.TRANSIENT_FAILURE:
                        await self._raise_why()
                    else:
                        await self.channel.wait_for_state_change(state)
                    state = self.channel.get_state(try_to_connect=True)
        except TimeoutError:
            raise StoreUnavailable(
                f"etcd at {self.address} did not accept a connection within {timeout_s:.1f} s"
            ) from None
        except grpc.aio.UsageError:
            raise StoreUnavailable("the store client is closed") from None

    async def _raise_why(self) -> None:
        """Raises StoreUnavailable with the reason that the last connection failed for.

        gRPC tells it by a call's error only, which comes at once on a failed channel. Returns where
        the channel is connected by now.
        """
        probe = self.callables[STATUS.path](STATUS.request(), timeout=_PROBE_S)
        try:
            await probe
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            raise StoreUnavailable("the store client is closed") from None
        except grpc.aio.AioRpcError as error:
            reason = (error.details() or "").rpartition("last error: ")[2]
            reason = _WHERE.sub("", reason).removesuffix(": OK").rstrip(".")
            if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                reason, hint = "no answer", ""
            elif "remote host" in reason:
                hint = ""
            elif self._tls:
                hint = " (TLS: check the authorities, our certificate and key, and etcd's name)"
            else:
                hint = " (does it expect TLS?)" if reason == "Socket closed" else ""
            raise StoreUnavailable(
                f"etcd at {self.address} refuses connections: {reason}{hint}"
            ) from None


async def _only(request: Any) -> AsyncIterator[Any]:
    """The one request of a stream that then stays open: etcd ends a half-closed one.

    Not ``call.write``: in grpcio that waits for ever when the call is cancelled as it starts.
    """
    yield request
    await asyncio.Event().wait()


class EtcdStream:
    """The answers of one bidirectional call, each with a time-out; its end is an error."""

    def __init__(self, call: Any, what: str, endpoint: str) -> None:
        self._call = call
        self._what = what
        self._endpoint = endpoint

    async def read(self, timeout_s: float | None = None) -> Any:
        """The next message. Raises StoreUnavailable when the stream has ended or is silent."""
        try:
            async with asyncio.timeout(timeout_s):
                message = await self._call.read()
        except TimeoutError:
            raise StoreUnavailable(
                f"etcd at {self._endpoint} did not answer {self._what} in time"
            ) from None
        except grpc.aio.AioRpcError as error:
            raise meaning_of(error, self._what, self._endpoint) from error
        if message is grpc.aio.EOF:
            await self._raise_end()
        return message

    async def _raise_end(self) -> NoReturn:
        details = f"{await self._call.code()}: {await self._call.details()}"
        raise StoreUnavailable(f"etcd at {self._endpoint} ended {self._what}: {details}")


class EtcdRpc:
    """See the module's docstring."""

    def __init__(self, options: EtcdOptions) -> None:
        self.options = options
        self._endpoints = [_Endpoint(split_endpoint(e), options) for e in options.endpoints]
        self._current = 0
        self._token = ""
        self._token_lock = asyncio.Lock()
        self._closed = asyncio.Event()
        self._open_calls: set[Any] = set()

    @property
    def closed(self) -> bool:
        return self._closed.is_set()

    @property
    def endpoint_text(self) -> str:
        """For messages."""
        return ",".join(endpoint.address for endpoint in self._endpoints)

    def backoff_s(self, failures: int) -> float:
        """The pause after so many failures in a row: doubling, bounded, half of it by chance."""
        options = self.options
        bound_ms = min(options.backoff_max_ms, options.backoff_min_ms << min(failures, 16))
        return bound_ms * random.uniform(0.5, 1.0) / 1_000

    async def pause(self, failures: int) -> None:
        """Sleep for the backoff, or until closed."""
        try:
            async with asyncio.timeout(self.backoff_s(failures)):
                await self._closed.wait()
        except TimeoutError:
            return

    async def call(
        self, method: Method, request: Any, what: str, *, idempotent: bool, timeout_s: float = 0.0
    ) -> Any:
        """One unary call, with its tries, within one time-out (the option's unless given)."""
        loop = asyncio.get_running_loop()
        deadline_s = loop.time() + (timeout_s or self.options.call_timeout_ms / 1_000)
        failures = 0
        token_renewed = False
        while True:
            endpoint = self._choose()
            sent = False
            try:
                metadata = await self._metadata(endpoint)
                await endpoint.connect(self._share(deadline_s - loop.time(), connecting=True))
                sent = True
                return await self._unary(
                    endpoint, method, request, what, metadata, self._share(deadline_s - loop.time())
                )
            except _TokenRefused as error:
                self._token = ""
                if token_renewed:
                    raise StoreDenied(str(error)) from error
                token_renewed = True
            except StoreFull:
                raise
            except StoreUnavailable:
                self._avoid(endpoint)
                failures += 1
                used_up = failures >= len(self._endpoints) + _EXTRA_TRIES
                pause_s = self.backoff_s(failures)
                late = loop.time() + pause_s >= deadline_s
                if self.closed or used_up or late or (sent and not idempotent):
                    raise
                await asyncio.sleep(pause_s)

    def _share(self, left_s: float, *, connecting: bool = False) -> float:
        """One try's part of the time that is left: a silent member must not use it all up."""
        share_s = left_s if len(self._endpoints) == 1 else left_s / 2
        if connecting:
            share_s = min(share_s, self.options.connect_timeout_ms / 1_000)
        return max(share_s, 0.001)

    async def _unary(
        self,
        endpoint: _Endpoint,
        method: Method,
        request: Any,
        what: str,
        metadata: Sequence[tuple[str, str]] | None,
        timeout_s: float,
    ) -> Any:
        call: Any = None
        try:
            call = endpoint.callables[method.path](request, timeout=timeout_s, metadata=metadata)
            self._open_calls.add(call)
            return await call
        except grpc.aio.AioRpcError as error:
            raise meaning_of(error, what, endpoint.address) from error
        except grpc.aio.UsageError:
            raise StoreUnavailable("the store client is closed") from None
        except asyncio.CancelledError:
            self._raise_if_closed()
            raise
        finally:
            self._open_calls.discard(call)

    def _raise_if_closed(self) -> None:
        """``close`` cancels the calls in flight: that is no cancel of the task that waits."""
        task = asyncio.current_task()
        if self.closed and not (task is not None and task.cancelling()):
            raise StoreUnavailable("the store client is closed") from None

    @asynccontextmanager
    async def stream(self, method: Method, request: Any, what: str) -> AsyncIterator[EtcdStream]:
        """An open stream to one member, cancelled at the end. Failures make that member avoided."""
        endpoint = self._choose()
        call: Any = None
        try:
            metadata = await self._metadata(endpoint) or []
            await endpoint.connect(self.options.connect_timeout_ms / 1_000)
            # A member that has lost its leader ends the stream instead of keeping it silent.
            metadata.append(("hasleader", "true"))
            call = endpoint.callables[method.path](_only(request), metadata=metadata)
            self._open_calls.add(call)
            yield EtcdStream(call, what, endpoint.address)
        except _TokenRefused as error:
            self._token = ""
            raise StoreUnavailable(str(error)) from error
        except StoreUnavailable:
            self._avoid(endpoint)
            raise
        except asyncio.CancelledError:
            self._raise_if_closed()
            raise
        finally:
            self._open_calls.discard(call)
            if call is not None:
                call.cancel()

    def _choose(self) -> _Endpoint:
        """The current member, or where that is not connected one that is."""
        if self.closed:
            raise StoreUnavailable("the store client is closed")
        current = self._endpoints[self._current]
        if len(self._endpoints) > 1 and not current.connected:
            for index, endpoint in enumerate(self._endpoints):
                if endpoint.connected:
                    self._current = index
                    return endpoint
        return current

    def _avoid(self, endpoint: _Endpoint) -> None:
        if self._endpoints[self._current] is endpoint:
            self._current = (self._current + 1) % len(self._endpoints)

    async def _metadata(self, endpoint: _Endpoint) -> list[tuple[str, str]] | None:
        """The token, fetched when there is none; None where etcd asks for no user."""
        if not self.options.user:
            return None
        async with self._token_lock:
            if not self._token:
                await endpoint.connect(self.options.connect_timeout_ms / 1_000)
                request = etcd_pb2.AuthenticateRequest(
                    name=self.options.user, password=self.options.password
                )
                what = f"authentication of user {self.options.user!r}"
                timeout_s = self.options.call_timeout_ms / 1_000
                reply = await self._unary(endpoint, AUTHENTICATE, request, what, None, timeout_s)
                self._token = reply.token
            return [("token", self._token)]

    async def close(self) -> None:
        """Ends every call in flight with StoreUnavailable."""
        self._closed.set()
        for call in list(self._open_calls):
            call.cancel()
        for endpoint in self._endpoints:
            await endpoint.channel.close()
