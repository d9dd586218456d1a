"""Opens files of named tensors without running their code: .safetensors and what torch.save wrote, whole or
sharded. The content determines the kind, not the file name.

Tensors are mapped into memory and read when they are used; those of optimizer states never are. What training
wraps around a network is taken off: dictionaries around its tensors, and names of wrappers in their keys.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from engines.bundle import no_checkpoint
from engines.errors import AnyDoorError
from training.network.file_kinds import CHECKPOINT, INDEX, kind_of
from training.network.torch_file import read_torch_file


class CheckpointError(AnyDoorError):
    """The file is not a checkpoint that can be used, and why."""


_MOST_NAMED = 3
"""How many keys an error names before it says how many more there are."""

_DICTIONARIES = ("state_dict", "model", "module", "model_state_dict")
"""Names under which training saves the tensors of a network; the first that is there is meant."""

_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
"""Parts of keys that wrappers put there: DataParallel, torch.compile, FSDP and checkpointing."""

_EIGHT_BITS = {torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz}

_DEEPEST = 8
"""Dictionaries within dictionaries that are opened."""

_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})(\.\w+)")
_SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
_LARGEST_INDEX = 64 << 20


@dataclass(frozen=True)
class TensorFile:
    """The named tensors of a file, of whatever model."""

    tensors: Mapping[str, Tensor]
    """Those in eight bits of floating point are widened to float16, which is exact."""
    shapes: Mapping[str, tuple[int, ...]]
    metadata: Mapping[str, str] = field(default_factory=dict)
    paths: tuple[Path, ...] = ()
    """Where they are."""

    def renamed(self, names: Mapping[str, str]) -> TensorFile:
        """Returns some of its tensors: new name -> name in this file."""
        tensors = LazyTensors({new: reader(self.tensors, old) for new, old in names.items()})
        shapes = {new: self.shapes[old] for new, old in names.items()}
        return TensorFile(tensors, shapes, self.metadata, self.paths)


def read_tensors(path: Path) -> TensorFile:
    """Opens a file of tensors without reading them.

    Args:
        path: a file; or the index of a checkpoint in shards, or the folder that holds one checkpoint.

    Raises:
        CheckpointError: there is no such file, it is damaged, it is something else, or it holds no named
            tensors.
    """
    path = find_file(path)
    if (match := _SHARD.fullmatch(path.name)) and int(match[3]) > 1:
        raise CheckpointError(
            f"'{path}' is part {int(match[2])} of {int(match[3])} of a checkpoint: give its folder, or the "
            f"index '{match[1]}{match[4]}.index.json'"
        )
    file = _open_index(path) if _kind_of(path) == INDEX else _open(path)
    names: dict[str, str] = {}
    for key in file.shapes:
        name = ".".join(part for part in key.split(".") if part not in _WRAPPERS)
        if name in names:
            raise CheckpointError(f"'{path}' has two tensors '{name}': '{names[name]}' and '{key}'")
        names[name] = key
    return file.renamed(names)


def weight_files(path: Path) -> tuple[Path, ...]:
    """Returns the files with the tensors of a checkpoint, which may be a folder in the layout of diffusers.

    Raises:
        CheckpointError: see `read_tensors`.
    """
    if (path / "unet").is_dir():
        return tuple(sorted(file for file in path.rglob("*") if file.name.lower().endswith(_SUFFIXES)))
    return read_tensors(path).paths


def find_file(path: Path) -> Path:
    """Returns the path itself; of a folder, the one checkpoint in it or the index of its shards.

    Raises:
        CheckpointError: there is no checkpoint, or there are several.
    """
    if not path.is_dir():
        if not path.is_file():
            raise CheckpointError(no_checkpoint(path))
        return path
    names = sorted(file.name for file in path.iterdir() if file.is_file())
    if "zero_to_fp32.py" in names or ".metadata" in names:
        raise CheckpointError(
            f"'{path}' is a checkpoint that several processes wrote: join it with DeepSpeed's "
            "zero_to_fp32.py or torch.distributed.checkpoint.format_utils"
        )
    indexes = [name for name in names if name.endswith(".index.json")]
    shards = [name for name in names if _SHARD.fullmatch(name)]
    others = [name for name in names if name.lower().endswith(_SUFFIXES) and name not in shards]
    found = [name for name in indexes if ".safetensors" in name] or indexes or others
    if len(found) == 1:
        return path / found[0]
    if found:
        raise CheckpointError(f"'{path}' holds {len(found)} checkpoints: name one of {', '.join(found)}")
    what = "shards without their index (.index.json)" if shards else "no checkpoint"
    raise CheckpointError(f"'{path}' holds {what}")


def _kind_of(path: Path) -> str:
    try:
        return kind_of(path)
    except OSError as error:
        raise CheckpointError(f"'{path}' cannot be read: {error.strerror}") from error


def _open(path: Path) -> TensorFile:
    """Opens one file."""
    if not path.is_file():
        raise CheckpointError(no_checkpoint(path))
    try:
        kind = kind_of(path)
        if kind == CHECKPOINT["safetensors"]:
            file = _SafetensorsFile(path)
            return TensorFile(file, file.shapes, file.metadata, (path,))
        if kind != CHECKPOINT["torch"]:
            raise ValueError(kind)
        content, unknown = read_torch_file(path)
    except Exception as error:
        # on a damaged file the readers raise almost any class there is
        text = (str(error) or repr(error)).splitlines()[0]
        damaged = "" if type(error) is ValueError else ": it is damaged or incomplete"
        raise CheckpointError(f"'{path}' cannot be read as a checkpoint ({text}){damaged}") from error
    tensors = dict(_named_tensors(content, "", (), set()))
    if not tensors:
        what = f"an object of the class {unknown}" if unknown else f"a {type(content).__name__}"
        raise CheckpointError(f"'{path}' holds no named tensors but {what}: save its state_dict()")
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    return TensorFile(_Widened(tensors), shapes, {}, (path,))


def _named_tensors(
    content: object, prefix: str, within: tuple[str, ...], seen: set[int]
) -> Iterator[tuple[str, Tensor]]:
    """Yields the tensors of nested dictionaries, but for those of optimizers, with the names of the
    dictionaries."""
    if not isinstance(content, Mapping) or id(content) in seen or len(within) > _DEEPEST:
        return
    seen.add(id(content))
    wrapper = next((name for name in _DICTIONARIES if isinstance(content.get(name), Mapping)), "")
    for key, value in content.items():
        if not isinstance(key, str) or key.startswith("optimizer"):
            continue
        if isinstance(value, Tensor):
            yield prefix + key, value
        else:
            named = prefix if key == wrapper else f"{prefix}{key}."
            yield from _named_tensors(value, named, (*within, key), seen)


def _open_index(index: Path) -> TensorFile:
    """Opens the files that an index names."""
    try:
        content = json.loads(index.read_bytes()) if index.stat().st_size <= _LARGEST_INDEX else None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"'{index}' cannot be read as an index of shards") from error
    places = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise CheckpointError(f"'{index}' is not an index of shards: it has no weight_map")
    files = {}
    for name in sorted(set(places.values())):
        if not name or Path(name).name != name:
            raise CheckpointError(f"'{index}' names the shard '{name}', which is not in its folder")
        files[name] = _open(index.with_name(name))
    lost = [key for key, name in places.items() if key not in files[name].shapes]
    if lost:
        raise CheckpointError(f"'{index}' says that '{places[lost[0]]}' has '{lost[0]}', and it has not")
    tensors = LazyTensors({key: reader(files[name].tensors, key) for key, name in places.items()})
    shapes = {key: files[name].shapes[key] for key, name in places.items()}
    metadata = {name: text for file in files.values() for name, text in file.metadata.items()}
    # what the index says counts: a shard may be another model's, which shares weights
    own = content.get("metadata") if isinstance(content, dict) else None
    metadata |= {
        name: text for name, text in (own if isinstance(own, dict) else {}).items() if isinstance(text, str)
    }
    return TensorFile(
        tensors, shapes, metadata, tuple(path for file in files.values() for path in file.paths)
    )


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
        return _widen(self._file.get_tensor(key))

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


class _Widened(Mapping[str, Tensor]):
    """Tensors that are as wide as arithmetic needs them."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    def __getitem__(self, key: str) -> Tensor:
        return _widen(self._tensors[key])

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def _widen(tensor: Tensor) -> Tensor:
    return tensor.half() if tensor.dtype in _EIGHT_BITS else tensor


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
    """Reads tensors once to see that each is of floating-point numbers, and that they are finite.

    Raises:
        CheckpointError: some are not; names them.
    """
    for key, tensor in tensors.items():
        if not tensor.is_floating_point() or tensor.dtype.itemsize < 2:
            kind = str(tensor.dtype).removeprefix("torch.")
            raise CheckpointError(
                f"'{path}' has weights of {kind} ('{key}'), so it is quantised: give it as float32, float16, "
                "bfloat16 or float8"
            )
    broken = [key for key, tensor in tensors.items() if not _all_finite(tensor)]
    if broken:
        raise CheckpointError(
            f"'{path}' has weights that are not finite numbers (NaN or infinity): {some_keys(broken)}"
        )


def some_keys(keys: Sequence[str]) -> str:
    """Returns the first three keys, and how many more there are."""
    named = ", ".join(f"'{key}'" for key in keys[:_MOST_NAMED])
    return named + (f" and {len(keys) - _MOST_NAMED} more" if len(keys) > _MOST_NAMED else "")


def _all_finite(tensor: Tensor) -> bool:
    # minimum and maximum are NaN or infinite if any value is; no mask as large as the tensor is made
    return bool(torch.isfinite(torch.stack(torch.aminmax(tensor))).all()) if tensor.numel() else True
