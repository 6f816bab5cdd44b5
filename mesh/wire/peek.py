"""The model's name out of the first bytes of a request: field 1 of the first message.

Pure. Nothing is parsed but the top level of the message: tags are read, contents skipped. As
protobuf has it, fields may come in any order and the last ``model_name`` wins, as far as the bytes
at hand reach.
"""

from __future__ import annotations

import zlib
from typing import Final

from mesh.core.errors import Internal, InvalidArgument, MeshError, Unimplemented
from mesh.wire.messages import PREFIX_BYTES, check_size

_NAME_TAG: Final = 0x0A  # field 1, length-delimited
_WBITS: Final = {b"gzip": 31, b"deflate": 15}
# So much of a compressed message is inflated to find the name in it.
_INFLATED_MAX: Final = 256 * 1024
_UNKNOWN_END: Final = 1 << 62
_GROUPS_MAX: Final = 100  # protobuf's own bound on nesting


Peeked = tuple[str | None, bool]
"""(name, or None while more bytes are needed; whether the entire message was looked at, so that no
later field can change the name)"""

_MORE: Final[Peeked] = (None, False)


def peek_model_name(data: bytes, encoding: bytes, limit: int, *, ended: bool) -> Peeked:
    """Look at the first bytes of a request's body.

    ``ended``: no more bytes will come. Raises InvalidArgument (no name, not a protobuf message),
    ResourceExhausted (message over ``limit``), Unimplemented or Internal (compression).
    """
    if len(data) < PREFIX_BYTES:
        if ended:
            raise InvalidArgument("the request ended before its message did")
        return _MORE
    length = int.from_bytes(data[1:5], "big")
    if length > limit:
        check_size(length, limit)
    whole = len(data) >= PREFIX_BYTES + length
    if data[0] == 0:
        name = _scan(data, PREFIX_BYTES, PREFIX_BYTES + length)
    else:
        content, complete = _inflate(data[PREFIX_BYTES : PREFIX_BYTES + length], data[0], encoding)
        if complete:
            check_size(len(content), limit)
        # Only its end tells how long the inflated message is; whoever inflates it all checks that.
        name = _scan(content, 0, len(content) if complete else _UNKNOWN_END)
        if whole and not complete:
            return _name_of(name, whole=False)
    if ended and not whole:
        raise InvalidArgument("the request ended before its message did")
    if not name and not whole:
        return _MORE
    return _name_of(name, whole=whole)


def _name_of(name: bytes | None, *, whole: bool) -> Peeked:
    if not name:
        raise InvalidArgument(
            "the request names no model: set model_name (field 1) or the header mm-model-id"
        )
    try:
        return name.decode("utf-8"), whole
    except UnicodeDecodeError:
        raise InvalidArgument("model_name is not UTF-8") from None


def _inflate(data: bytes, flag: int, encoding: bytes) -> tuple[bytes, bool]:
    """The message's beginning, and whether that is all of it."""
    if flag != 1:
        raise Internal(f"message prefix has the unknown flag {flag}")
    wbits = _WBITS.get(encoding)
    if wbits is None:
        shown = encoding[:32].decode("ascii", "replace")
        raise Unimplemented(f"grpc-encoding {shown!r} is not supported; use gzip or deflate")
    try:
        inflater = zlib.decompressobj(wbits)
        return inflater.decompress(data, _INFLATED_MAX), inflater.eof
    except zlib.error as error:
        raise Internal(f"a compressed message cannot be decompressed: {error}") from None


def _scan(data: bytes, position: int, end: int) -> bytes | None:
    """The last complete field 1 before ``end`` (the message's end, maybe beyond what is here)."""
    name: bytes | None = None
    groups: list[int] = []  # the open ones, by field number
    have = min(end, len(data))
    while position < have:
        tag = data[position]
        position += 1
        if tag >= 0x80:
            tag, position = _varint(data, position - 1, have)
            if position < 0:
                return name
        kind = tag & 7
        if kind == 2:
            if position >= have:
                return name
            size = data[position]
            position += 1
            if size >= 0x80:
                if position < have and data[position] < 0x80:  # two octets: up to 16 KiB
                    size += (data[position] << 7) - 0x80
                    position += 1
                else:
                    size, position = _varint(data, position - 1, have)
                    if position < 0:
                        return name
            if position + size > end:
                raise _broken()
            if tag == _NAME_TAG and not groups:
                if position + size > have:
                    return name
                name = data[position : position + size]
            position += size
        elif kind == 0:
            _, position = _varint(data, position, have)
            if position < 0:
                return name
        elif kind == 5:
            position += 4
        elif kind == 1:
            position += 8
        elif kind == 3 and len(groups) < _GROUPS_MAX:
            groups.append(tag >> 3)
        elif kind != 4 or not groups or groups.pop() != tag >> 3:
            raise _broken()
    return name


def _varint(data: bytes, position: int, have: int) -> tuple[int, int]:
    """Value and the position behind it; position -1 when the bytes end inside."""
    value = shift = 0
    while position < have:
        octet = data[position]
        position += 1
        value |= (octet & 0x7F) << shift
        if octet < 0x80:
            return value, position
        shift += 7
        if shift > 63:
            raise _broken()
    return 0, -1


def _broken() -> MeshError:
    return InvalidArgument("the request is not a protobuf message with a model_name in field 1")


# ---- at any path, for a router that is told one ----


class NoNameInMessage(InvalidArgument):
    """The message is a message, and has no name where one is looked for."""


def peek_at_path(
    data: bytes, encoding: bytes, limit: int, path: tuple[int, ...], *, ended: bool
) -> Peeked:
    """As ``peek_model_name``, with the name at ``path``. Raises NoNameInMessage once it is known
    that there is none."""
    if len(data) < PREFIX_BYTES:
        if ended:
            raise InvalidArgument("the request ended before its message did")
        return _MORE
    length = int.from_bytes(data[1:5], "big")
    if length > limit:
        check_size(length, limit)
    whole = len(data) >= PREFIX_BYTES + length
    if data[0] == 0:
        name = _scan_path(data, PREFIX_BYTES, PREFIX_BYTES + length, path)
        complete = whole
    else:
        content, complete = _inflate(data[PREFIX_BYTES : PREFIX_BYTES + length], data[0], encoding)
        name = _scan_path(content, 0, len(content) if complete else _UNKNOWN_END, path)
    if ended and not whole:
        raise InvalidArgument("the request ended before its message did")
    if not name:
        if not whole:
            return _MORE
        raise NoNameInMessage(
            f"the request names no model: set the string at field path {list(path)}, "
            "or the header mm-model-id"
        )
    try:
        return name.decode("utf-8"), complete
    except UnicodeDecodeError:
        raise InvalidArgument(f"the string at field path {list(path)} is not UTF-8") from None


def _scan_path(data: bytes, position: int, end: int, path: tuple[int, ...]) -> bytes | None:
    """The last complete string at ``path`` in what is here of the message up to ``end``."""
    tag_wanted = path[0] << 3 | 2
    name: bytes | None = None
    groups: list[int] = []
    have = min(end, len(data))
    while position < have:
        tag, position = _varint(data, position, have)
        if position < 0:
            return name
        kind = tag & 7
        if kind == 2:
            size, position = _varint(data, position, have)
            if position < 0:
                return name
            if position + size > end:
                raise _broken_at(path)
            if tag == tag_wanted and not groups:
                if len(path) > 1:
                    inner = _scan_path(data, position, position + size, path[1:])
                    name = inner if inner is not None else name
                elif position + size <= have:
                    name = data[position : position + size]
            position += size
        elif kind == 0:
            _, position = _varint(data, position, have)
            if position < 0:
                return name
        elif kind == 5:
            position += 4
        elif kind == 1:
            position += 8
        elif kind == 3 and len(groups) < _GROUPS_MAX:
            groups.append(tag >> 3)
        elif kind != 4 or not groups or groups.pop() != tag >> 3:
            raise _broken_at(path)
    return name


def _broken_at(path: tuple[int, ...]) -> MeshError:
    return InvalidArgument(
        f"the request is not a protobuf message with a model's name at field path {list(path)}"
    )
