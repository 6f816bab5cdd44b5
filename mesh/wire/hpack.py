"""HPACK (RFC 7541): a decoder with bounds, and an encoder of stateless blocks.

The decoder keeps the peer's dynamic table. Decoding is pure Python and slow next to a look-up, so
``Decoder.decode`` tells whether the block left the table as it was: the connection then caches the
result by the block's raw bytes (see ``mesh.wire.connection``). The encoder never uses a dynamic
table of its own: every block that we send can be cached, spliced and sent on any connection.

Fails with ``HpackError``: a connection error COMPRESSION_ERROR by RFC 9113.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Final

from mesh.wire import huffman

STATIC_TABLE: Final[tuple[tuple[bytes, bytes], ...]] = (
    (b":authority", b""),
    (b":method", b"GET"),
    (b":method", b"POST"),
    (b":path", b"/"),
    (b":path", b"/index.html"),
    (b":scheme", b"http"),
    (b":scheme", b"https"),
    (b":status", b"200"),
    (b":status", b"204"),
    (b":status", b"206"),
    (b":status", b"304"),
    (b":status", b"400"),
    (b":status", b"404"),
    (b":status", b"500"),
    (b"accept-charset", b""),
    (b"accept-encoding", b"gzip, deflate"),
    (b"accept-language", b""),
    (b"accept-ranges", b""),
    (b"accept", b""),
    (b"access-control-allow-origin", b""),
    (b"age", b""),
    (b"allow", b""),
    (b"authorization", b""),
    (b"cache-control", b""),
    (b"content-disposition", b""),
    (b"content-encoding", b""),
    (b"content-language", b""),
    (b"content-length", b""),
    (b"content-location", b""),
    (b"content-range", b""),
    (b"content-type", b""),
    (b"cookie", b""),
    (b"date", b""),
    (b"etag", b""),
    (b"expect", b""),
    (b"expires", b""),
    (b"from", b""),
    (b"host", b""),
    (b"if-match", b""),
    (b"if-modified-since", b""),
    (b"if-none-match", b""),
    (b"if-range", b""),
    (b"if-unmodified-since", b""),
    (b"last-modified", b""),
    (b"link", b""),
    (b"location", b""),
    (b"max-forwards", b""),
    (b"proxy-authenticate", b""),
    (b"proxy-authorization", b""),
    (b"range", b""),
    (b"referer", b""),
    (b"refresh", b""),
    (b"retry-after", b""),
    (b"server", b""),
    (b"set-cookie", b""),
    (b"strict-transport-security", b""),
    (b"transfer-encoding", b""),
    (b"user-agent", b""),
    (b"vary", b""),
    (b"via", b""),
    (b"www-authenticate", b""),
)
_STATIC_LENGTH: Final = len(STATIC_TABLE)
_STATIC_FULL: Final = {field: i for i, field in reversed(list(enumerate(STATIC_TABLE, start=1)))}
_STATIC_NAME: Final = {n: i for i, (n, _) in reversed(list(enumerate(STATIC_TABLE, start=1)))}
_DEFAULT_TABLE_BYTES: Final = 4_096
_ENTRY_OVERHEAD: Final = 32  # RFC 7541, 4.1
_INTEGER_MAX_OCTETS: Final = 5
_SIZE_UPDATES_MAX: Final = 2  # RFC 7541, 4.2: at most two at the beginning of a block

Field = tuple[bytes, bytes]


class HpackError(ValueError):
    """The block cannot be decoded: the connection's compression state is lost."""


class HeaderListTooLarge(ValueError):
    """The block is well-formed and the table is intact, but the list is over its bounds."""


class Decoder:
    """Decodes blocks of one direction of one connection.

    ``max_table_bytes`` is what we announced in SETTINGS_HEADER_TABLE_SIZE; the list bounds count
    the fields as RFC 9113 6.5.2 does (name + value + 32).
    """

    __slots__ = (
        "_capacity",
        "_entries",
        "_max_fields",
        "_max_list_bytes",
        "_max_table_bytes",
        "_max_value_bytes",
        "_size",
    )

    def __init__(
        self,
        max_table_bytes: int = 4_096,
        *,
        max_list_bytes: int = 16 * 1024,
        max_fields: int = 100,
        max_value_bytes: int = 8 * 1024,
    ) -> None:
        self._entries: deque[Field] = deque()
        self._size = 0
        # Before it has seen our settings the peer's table is that of RFC 9113, 6.5.2.
        self._capacity = _DEFAULT_TABLE_BYTES
        self._max_table_bytes = max(max_table_bytes, _DEFAULT_TABLE_BYTES)
        self._max_list_bytes = max_list_bytes
        self._max_fields = max_fields
        self._max_value_bytes = max_value_bytes

    def decode(self, block: bytes) -> tuple[tuple[Field, ...], bool]:
        """Return the fields, and whether the dynamic table is the same as before.

        Raises HpackError (fatal to the connection) or HeaderListTooLarge (fatal to the stream; the
        table has been kept up to date).
        """
        fields: list[Field] = []
        position, end, list_bytes, updates = 0, len(block), 0, 0
        unchanged, too_large = True, ""
        while position < end:
            octet = block[position]
            if octet & 0x80:  # indexed field
                index, position = _integer(block, position, 7)
                field = self._lookup(index)
            elif octet & 0xE0 == 0x20:  # table size update
                size, position = _integer(block, position, 5)
                updates += 1
                if fields or too_large or updates > _SIZE_UPDATES_MAX:
                    raise HpackError("table size update in the wrong place")
                self._resize(size)
                unchanged = False
                continue
            else:  # literal: with indexing (01), without (0000), never indexed (0001)
                indexing = octet & 0xC0 == 0x40
                index, position = _integer(block, position, 6 if indexing else 4)
                if index:
                    name = self._lookup(index)[0]
                else:
                    name, position = _string(block, position)
                value, position = _string(block, position)
                field = (name, value)
                if indexing:
                    self._insert(field)
                    unchanged = False
            list_bytes += len(field[0]) + len(field[1]) + _ENTRY_OVERHEAD
            if list_bytes > self._max_list_bytes:
                too_large = f"header list over {self._max_list_bytes} bytes"
            elif len(field[1]) > self._max_value_bytes:
                too_large = f"header value over {self._max_value_bytes} bytes"
            elif len(fields) >= self._max_fields:
                too_large = f"more than {self._max_fields} header fields"
            if not too_large:
                fields.append(field)
        if too_large:
            raise HeaderListTooLarge(too_large)
        return tuple(fields), unchanged

    @property
    def table_bytes(self) -> int:
        return self._size

    def _lookup(self, index: int) -> Field:
        if 0 < index <= _STATIC_LENGTH:
            return STATIC_TABLE[index - 1]
        position = index - _STATIC_LENGTH - 1
        if index <= 0 or position >= len(self._entries):
            raise HpackError(f"index {index} is in no table")
        return self._entries[position]

    def _insert(self, field: Field) -> None:
        size = len(field[0]) + len(field[1]) + _ENTRY_OVERHEAD
        self._evict(self._capacity - size)
        if size <= self._capacity:
            self._entries.appendleft(field)
            self._size += size

    def _resize(self, capacity: int) -> None:
        if capacity > self._max_table_bytes:
            raise HpackError(f"table size {capacity} is over {self._max_table_bytes}")
        self._capacity = capacity
        self._evict(capacity)

    def _evict(self, budget: int) -> None:
        while self._entries and self._size > budget:
            name, value = self._entries.pop()
            self._size -= len(name) + len(value) + _ENTRY_OVERHEAD


def _integer(block: bytes, position: int, prefix_bits: int) -> tuple[int, int]:
    """RFC 7541, 5.1, with at most five continuation octets."""
    mask = (1 << prefix_bits) - 1
    try:
        value = block[position] & mask
        position += 1
        if value < mask:
            return value, position
        shift = 0
        for _ in range(_INTEGER_MAX_OCTETS):
            octet = block[position]
            position += 1
            value += (octet & 0x7F) << shift
            if octet < 0x80:
                return value, position
            shift += 7
    except IndexError:
        raise HpackError("block ends inside an integer") from None
    raise HpackError("integer of more than five octets")


def _string(block: bytes, position: int) -> tuple[bytes, int]:
    if position >= len(block):
        raise HpackError("block ends before a string")
    huffman_coded = block[position] & 0x80
    length, position = _integer(block, position, 7)
    end = position + length
    if end > len(block):
        raise HpackError("block ends inside a string")
    raw = bytes(block[position:end])
    if huffman_coded:
        try:
            return huffman.decode(raw), end
        except huffman.HuffmanError as error:
            raise HpackError(str(error)) from None
    return raw, end


def encode_integer(value: int, prefix_bits: int, pattern: int) -> bytes:
    """RFC 7541, 5.1. ``pattern`` holds the bits above the prefix."""
    mask = (1 << prefix_bits) - 1
    if value < mask:
        return bytes((pattern | value,))
    out = bytearray((pattern | mask,))
    value -= mask
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def encode_literal(name: bytes, value: bytes) -> bytes:
    """One field as a literal without indexing (a static name is named by its index)."""
    index = _STATIC_NAME.get(name, 0)
    head = encode_integer(index, 4, 0x00)
    if not index:
        head += encode_integer(len(name), 7, 0) + name
    return head + encode_integer(len(value), 7, 0) + value


def encode(fields: Iterable[Field]) -> bytes:
    """A block that leaves the peer's dynamic table as it is: cacheable, valid on any connection."""
    out = bytearray()
    for field in fields:
        index = _STATIC_FULL.get(field)
        if index is not None:
            out += encode_integer(index, 7, 0x80)
        else:
            out += encode_literal(*field)
    return bytes(out)
