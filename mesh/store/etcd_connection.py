"""ModelMesh's secret for etcd: the JSON of its key ``etcd_connection``, in etcd-java's format.

A wrong field is InvalidArgument with its name; a field that is unknown or without effect is a
warning. Neither shows what a secret field holds. Files that the JSON names are entries of the same
secret, so they lie beside it once it is mounted. Read once, at the start: a process that is to use
a changed secret is started anew.

Source: etcd-java's etcd-json-schema.md and EtcdClusterConfig. TLS is used where the endpoints are
https://, or say no scheme and there is a certificate; ``tls_mode`` (TLS, PLAINTEXT) says otherwise.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from mesh.core.errors import InvalidArgument
from mesh.manifest_fields import Fields, wrong
from mesh.store.etcd_options import EtcdOptions, EtcdTls, parse_endpoints, split_endpoint

DEFAULT_PORT: Final = 2379
_FILE_BYTES_MAX: Final = 1 << 20  # what a Kubernetes secret may hold

ReadEntry = Callable[[str], bytes]


@dataclass(frozen=True, slots=True)
class EtcdConnection:
    """``prefix`` is the first part of every key, "" where the file says none."""

    options: EtcdOptions
    prefix: str = ""
    warnings: tuple[str, ...] = ()


def load_etcd_connection(path: Path) -> EtcdConnection:
    """The file and those it names. Raises InvalidArgument, which begins with the path."""

    def read_entry(name: str) -> bytes:
        return _read(path.parent / name)

    try:
        return parse_etcd_connection(_read(path), read_entry)
    except OSError as error:
        raise InvalidArgument(f"{path}: {error.strerror}") from None
    except InvalidArgument as error:
        raise InvalidArgument(f"{path}: {error.message}") from None


def _read(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(_FILE_BYTES_MAX)


def parse_etcd_connection(text: bytes | str, read_entry: ReadEntry) -> EtcdConnection:
    """``read_entry`` gives the bytes of a file that is named, or raises OSError.

    Raises InvalidArgument.
    """
    try:
        said = json.loads(text)
    except ValueError:
        # The parser's own words may quote a password.
        raise InvalidArgument('expected JSON, as {"endpoints": "https://HOST:PORT"}') from None
    warnings: list[str] = []
    if not isinstance(said, dict):
        raise InvalidArgument("expected a JSON object")
    fields = Fields(said, "", warnings)
    endpoints, secure = _endpoints(fields)
    pems = _Pems(fields, read_entry, warnings)
    ca = pems.one("certificate")
    certificate, key = pems.one("client_certificate"), pems.one("client_key")
    if (certificate is None) != (key is None):
        raise InvalidArgument("client_certificate and client_key: expected both or neither")
    name = fields.text("override_authority") or fields.text("compose_deployment")
    fields.take("compose_deployment")
    mode = fields.text("tls_mode", choices=("TLS", "PLAINTEXT", "AUTO"))
    if secure is None:
        secure = ca is not None or certificate is not None
    secure = {"TLS": True, "PLAINTEXT": False}.get(mode, secure)
    if not secure and (ca or certificate):
        warnings.append("certificate: not used, as the endpoints are not https://")
    user, password = _secret(fields, "userid"), _secret(fields, "password")
    if bool(user) != bool(password):
        raise InvalidArgument("userid and password: expected both or neither")
    prefix = fields.text("root_prefix").strip("/")
    fields.close()
    scheme = "https" if secure else "http"
    options = EtcdOptions(
        tuple(f"{scheme}://{endpoint}" for endpoint in endpoints),
        user=user,
        password=password,
        tls=EtcdTls(ca, certificate, key, name) if secure else None,
    )
    return EtcdConnection(options, prefix, tuple(warnings))


def _endpoints(fields: Fields) -> tuple[tuple[str, ...], bool | None]:
    """HOST:PORT of each, and whether they are https; None: they do not say."""
    expected = "HOST:PORT, or several with commas"
    text = fields.text("endpoints", required=expected)
    if "@" in text:
        raise InvalidArgument("endpoints: a user and password belong into userid and password")
    found, schemes = [], set()
    for endpoint in parse_endpoints(text):
        scheme, separator, address = endpoint.rpartition("://")
        if separator:
            schemes.add(scheme)
        if scheme not in ("", "http", "https"):
            raise wrong("endpoints", f"{expected}, with https:// or http:// or neither", endpoint)
        address = address.rstrip("/")
        if ":" not in address.rpartition("]")[2]:
            address = f"{address}:{DEFAULT_PORT}"
        try:
            found.append(split_endpoint(address))
        except InvalidArgument:
            raise wrong("endpoints", expected, endpoint) from None
    if not found:
        raise wrong("endpoints", expected, text)
    if len(schemes) > 1:
        raise wrong("endpoints", "all of them https://, or none", text)
    return tuple(found), ("https" in schemes if schemes else None)


class _Pems:
    """Certificates and keys, each in the JSON or in a file that it names. The file counts."""

    def __init__(self, fields: Fields, read_entry: ReadEntry, warnings: list[str]) -> None:
        self._fields = fields
        self._read_entry = read_entry
        self._warnings = warnings

    def one(self, key: str) -> bytes | None:
        embedded = _secret(self._fields, key)
        name = self._fields.text(f"{key}_file")
        source, pem = key, embedded.encode()
        if name:
            try:
                source, pem = f"{key}_file", self._read_entry(name)
                if embedded:
                    self._warnings.append(f"{key}: not used, as {source} counts")
            except OSError as error:
                said = f"{key}_file: cannot read {name!r}: {error.strerror}"
                if not embedded:
                    raise InvalidArgument(said) from None
                self._warnings.append(f"{said}; {key} is used")
        if not name and not embedded:
            return None
        if b"-----BEGIN " not in pem:
            raise InvalidArgument(f"{source}: expected PEM, a text with -----BEGIN")
        return pem


def _secret(fields: Fields, key: str) -> str:
    """A text that no error shows; "" when absent."""
    value = fields.take(key)
    if value is not None and not isinstance(value, str):
        raise InvalidArgument(f"{key}: expected a string (put it in quotes)")
    return value or ""
