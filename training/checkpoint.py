"""Official checkpoints: writing those that `export/build_engines.py` reads, and going on from one."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from training.network.architecture import (
    HIDDEN,
    Architecture,
    ArchitectureError,
    hidden_from_metadata,
    hidden_to_metadata,
    infer_architecture,
)
from training.network.modules import AnyDoor
from training.network.official_keys import schedule_buffers

_CONVERT = (
    "convert it first: python -c 'import sys, pathlib, training.network.checkpoint as e, safetensors.torch as s; "
    "s.save_file(dict(e.read_tensors(pathlib.Path(sys.argv[1])).tensors), sys.argv[2])' {} {}"
)


class CheckpointError(ValueError):
    """Training cannot go on from a file; the text says why."""


def write_checkpoint(path: str | Path, tensors: Mapping[str, Tensor], architecture: Architecture) -> None:
    """Writes a .safetensors checkpoint beside its place, then renames it.

    Args:
        path: where to.
        tensors: official key -> tensor; dtypes and values are kept bit for bit.
        architecture: what shapes cannot tell of it is kept as metadata.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    metadata = {"format": "pt"} | hidden_to_metadata(architecture)
    try:
        save_file({k: v.contiguous() for k, v in tensors.items()}, partial, metadata)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_model(path: str | Path, model: AnyDoor, dtype: torch.dtype = torch.float32) -> None:
    """Writes a network as an official checkpoint, complete, because the original refuses one that is not.

    Args:
        path: where to.
        model: with all of its parts.
        dtype: what its weights are rounded to. The noise schedule stays float32: in half precision its
            first steps would be the same.
    """
    weights = {key: tensor.to(dtype) for key, tensor in model.official_state_dict().items()}
    write_checkpoint(path, schedule_buffers() | weights, model.architecture)


def check_start(path: str | Path, architecture: Architecture) -> None:
    """Checks, without reading its weights, that training can go on from a checkpoint.

    Args:
        path: of a .safetensors file.
        architecture: what the recipe says. What neither shapes nor metadata tell is taken from it.

    Raises:
        CheckpointError: it is no such file, not complete, or of another architecture.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint at '{path}'")
    if path.suffix != ".safetensors":
        convert = _CONVERT.format(*(shlex.quote(str(p)) for p in (path, path.with_suffix(".safetensors"))))
        raise CheckpointError(f"training goes on from .safetensors files, not from '{path}': {convert}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise CheckpointError(f"'{path}' cannot be read ({error}): it is damaged or incomplete") from error
    try:
        hidden = {name: getattr(architecture, name) for name in HIDDEN} | hidden_from_metadata(metadata)
        found = infer_architecture(shapes, **hidden)
    except (LookupError, ArchitectureError) as error:
        raise CheckpointError(f"'{path}' is no AnyDoor network as the recipe's: {error}") from error
    for name in (each.name for each in fields(Architecture)):
        there, here = getattr(found, name), getattr(architecture, name)
        if there != here:
            raise CheckpointError(
                f"'{path}' is a network with {name} = {there!r}, the recipe's has {here!r}: "
                "change [architecture] or start from another checkpoint"
            )
    with torch.device("meta"):
        expected = AnyDoor(architecture).official_shapes()
    wrong = [key for key, shape in expected.items() if shapes.get(key) != shape]
    if wrong:
        raise CheckpointError(
            f"'{path}' is not complete: {len(wrong)} of {len(expected)} tensors are missing or have another "
            f"shape, the first is '{wrong[0]}'"
        )


def read_start(path: str | Path, architecture: Architecture) -> dict[str, Tensor]:
    """The tensors of a checkpoint that training goes on from, official key -> float32 tensor.

    Raises:
        CheckpointError: see `check_start`.
    """
    check_start(path, architecture)
    return {key: tensor.float() for key, tensor in load_file(path).items()}
