"""A store that costs next to nothing: the two calls of S3 that a pull makes, with ``sendfile``.

One object, below any bucket and key that ends with its file's name. Signatures are not looked at.
``python -m bench.s3_server FILE ETAG PORT`` serves until it is told to end.
"""

from __future__ import annotations

import os
import re
import socket
import sys
import threading
from pathlib import Path

_RANGE = re.compile(rb"\r\nrange: bytes=(\d+)-(\d+)", re.IGNORECASE)
_DATE = "Thu, 01 Jan 2026 00:00:00 GMT"


def serve(path: Path, etag: str, port: int) -> None:
    size_bytes = path.stat().st_size
    with socket.create_server(("127.0.0.1", port), backlog=64) as listener:
        while True:
            connection, _ = listener.accept()
            arguments = (connection, path, size_bytes, etag)
            threading.Thread(target=_talk, args=arguments, daemon=True).start()


def _talk(connection: socket.socket, path: Path, size_bytes: int, etag: str) -> None:
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    received = b""
    with connection, path.open("rb") as file:
        while True:
            while b"\r\n\r\n" not in received:
                data = connection.recv(65_536)
                if not data:
                    return
                received += data
            head, _, received = received.partition(b"\r\n\r\n")
            try:
                _answer(connection, head, file.fileno(), path.name, size_bytes, etag)
            except (BrokenPipeError, ConnectionResetError):
                return


def _answer(
    connection: socket.socket, head: bytes, descriptor: int, name: str, size_bytes: int, etag: str
) -> None:
    if b"list-type=2" in head.split(b"\r\n", 1)[0]:
        body = (
            "<ListBucketResult><IsTruncated>false</IsTruncated><KeyCount>1</KeyCount><Contents>"
            f"<Key>{name}</Key><Size>{size_bytes}</Size><ETag>{etag}</ETag>"
            "<LastModified>2026-01-01T00:00:00.000Z</LastModified></Contents></ListBucketResult>"
        )
        connection.sendall(
            f"HTTP/1.1 200 OK\r\ncontent-type: application/xml\r\ncontent-length: {len(body)}"
            f"\r\n\r\n{body}".encode()
        )
        return
    asked = _RANGE.search(head)
    start, end = (int(asked[1]), int(asked[2]) + 1) if asked else (0, size_bytes)
    status = "206 Partial Content" if asked else "200 OK"
    place = f"content-range: bytes {start}-{end - 1}/{size_bytes}\r\n" if asked else ""
    connection.sendall(
        f"HTTP/1.1 {status}\r\ncontent-length: {end - start}\r\n{place}etag: {etag}\r\n"
        f"last-modified: {_DATE}\r\naccept-ranges: bytes\r\n\r\n".encode()
    )
    if head.startswith(b"HEAD"):
        return
    while start < end:
        start += os.sendfile(connection.fileno(), descriptor, start, min(end - start, 1 << 20))


if __name__ == "__main__":
    serve(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
