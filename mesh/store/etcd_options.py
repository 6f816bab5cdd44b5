"""How etcd is reached: endpoints, TLS, a user, time-outs. Values only; no I/O, no gRPC.

What makes no sense together is InvalidArgument at construction. No secret is in a ``repr``, so that
settings can be logged.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from mesh.core.errors import InvalidArgument


@dataclass(frozen=True, slots=True)
class EtcdTls:
    """PEM bytes. Without ``ca`` the system's authorities are trusted."""

    ca: bytes | None = field(default=None, repr=False)
    certificate: bytes | None = field(default=None, repr=False)
    key: bytes | None = field(default=None, repr=False)
    server_name: str = ""  # the name to expect in the server's certificate, "" for the endpoint's


@dataclass(frozen=True, slots=True)
class EtcdOptions:
    """How to reach etcd. ``endpoints`` are ``host:port``, with or without ``http(s)://``."""

    endpoints: tuple[str, ...]
    user: str = ""
    password: str = field(default="", repr=False)
    tls: EtcdTls | None = None
    # An etcd that has not answered by then has lost its disk, its quorum or its network.
    call_timeout_ms: int = 5_000
    connect_timeout_ms: int = 2_000
    # A dead peer is noticed after the sum. etcd refuses pings more often than every 5 s.
    keepalive_time_ms: int = 10_000
    keepalive_timeout_ms: int = 5_000
    # Pauses between tries double from the first to the second, each with jitter.
    backoff_min_ms: int = 50
    backoff_max_ms: int = 2_000

    def __post_init__(self) -> None:
        if not self.endpoints:
            raise InvalidArgument("no etcd endpoint is given; expected host:port")
        secure = {endpoint.startswith("https://") for endpoint in self.endpoints}
        if True in secure and self.tls is None:
            raise InvalidArgument(
                f"etcd endpoint {self.endpoints[0]!r} is https, but no TLS options are given"
            )
        for endpoint in self.endpoints:
            split_endpoint(endpoint)
        if self.password and not self.user:
            raise InvalidArgument("an etcd password is given without a user")


def parse_endpoints(text: str) -> tuple[str, ...]:
    """``host:port,host:port`` as one writes it on a command line."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def split_endpoint(endpoint: str) -> str:
    """``host:port`` of an endpoint. Raises InvalidArgument."""
    address = endpoint.removeprefix("http://").removeprefix("https://").rstrip("/")
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65_536 or "/" in address:
        raise InvalidArgument(
            f"etcd endpoint {endpoint!r} is not host:port, for example 127.0.0.1:2379"
        )
    return address
