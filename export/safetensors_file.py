"""Reads and writes .safetensors files byte by byte, with their tensors of any dtype, and without PyTorch.

A file is the length of its header, eight bytes in little-endian order, the header, a JSON object, and the
data of the tensors in a row ("Format" in the documentation of safetensors).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np

METADATA = "__metadata__"
_LENGTH_BYTES, _ALIGNMENT = 8, 8
_LARGEST_HEADER = 100_000_000
"""Bytes; the library safetensors reads none that is larger."""


@dataclass(frozen=True)
class Tensor:
    """A tensor as the header describes it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int
    """Its bytes: first, and after the last, counted from the end of the header."""


@dataclass(frozen=True)
class Header:
    """The header of a file, and what it says."""

    text: str
    tensors: tuple[Tensor, ...]
    """In the order of their data, which they cover without gaps."""
    metadata: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> Header:
        """Reads a header.

        Raises:
            ValueError: it is none; says why.
        """
        try:
            text.encode()  # JSON may name halves of characters, which no file holds
            content = json.loads(text)
            metadata = content.pop(METADATA, {})
            tensors = [
                Tensor(name, of["dtype"], tuple(of["shape"]), *map(int, of["data_offsets"]))
                for name, of in content.items()
            ]
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError) as error:
            raise ValueError("its header is damaged") from error
        tensors.sort(key=lambda tensor: (tensor.start, tensor.end))
        ends = [0, *(tensor.end for tensor in tensors)]
        if any(tensor.start != end for tensor, end in zip(tensors, ends)) or any(
            one > other for one, other in pairwise(ends)
        ):
            raise ValueError("its tensors do not lie in a row")
        return cls(text, tuple(tensors), metadata)

    @property
    def data_bytes(self) -> int:
        """Bytes of all tensors."""
        return self.tensors[-1].end if self.tensors else 0

    def encoded(self) -> bytes:
        """Returns the bytes of the file that come before those of the tensors."""
        content = self.text.encode()
        return len(content).to_bytes(_LENGTH_BYTES, "little") + content


@dataclass(frozen=True)
class SafetensorsFile:
    """An opened file."""

    header: Header
    data: memoryview
    """The bytes of all tensors, mapped into memory."""

    @classmethod
    def open(cls, path: Path) -> SafetensorsFile:
        """Opens a file.

        Raises:
            ValueError: it is not in this format, or incomplete; says why.
            OSError: it cannot be read.
        """
        if path.stat().st_size < _LENGTH_BYTES:
            raise ValueError("it is not in the format of safetensors")
        content = np.memmap(path, np.uint8, "r").data
        length = int.from_bytes(content[:_LENGTH_BYTES], "little")
        if length > min(_LARGEST_HEADER, len(content) - _LENGTH_BYTES):
            raise ValueError("it is not in the format of safetensors")
        start = _LENGTH_BYTES + length
        header, data = Header.parse(str(content[_LENGTH_BYTES:start], "utf-8")), content[start:]
        if len(data) != header.data_bytes:
            raise ValueError(f"it has {len(data)} bytes of tensors instead of {header.data_bytes}")
        return cls(header, data)

    def tensors(self) -> Iterator[tuple[Tensor, memoryview]]:
        """Yields every tensor with its bytes, in the order of the file."""
        for tensor in self.header.tensors:
            yield tensor, self.data[tensor.start : tensor.end]


def header_of(tensors: Iterable[Tensor], metadata: Mapping[str, str]) -> Header:
    """Returns the header of a file that holds some tensors in a row, wherever they were before."""
    content: dict[str, object] = {METADATA: dict(metadata)}
    end = 0
    for tensor in tensors:
        start, end = end, end + tensor.end - tensor.start
        content[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [start, end]}
    text = json.dumps(content, separators=(",", ":"))
    # as the library does, so that tensors can be mapped into memory
    return Header.parse(text + " " * (-len(text) % _ALIGNMENT))
