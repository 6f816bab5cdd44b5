"""Protobuf messages as the JSON that REST clients of the protocol expect.

Not protobuf's own JSON: 64-bit integers stay numbers, names are the fields' own, enums are their
names, and lists are there when they are empty. Only for the few messages of ``router.rest``.
"""

from __future__ import annotations

from typing import Any

from google.protobuf.message import Message


def document_of(message: Message) -> dict[str, Any]:
    """A message as a JSON object; unset messages are left out."""
    document: dict[str, Any] = {}
    field: Any  # two classes of descriptors, by protobuf's implementation
    for field in message.DESCRIPTOR.fields:
        value = getattr(message, field.name)
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            item_field = field.message_type.fields_by_name["value"]
            items = {str(key): _value(item_field, item) for key, item in sorted(value.items())}
            document[field.name] = items
        elif field.is_repeated:
            document[field.name] = [_value(field, item) for item in value]
        elif field.message_type is None or message.HasField(field.name):
            document[field.name] = _value(field, value)
    return document


def _value(field: Any, value: Any) -> Any:
    if field.message_type is not None:
        return document_of(value)
    if field.enum_type is not None:
        known = field.enum_type.values_by_number.get(value)
        return known.name if known is not None else value
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return value
