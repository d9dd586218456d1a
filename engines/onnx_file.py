"""Checks which weights an ONNX graph takes from other files: the libraries that load it read whatever it
names.

An ONNX file is a protobuf message. Only the fields that lead to tensors are followed (onnx.proto in the
repository onnx/onnx, "Encoding" in the documentation of protobuf), so neither package is needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

_TENSOR, _ENTRY = "TensorProto", "StringStringEntryProto"

_FIELDS: Mapping[str, Mapping[int, str]] = {
    "ModelProto": {7: "GraphProto", 20: "TrainingInfoProto", 25: "FunctionProto"},
    "TrainingInfoProto": {1: "GraphProto", 2: "GraphProto"},
    "GraphProto": {1: "NodeProto", 5: _TENSOR, 15: "SparseTensorProto"},
    "FunctionProto": {7: "NodeProto", 11: "AttributeProto"},
    "NodeProto": {5: "AttributeProto"},
    "AttributeProto": {
        **{5: _TENSOR, 6: "GraphProto", 10: _TENSOR, 11: "GraphProto"},
        **{22: "SparseTensorProto", 23: "SparseTensorProto"},
    },
    "SparseTensorProto": {1: _TENSOR, 2: _TENSOR},
    _TENSOR: {13: _ENTRY},
}
"""Message -> field number -> the message in that field, for the fields that lead to external data."""

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


@dataclass(frozen=True)
class ExternalData:
    """The weights of one tensor in another file."""

    location: str
    """Relative to the folder of the graph's file."""
    offset: int
    length: int
    """Bytes; 0 for all that follow."""


def external_data(content: bytes) -> Iterator[ExternalData]:
    """Finds all tensors of a graph that lie in another file.

    Args:
        content: of the graph's file.

    Raises:
        ValueError: it is not an ONNX file.
    """
    messages = [("ModelProto", 0, len(content))]
    while messages:
        kind, start, end = messages.pop()
        entries: dict[str, str] = {}
        for field, first, last in _fields(content, start, end):
            child = _FIELDS[kind].get(field)
            if child == _ENTRY:
                pair = {
                    number: content[a:b].decode("utf-8") for number, a, b in _fields(content, first, last)
                }
                if pair.get(1, "") in entries:
                    raise ValueError("a tensor says twice where it lies")
                entries[pair.get(1, "")] = pair.get(2, "")
            elif child:
                messages.append((child, first, last))
        if entries:
            offset, length = (int(entries.get(key) or 0) for key in ("offset", "length"))
            yield ExternalData(entries.get("location", ""), offset, length)


def _fields(content: bytes, position: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Yields (number, first byte, byte after the last) of every field of a message that holds bytes."""
    while position < end:
        tag, position = _varint(content, position, end)
        kind = tag & 7
        if kind == _BYTES:
            length, position = _varint(content, position, end)
            if length > end - position:
                raise ValueError("a field is longer than the message around it")
            yield tag >> 3, position, position + length
            position += length
        elif kind == _VARINT:
            _, position = _varint(content, position, end)
        elif kind in (_FIXED32, _FIXED64):
            position += 4 if kind == _FIXED32 else 8
        else:
            raise ValueError(f"a field is of the unknown kind {kind}")
    if position != end:
        raise ValueError("a field is cut short")


def _varint(content: bytes, position: int, end: int) -> tuple[int, int]:
    """Returns (value, position after it)."""
    value = shift = 0
    while position < end and shift < 64:
        byte = content[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
    raise ValueError("a number is cut short")
