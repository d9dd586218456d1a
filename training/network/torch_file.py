"""Files that torch.save wrote, read without running any of their code and in bounded memory.

Such a file is a zip archive: a pickle that describes the tensors, and the bytes of each storage, uncompressed
(`_save` in torch/serialization.py, `_rebuild_tensor_v2` in torch/_utils.py). A pickle is a program. Here each
class and function that it names is a stand-in that only keeps what it is given, as "Restricting Globals" in
Python's documentation of pickle advises, and what it takes is counted before it runs.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
import struct
import sys
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

_LARGEST_PICKLE = 64 << 20
_MOST_OPERATIONS = 2_000_000
"""Some 25 of them make a tensor; the most wasteful take 200 bytes each."""

_DATA = "/data.pkl"

_ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, NotImplementedError, RuntimeError)

_LOCAL_HEADER = struct.Struct("<4s22xHH")
"""Of a zip archive's member: signature, lengths of its name and of the extra field (APPNOTE.TXT, 4.3.7)."""


def load_torch_file(path: Path) -> Any:
    """What a file holds: plain containers, `StoredTensor`, and stand-ins for everything else.

    Raises:
        ValueError: it is damaged, takes too much memory to be a checkpoint, or is of an older form.
        OSError: it cannot be read.
    """
    if not zipfile.is_zipfile(path):
        raise ValueError("it is not in the zip format that torch.save writes since PyTorch 1.6")
    try:
        with zipfile.ZipFile(path) as archive:
            file = _File(path, archive)
            content = _read_pickle(archive, f"{file.root}{_DATA}")
    except _ZIP_ERRORS as error:
        raise ValueError(f"its zip archive is damaged: {error}") from error
    _count_operations(content)
    try:
        return _Unpickler(content, file).load()
    except Exception as error:  # what a damaged program runs into can be anything
        raise ValueError(f"its pickle cannot be used: {error or type(error).__name__}") from error


class _File:
    """The storages of a file, mapped into memory."""

    def __init__(self, path: Path, archive: zipfile.ZipFile) -> None:
        pickles = [name for name in archive.namelist() if name.endswith(_DATA)]
        if len(pickles) != 1:
            raise ValueError("it is a zip archive that torch.save did not write")
        self.root = pickles[0].removesuffix(_DATA)
        self._members = {info.filename: info for info in archive.infolist()}
        byteorder = f"{self.root}/byteorder"
        if byteorder in self._members and archive.read(byteorder) != sys.byteorder.encode():
            raise ValueError("its numbers are in the byte order of another kind of processor")
        # copied on write: whoever writes into a tensor does not change the file
        self._bytes = np.memmap(path, np.uint8, mode="c")

    def storage(self, key: str, dtype: torch.dtype, count: int) -> Tensor:
        """The numbers of a storage, (count,).

        Raises:
            ValueError: it is not there, or shorter.
        """
        info = self._members.get(f"{self.root}/data/{key}")
        if info is None or info.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"the storage '{key}' is missing or compressed")
        header = self._bytes[info.header_offset : info.header_offset + _LOCAL_HEADER.size].tobytes()
        signature, name_length, extra_length = _LOCAL_HEADER.unpack(header)
        start = info.header_offset + len(header) + name_length + extra_length
        stop = start + count * dtype.itemsize
        if signature != b"PK\x03\x04" or stop > start + info.file_size or stop > len(self._bytes):
            raise ValueError(f"the storage '{key}' is cut short")
        if not count:
            return torch.empty(0, dtype=dtype)
        return torch.frombuffer(self._bytes, dtype=dtype, count=count, offset=start)


class _StandIn(dict[Any, Any]):
    """Stands for a class or function that a pickle names, or what that would have made.

    It keeps the items that a dictionary of its kind would have, and nothing else.
    """

    __slots__ = ()
    __hash__ = object.__hash__  # type: ignore[assignment]

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__()

    def __call__(self, *args: object, **kwargs: object) -> _StandIn:
        """What calling it would make: a method, say, that the pickle names with getattr."""
        return _StandIn()

    def __setstate__(self, state: object) -> None:
        pass

    def append(self, item: object) -> None:
        """Drops an item of what would be a list."""

    def extend(self, items: Iterable[object]) -> None:
        """Drops items of what would be a list."""

    def add(self, item: object) -> None:
        """Drops an item of what would be a set."""


class StoredTensor(_StandIn):
    """A tensor of the file; stands for `_rebuild_tensor_v2`."""

    __slots__ = ("_dtype", "_offset", "_size", "_storage", "_stride")

    def __init__(self, storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> None:
        super().__init__()
        self._storage, self._offset, self._size, self._stride = storage, offset, size, stride
        self._dtype: Any = None

    def tensor(self) -> Tensor:
        """The tensor itself, mapped into memory.

        Raises:
            ValueError: what the file says of it cannot be.
        """
        sizes = (*self._size, *self._stride, self._offset)
        if not isinstance(self._storage, _Storage) or not all(isinstance(n, int) and n >= 0 for n in sizes):
            raise ValueError("a tensor's sizes are no whole numbers")
        numbers = self._storage.numbers()
        if self._dtype is not None:
            numbers = numbers.view(_dtype(self._dtype))
        if math.prod(self._size) > len(numbers):
            raise ValueError("a tensor is larger than its storage")
        return torch.as_strided(numbers, self._size, self._stride, self._offset)


class _StoredTensor3(StoredTensor):
    """Stands for `_rebuild_tensor_v3`, which says the dtype."""

    __slots__ = ()

    def __init__(self, storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> None:
        super().__init__(storage, offset, size, stride)
        self._dtype = rest[2]


class _First(_StandIn):
    """Stands for `_rebuild_parameter`: a parameter is its first argument, the tensor."""

    __slots__ = ()

    def __new__(cls, *args: Any) -> Any:
        return args[0]


class _Call(_StandIn):
    """Stands for `_rebuild_from_type_v2`: an instance of a subclass is a tensor."""

    __slots__ = ()

    def __new__(cls, function: Any, kind: Any, args: Any, state: Any) -> Any:
        return function(*args)


class _Storage(_StandIn):
    """A storage of the file."""

    __slots__ = ("_count", "_dtype", "_file", "_key")

    def __init__(self, file: _File, dtype: Any, key: Any, count: Any) -> None:
        super().__init__()
        self._file, self._dtype, self._key, self._count = file, dtype, key, count

    def numbers(self) -> Tensor:
        """(count,)"""
        if not isinstance(self._count, int) or self._count < 0:
            raise ValueError("a storage has no size")
        return self._file.storage(str(self._key), _dtype(self._dtype), self._count)


_STORAGES: Mapping[str, torch.dtype] = {
    **{"DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16},
    **{"BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32},
    **{"ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8},
    **{"BoolStorage": torch.bool, "ComplexFloatStorage": torch.complex64, "UntypedStorage": torch.uint8},
    "ComplexDoubleStorage": torch.complex128,
}

_MEANT: Mapping[tuple[str, str], Any] = {
    ("torch._utils", "_rebuild_tensor_v2"): StoredTensor,
    ("torch._utils", "_rebuild_tensor_v3"): _StoredTensor3,
    ("torch._utils", "_rebuild_parameter"): _First,
    ("torch._utils", "_rebuild_parameter_with_state"): _First,
    ("torch._tensor", "_rebuild_from_type_v2"): _Call,
}


_OF_ATTACKS = ("os", "posix", "nt", "sys", "subprocess")
"""Modules that no checkpoint names. A stand-in would do nothing, but who wrote the file should be known."""


class _Unpickler(pickle.Unpickler):
    def __init__(self, content: bytes, file: _File) -> None:
        super().__init__(io.BytesIO(content))
        self._file = file

    def find_class(self, module: str, name: str) -> Any:
        """A stand-in, or the name of a dtype or of a storage with one."""
        if module in _OF_ATTACKS:
            raise ValueError(f"it names {module}.{name}, which does more than hold tensors")
        if module in ("torch", "torch.storage") and isinstance(_dtype_or_none(name), torch.dtype):
            return name
        return _MEANT.get((module, name), _StandIn)

    def persistent_load(self, pid: Any) -> Any:
        """The storage that ("storage", type, key, device, count) stands for."""
        _, dtype, key, _, count = pid
        return _Storage(self._file, dtype, key, count)


def _dtype_or_none(name: str) -> torch.dtype | None:
    found = _STORAGES.get(name) or getattr(torch, name, None)
    return found if isinstance(found, torch.dtype) else None


def _dtype(name: Any) -> torch.dtype:
    found = _dtype_or_none(name) if isinstance(name, str) else None
    if found is None:
        raise ValueError("a tensor has no dtype")
    return found


def _read_pickle(archive: zipfile.ZipFile, name: str) -> bytes:
    size = archive.getinfo(name).file_size
    if size > _LARGEST_PICKLE:
        raise ValueError(f"its pickle has {size} bytes, more than the {_LARGEST_PICKLE} of any checkpoint")
    return archive.read(name)


def _count_operations(content: bytes) -> None:
    """Refuses a pickle that would take much more memory than its size.

    Raises:
        ValueError: it is damaged, has too many operations, or asks for a memo larger than what it holds.
    """
    for count, (operation, argument, _) in enumerate(pickletools.genops(content)):
        if count >= _MOST_OPERATIONS:
            raise ValueError(f"its pickle has more than {_MOST_OPERATIONS} operations")
        if operation.name.endswith("PUT") and (argument or 0) > count:
            raise ValueError("its pickle is damaged: it counts what it holds wrongly")
