"""REST requests as the router relays them: the HTTP body is the message, metadata says the rest."""

from __future__ import annotations

from collections.abc import Sequence
from urllib.parse import unquote

from mesh.core.errors import InvalidArgument
from mesh.instance.forms import Encoded
from mesh.oip import rest
from mesh.oip.call import InferCall
from mesh.oip.tensors import InferCodec
from mesh.runtimes.api import Tensor
from mesh.wire.head import RequestHead

KINDS = ("v2-infer", "v1-predict")


class RestForm:
    """See ``Form``. Names are those of the URL."""

    __slots__ = ("header_length", "kind", "model_name", "model_version")

    def __init__(self, head: RequestHead, model_id: str) -> None:
        self.kind = _text(head, b"mesh-rest-kind", "")
        if self.kind not in KINDS:
            raise InvalidArgument(
                f"metadata mesh-rest-kind must be one of {', '.join(KINDS)}, not {self.kind!r}"
            )
        length = head.get(b"inference-header-content-length")
        self.header_length = rest.header_content_length(
            None if length is None else length.decode("latin-1")
        )
        self.model_name = _text(head, b"mesh-client-model-name", model_id)
        self.model_version = _text(head, b"mesh-client-model-version", "")

    def decode(self, codec: InferCodec, message: bytes) -> InferCall:
        if self.kind == "v1-predict":
            return rest.decode_v1(message, codec.metadata, model_name=self.model_name)
        return rest.decode_v2(
            message,
            self.header_length,
            codec.metadata,
            model_name=self.model_name,
            model_version=self.model_version,
        )

    def encode(self, codec: InferCodec, call: InferCall, tensors: Sequence[Tensor]) -> Encoded:
        if self.kind == "v1-predict":
            reply = rest.encode_v1(tensors)
        else:
            versions = codec.metadata.versions
            version = self.model_version or (versions[0] if versions else "")
            reply = rest.encode_v2(call, tensors, self.model_name, version)
        initial = [("mesh-http-content-type", reply.content_type)]
        if reply.json_bytes is not None:
            initial.append(("inference-header-content-length", str(reply.json_bytes)))
        return reply.body, initial


def _text(head: RequestHead, name: bytes, default: str) -> str:
    value = head.get(name)
    return default if value is None else unquote(value.decode("latin-1"))
