"""Files of named tensors, .safetensors or written by torch.save, opened without running any of their code.

Tensors are mapped into memory and read when they are used; those of optimizer states never are.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from engines.errors import AnyDoorError


class CheckpointError(AnyDoorError):
    """The file is not a checkpoint that can be used, and why."""


_MOST_NAMED = 3
"""How many keys an error names before it says how many more there are."""


@dataclass(frozen=True)
class TensorFile:
    """The named tensors of a file, of whatever model."""

    tensors: Mapping[str, Tensor]
    shapes: Mapping[str, tuple[int, ...]]
    metadata: Mapping[str, str] = field(default_factory=dict)


def read_tensors(path: Path) -> TensorFile:
    """Opens a file of tensors without reading them.

    Raises:
        CheckpointError: there is no such file, it is damaged, or it holds no named tensors.
    """
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint at '{path}'")
    try:
        if path.suffix == ".safetensors":
            file = _SafetensorsFile(path)
            return TensorFile(file, file.shapes, file.metadata)
        content = _load_pickle(path)
    except (SafetensorError, OSError, RuntimeError, ValueError, EOFError) as error:
        raise CheckpointError(
            f"'{path}' cannot be read as a checkpoint ({str(error).splitlines()[0]}): it is damaged or "
            "incomplete, or not a .safetensors or torch.save file"
        ) from error
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping):
        raise CheckpointError(f"'{path}' holds no named tensors")
    tensors = {k: v for k, v in content.items() if isinstance(k, str) and isinstance(v, Tensor)}
    if not tensors:
        raise CheckpointError(f"'{path}' holds no named tensors")
    return TensorFile(tensors, {key: tuple(tensor.shape) for key, tensor in tensors.items()})


class LazyTensors(Mapping[str, Tensor]):
    """Named tensors that are read, and computed where need be, when they are asked for."""

    def __init__(self, readers: Mapping[str, Callable[[], Tensor]]) -> None:
        self.readers = readers

    def __getitem__(self, name: str) -> Tensor:
        return self.readers[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self.readers)

    def __len__(self) -> int:
        return len(self.readers)


def reader(tensors: Mapping[str, Tensor], name: str) -> Callable[[], Tensor]:
    """Reads one tensor when it is called."""
    return lambda: tensors[name]


class _SafetensorsFile(Mapping[str, Tensor]):
    """The tensors of a .safetensors file, each mapped into memory when it is asked for."""

    def __init__(self, path: Path) -> None:
        self._file = safe_open(path, framework="pt")
        self.metadata: dict[str, str] = self._file.metadata() or {}
        self.shapes = {key: tuple(self._file.get_slice(key).get_shape()) for key in self._file.keys()}  # noqa: SIM118

    def __getitem__(self, key: str) -> Tensor:
        if key not in self.shapes:
            raise KeyError(key)
        return self._file.get_tensor(key)  # type: ignore[no-any-return]

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


class _Placeholder:
    """Stands in for a class or function that a pickle names, and does nothing."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


def _load_pickle(path: Path) -> Any:
    """Unpickles tensors and plain containers; everything else that the file names becomes a placeholder.

    Lightning checkpoints name callbacks, paths and optimizers. None of that is imported or called.
    """
    import pickle
    import zipfile

    if not zipfile.is_zipfile(path):
        raise ValueError("it is not in the zip format that torch.save writes since PyTorch 1.6")
    placeholders: list[Any] = []
    for name in torch.serialization.get_unsafe_globals_in_checkpoint(str(path)):
        placeholders.append((type(name.rsplit(".", 1)[-1], (_Placeholder,), {}), name))
    try:
        with torch.serialization.safe_globals(placeholders):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise ValueError("its pickle is damaged or does more than hold tensors") from error


def describe_differences(
    shapes: Mapping[str, tuple[int, ...]],
    expected: Mapping[str, tuple[int, ...]],
    ignored: Collection[str] = (),
) -> str:
    """Says what is missing, unexpected (and not ignored) or mis-shaped; empty if nothing is."""
    missing = [key for key in expected if key not in shapes]
    unexpected = [key for key in shapes if key not in expected and key not in ignored]
    wrong = [key for key in expected if key in shapes and shapes[key] != expected[key]]
    problems = []
    if missing:
        problems.append(f"{len(missing)} of {len(expected)} keys are missing ({some_keys(missing)})")
    if unexpected:
        problems.append(f"{len(unexpected)} keys are unexpected ({some_keys(unexpected)})")
    if wrong:
        first = wrong[0]
        problems.append(
            f"{len(wrong)} tensors have the wrong shape ({some_keys(wrong)}; "
            f"'{first}' is {shapes[first]} and should be {expected[first]})"
        )
    return "; ".join(problems)


def check_finite(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Reads tensors once to see that each number is finite.

    Raises:
        CheckpointError: some are not; names them.
    """
    broken = [key for key, tensor in tensors.items() if not _all_finite(tensor)]
    if broken:
        raise CheckpointError(
            f"'{path}' has weights that are not finite numbers (NaN or infinity): {some_keys(broken)}"
        )


def some_keys(keys: Sequence[str]) -> str:
    """The first three keys, and how many more there are."""
    named = ", ".join(f"'{key}'" for key in keys[:_MOST_NAMED])
    return named + (f" and {len(keys) - _MOST_NAMED} more" if len(keys) > _MOST_NAMED else "")


def _all_finite(tensor: Tensor) -> bool:
    # minimum and maximum are NaN or infinite if any value is; no mask as large as the tensor is made
    return bool(torch.isfinite(torch.stack(torch.aminmax(tensor))).all()) if tensor.numel() else True
