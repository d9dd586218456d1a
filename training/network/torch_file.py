"""Opens files that torch.save wrote, without running their code.

Such a file is a zip archive: a pickle of nested containers, and beside it the bytes of every tensor. Of what
the pickle names, only tensors are made. Dictionaries, and any other class or function, become a `Container`,
whose named items are kept, and whose state is not: nothing is imported or called. torch.load, told to load
weights only, refuses the containers that Lightning makes.

Source: PyTorch, torch/serialization.py (`_save`) and torch/_utils.py (`_rebuild_*`).
"""

from __future__ import annotations

import io
import math
import mmap
import pickle
import pickletools
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

MOST_PICKLE_BYTES = 8 << 20
"""Largest pickle that is read; that of a full AnyDoor checkpoint with optimizer states has 1.5 MB. What it
makes is counted before it is made; tensors are mapped."""

MOST_OPERATIONS = 2_000_000
"""Most operations of a pickle: the result of each can take a hundred times the memory of its bytes."""

_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "UntypedStorage": torch.uint8,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
}
_SHELLS = ("os", "posix", "nt", "sys", "subprocess")
"""Modules that no honest checkpoint names."""

_LOCAL_HEADER = 30
"""Bytes of a zip record before its name, its extra field and its content."""


class Container(dict[str, Any]):
    """Takes the place of any dictionary, set, class or function of a pickle: keeps items that have a name."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __setitem__(self, key: object, value: Any) -> None:
        # other keys are of no use, and the hash of tuples that are nested a million times ends the process
        if isinstance(key, str):
            super().__setitem__(key, value)

    def __call__(self, *args: object, **kwargs: object) -> Container:
        """Does nothing: what a function gave may be a function."""
        return self

    def append(self, item: object) -> None:
        """Forgets it."""

    def add(self, item: object) -> None:
        """Forgets it."""


def read_torch_file(path: Path) -> tuple[Any, str]:
    """Returns what was given to torch.save, and the first class that it needs and that is not made here.

    Tensors are mapped into memory and read when they are used.

    Raises:
        ValueError: it is another zip archive, or has something that no honest checkpoint has.
        Exception: it is damaged; almost any class there is.
    """
    with path.open("rb") as file, zipfile.ZipFile(file) as archive:
        infos = {info.filename: info for info in archive.infolist()}
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    pickles = [name for name in infos if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise ValueError(f"it is a zip archive of other things ({', '.join([*infos][:3])}): unpack it")
    root = pickles[0].removesuffix("data.pkl")
    if f"{root}constants.pkl" in infos:
        raise ValueError("it is a TorchScript program: load it, and save its state_dict() with torch.save")
    if any(info.compress_type != zipfile.ZIP_STORED for info in infos.values()):
        raise ValueError("it was packed again, with compression: unpack it, or pack it without ('zip -0')")
    spans = {name.removeprefix(root): _span(content, info) for name, info in infos.items()}
    if "byteorder" in spans and content[spans["byteorder"]] != b"little":
        raise ValueError("it was written by a machine with the other byte order")
    span = spans["data.pkl"]
    if span.stop - span.start > MOST_PICKLE_BYTES:
        raise ValueError(f"its pickle has more than {MOST_PICKLE_BYTES >> 20} MB, which no checkpoint needs")
    _count_operations(content[span])
    unpickler = _Unpickler(content, spans)
    return unpickler.load(), next(iter(unpickler.unknown), "")


def _count_operations(content: bytes) -> None:
    for count, (operation, argument, _) in enumerate(pickletools.genops(content)):
        if count >= MOST_OPERATIONS:
            raise ValueError(
                f"its pickle has more than {MOST_OPERATIONS} operations, which no checkpoint needs"
            )
        if operation.name.endswith("PUT") and (argument or 0) > count:
            raise ValueError("its pickle is damaged: it counts what it holds wrongly")


def _span(content: mmap.mmap, info: zipfile.ZipInfo) -> slice:
    """Returns where the bytes of a record are in the file."""
    header = content[info.header_offset : info.header_offset + _LOCAL_HEADER]
    name, extra = (int.from_bytes(header[at : at + 2], "little") for at in (26, 28))
    start = info.header_offset + _LOCAL_HEADER + name + extra
    if len(header) < _LOCAL_HEADER or start + info.file_size > len(content):
        raise ValueError(f"it is cut short: '{info.filename}' is not all there")
    return slice(start, start + info.file_size)


# The C version of the unpickler reserves memory for whatever number a damaged file names.
class _Unpickler(pickle._Unpickler):
    """Makes tensors and plain containers."""

    def __init__(self, content: mmap.mmap, spans: Mapping[str, slice]) -> None:
        super().__init__(io.BytesIO(content[spans["data.pkl"]]), encoding="utf-8")
        self._content = content
        self._spans = spans
        self.unknown: dict[str, None] = {}
        """What it names and is not made, in that order."""
        # bound methods, which no pickle can change
        self._makers: dict[tuple[str, str], Callable[..., Any]] = {
            ("torch", "Size"): torch.Size,
            ("torch._utils", "_rebuild_tensor"): self._tensor,
            ("torch._utils", "_rebuild_tensor_v2"): self._tensor,
            ("torch._utils", "_rebuild_tensor_v3"): self._tensor_of_type,
            ("torch._utils", "_rebuild_parameter"): self._parameter,
            ("torch._utils", "_rebuild_parameter_with_state"): self._parameter,
            ("torch._tensor", "_rebuild_from_type_v2"): self._subclass,
        }

    def find_class(self, module: str, name: str, /) -> Any:
        if module in _SHELLS:
            raise ValueError(f"it does more than hold tensors: it names {module}.{name}. Do not trust it")
        if (module, name) in self._makers:
            return self._makers[module, name]
        if module in ("torch", "torch.storage") and name in _STORAGES:
            return _STORAGES[name]
        value = getattr(torch, name, None) if module == "torch" else None
        if isinstance(value, torch.dtype):
            return value
        if (module, name) != ("collections", "OrderedDict"):
            self.unknown[f"{module}.{name}"] = None
        return Container

    def persistent_load(self, pid: Any) -> Tensor:
        """Returns the elements of a storage, in one row."""
        kind, dtype, key, _, count = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype):
            raise ValueError("it has tensors of an unknown kind")
        span = self._spans[f"data/{key}"]
        if not 0 <= count * dtype.itemsize <= span.stop - span.start:
            raise ValueError(f"it is damaged: 'data/{key}' has fewer bytes than its tensors")
        if count == 0:
            return torch.empty(0, dtype=dtype)
        return torch.frombuffer(self._content, dtype=dtype, count=count, offset=span.start)

    def _tensor(self, storage: Tensor, offset: int, size: Any, stride: Any, *_: object) -> Tensor:
        if math.prod(size) > storage.numel():
            raise ValueError("it is damaged: a tensor is larger than its storage")
        return storage.as_strided(size, stride, offset)

    def _tensor_of_type(self, storage: Tensor, offset: int, size: Any, stride: Any, *more: Any) -> Tensor:
        _requires_grad, _hooks, dtype, *_ = more
        return self._tensor(storage.view(dtype), offset, size, stride)

    def _parameter(self, data: Tensor, *_: object) -> Tensor:
        return data

    def _subclass(self, make: Callable[..., Any], kind: object, arguments: Any, state: object) -> Any:
        return make(*arguments)

    def _load_container(self) -> None:
        self.append(Container())  # type: ignore[attr-defined]

    def _forget_state(self) -> None:
        self.stack.pop()  # type: ignore[attr-defined]

    dispatch: ClassVar[dict[int, Any]] = {
        **pickle._Unpickler.dispatch,
        pickle.EMPTY_DICT[0]: _load_container,
        pickle.EMPTY_SET[0]: _load_container,
        pickle.BUILD[0]: _forget_state,
    }
    # other ways to make dictionaries and sets, and one that reserves memory before it reads
    for opcode in (pickle.DICT, pickle.FROZENSET, pickle.BYTEARRAY8):
        del dispatch[opcode[0]]
