"""A decoded header block of a request, with what the mesh needs of it taken out once.

Heads are shared by every request of a connection that sends the same block, so they are read-only
but for ``relay_prefix``, which caches what a relay derives from them.
"""

from __future__ import annotations


class RequestHead:
    """``timeout_s`` is ``grpc-timeout`` in seconds, or None. ``metadata`` is everything that is
    neither a pseudo-header nor owned by gRPC or by the mesh, in order. ``model_id`` /
    ``vmodel_id`` come from ``mm-model-id`` / ``mm-vmodel-id`` (or their ``-bin`` forms, base64
    decoded), None when absent. ``fields`` is the whole block as received, pseudo-headers first."""

    __slots__ = (
        "authority",
        "encoding",
        "fields",
        "metadata",
        "model_id",
        "path",
        "relay_prefix",
        "timeout_s",
        "vmodel_id",
    )

    path: str
    authority: bytes
    fields: tuple[tuple[bytes, bytes], ...]
    metadata: tuple[tuple[bytes, bytes], ...]
    model_id: str | None
    vmodel_id: str | None
    timeout_s: float | None
    encoding: bytes  # grpc-encoding; b"identity" when absent
    relay_prefix: bytes | None

    def get(self, name: bytes) -> bytes | None:
        """The last value of a field, or None."""
        for field_name, value in reversed(self.fields):
            if field_name == name:
                return value
        return None
