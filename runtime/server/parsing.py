"""Counts the fields of untrusted messages before they are parsed."""

from __future__ import annotations

from typing import TypeVar

from google.protobuf.descriptor import Descriptor
from google.protobuf.message import DecodeError, Message

from runtime.errors import InputError

MAX_FIELDS = 1000
"""Most fields of a message, nested ones included. The largest request at a server's defaults has about 80."""

_VARINT, _FIXED_64, _BYTES, _GROUP, _END_OF_GROUP, _FIXED_32 = range(6)
_SIZES = {_FIXED_64: 8, _FIXED_32: 4, _GROUP: 0, _END_OF_GROUP: 0}
_LONGEST_VARINT = 10

_Message = TypeVar("_Message", bound=Message)


def parse(kind: type[_Message], content: bytes) -> _Message:
    """Parses a message, in a time that its number of bytes alone decides.

    Raises:
        InputError: it has too many fields.
        DecodeError: it cannot be parsed.
    """
    count_fields(content, kind.DESCRIPTOR)  # type: ignore[arg-type]
    return kind.FromString(content)


def count_fields(content: bytes, descriptor: Descriptor) -> int:
    """Counts the fields of a message and of those within it, known and unknown; each occurrence counts.

    Source: protobuf's "Encoding" page.

    Raises:
        InputError: there are more than `MAX_FIELDS`.
        DecodeError: the message is cut short.
    """
    count = 0
    parts = [(0, len(content), descriptor)]
    while parts:
        place, end, of = parts.pop()
        while place < end:
            count += 1
            if count > MAX_FIELDS:
                raise InputError(f"the message has more than {MAX_FIELDS:,} fields, the most that are read")
            tag, place = _varint(content, place, end)
            kind = tag & 7
            if kind == _VARINT:
                _, place = _varint(content, place, end)
            elif kind == _BYTES:
                length, place = _varint(content, place, end)
                field = of.fields_by_number.get(tag >> 3)
                if field is not None and field.message_type is not None:
                    parts.append((place, min(place + length, end), field.message_type))
                place += length
            elif kind in _SIZES:
                place += _SIZES[kind]
            else:
                raise DecodeError("a field has an unknown type")
        if place > end:
            raise DecodeError("the message is cut short")
    return count


def _varint(content: bytes, place: int, end: int) -> tuple[int, int]:
    """Returns a number, and the place behind it."""
    value = 0
    for index in range(_LONGEST_VARINT):
        if place >= end:
            raise DecodeError("the message is cut short")
        byte = content[place]
        place += 1
        value |= (byte & 0x7F) << (7 * index)
        if byte < 0x80:
            return value, place
    raise DecodeError("a number is too long")
