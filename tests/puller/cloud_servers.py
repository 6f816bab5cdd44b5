"""Small servers that speak what a pull needs of Google Cloud Storage and of Azure Blob Storage.

They are on real sockets and check what they are sent: Google's a service account's signed token
(RS256 over header and claims), Azure's the SharedKey signature, reckoned here from the providers'
documents and not from the library that signs. No emulator of either comes in a package that CI
could install in a few seconds.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from urllib.parse import unquote

from aiohttp import web
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa

from tests.puller.fakes import etag_of

DATE = "Thu, 01 Jan 2026 00:00:00 GMT"


@dataclass
class CloudServer:
    """``objects`` of one bucket; ``bucket`` may go away while it is read."""

    bucket: str
    objects: dict[str, bytes]
    gone_after: int = 1 << 30  # requests
    requests: int = 0
    denied: list[str] = field(default_factory=list)

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.requests += 1
        reason = self.why_denied(request)
        if reason:
            self.denied.append(reason)
            return self.error(403, "AccessDenied")
        key = unquote(self.key_of(request))
        if self.requests > self.gone_after or not self.is_here(request):
            return self.error(404, self.no_bucket)
        if not key:
            return web.Response(
                body=self.listing(request.query.get("prefix", "")), content_type="application/xml"
            )
        if key not in self.objects:
            return self.error(404, self.no_object)
        data, status, headers = self.objects[key], 200, {"ETag": self.etag(key)}
        headers |= {"Last-Modified": DATE, "Accept-Ranges": "bytes"}
        asked = request.headers.get("Range") or request.headers.get("x-ms-range")
        if request.headers.get("If-Match", self.etag(key)) != self.etag(key):
            return self.error(412, "ConditionNotMet")
        if asked:
            first, _, last = asked.removeprefix("bytes=").partition("-")
            end = min(int(last) + 1, len(data))
            headers["Content-Range"] = f"bytes {first}-{end - 1}/{len(data)}"
            status, data = 206, data[int(first) : end]
        return web.Response(status=status, body=data, headers=headers)

    no_bucket = "NoSuchBucket"
    no_object = "NoSuchKey"

    def error(self, status: int, code: str) -> web.Response:
        body = f'<?xml version="1.0"?><Error><Code>{code}</Code></Error>'
        return web.Response(status=status, text=body, content_type="application/xml")

    def why_denied(self, request: web.Request) -> str:
        raise NotImplementedError

    def key_of(self, request: web.Request) -> str:
        raise NotImplementedError

    def is_here(self, request: web.Request) -> bool:
        raise NotImplementedError

    def listing(self, prefix: str) -> bytes:
        raise NotImplementedError

    def etag(self, key: str) -> str:
        return etag_of(self.objects[key])

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator[str]:
        runner = web.ServerRunner(web.Server(self.handle), shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        try:
            yield f"http://127.0.0.1:{runner.addresses[0][1]}"
        finally:
            await runner.cleanup()


@dataclass
class GoogleServer(CloudServer):
    key: rsa.RSAPublicKey | None = None  # None: everybody may read
    email: str = ""

    def why_denied(self, request: web.Request) -> str:
        if self.key is None:
            return "a token for a public bucket" if "Authorization" in request.headers else ""
        token = request.headers.get("Authorization", "").removeprefix("Bearer ")
        try:
            head, claims, signature = token.split(".")
            signed = f"{head}.{claims}".encode()
            self.key.verify(_decoded(signature), signed, padding.PKCS1v15(), hashes.SHA256())
        except Exception as error:
            return f"the signature is wrong: {type(error).__name__}"
        said = json.loads(_decoded(claims))
        if said["iss"] != self.email or not said["iat"] - 60 < time.time() < said["exp"]:
            return "not this account's token, or not now"
        return ""

    def is_here(self, request: web.Request) -> bool:
        return request.path.split("/")[1] == self.bucket

    def key_of(self, request: web.Request) -> str:
        return request.raw_path.partition("?")[0].lstrip("/").partition("/")[2]

    def listing(self, prefix: str) -> bytes:
        rows = "".join(
            f"<Contents><Key>{key}</Key><Size>{len(data)}</Size><ETag>{self.etag(key)}</ETag>"
            "<LastModified>2026-01-01T00:00:00.000Z</LastModified></Contents>"
            for key, data in self.objects.items()
            if key.startswith(prefix)
        )
        return (
            f"<ListBucketResult><IsTruncated>false</IsTruncated>{rows}</ListBucketResult>".encode()
        )


@dataclass
class AzureServer(CloudServer):
    account: str = "testaccount"
    account_key: bytes = b""  # empty: a SAS, or everybody
    sas: str = ""

    no_bucket = "ContainerNotFound"
    no_object = "BlobNotFound"

    def why_denied(self, request: web.Request) -> str:
        if self.sas:
            return "" if request.query.get("sig") == self.sas else "no such signature"
        if not self.account_key:
            return "a key for a public container" if "Authorization" in request.headers else ""
        wanted = f"SharedKey {self.account}:{self._signature(request)}"
        return "" if request.headers.get("Authorization") == wanted else "the signature is wrong"

    def _signature(self, request: web.Request) -> str:
        """https://learn.microsoft.com/rest/api/storageservices/authorize-with-shared-key"""
        names = ("Content-Encoding", "Content-Language", "Content-Length", "Content-MD5")
        names += ("Content-Type", "Date", "If-Modified-Since", "If-Match", "If-None-Match")
        names += ("If-Unmodified-Since", "Range")
        values = [request.headers.get(name, "") for name in names]
        values[2] = "" if values[2] == "0" else values[2]
        own = sorted(
            (name.lower(), " ".join(value.split()))
            for name, value in request.headers.items()
            if name.lower().startswith("x-ms-")
        )
        resource = f"/{self.account}{request.raw_path.partition('?')[0]}"
        query = "".join(f"\n{name.lower()}:{request.query[name]}" for name in sorted(request.query))
        lines = [request.method, *values, *(f"{name}:{value}" for name, value in own)]
        text = "\n".join([*lines, resource]) + query
        digest = hmac.new(self.account_key, text.encode(), hashlib.sha256).digest()
        return base64.b64encode(digest).decode()

    def is_here(self, request: web.Request) -> bool:
        return request.path.split("/")[1:3] == [self.account, self.bucket]

    def key_of(self, request: web.Request) -> str:
        return "/".join(request.raw_path.partition("?")[0].split("/")[3:])

    def etag(self, key: str) -> str:
        return f'"0x{etag_of(self.objects[key])[1:16].upper()}"'

    def listing(self, prefix: str) -> bytes:
        rows = "".join(
            f"<Blob><Name>{key}</Name><Properties><Last-Modified>{DATE}</Last-Modified>"
            f"<Etag>{self.etag(key).strip(chr(34))}</Etag><Content-Length>{len(data)}"
            "</Content-Length><Content-Type>application/octet-stream</Content-Type>"
            "<BlobType>BlockBlob</BlobType></Properties></Blob>"
            for key, data in self.objects.items()
            if key.startswith(prefix)
        )
        return (
            f'<?xml version="1.0" encoding="utf-8"?><EnumerationResults><Blobs>{rows}</Blobs>'
            "<NextMarker/></EnumerationResults>"
        ).encode()


def _decoded(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


def private_key_pem(key: rsa.RSAPrivateKey) -> str:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    ).decode()
