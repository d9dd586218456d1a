"""Writing official checkpoints, which `export/build_engines.py` reads."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from training.architecture import Architecture, hidden_to_metadata
from training.model import AnyDoor


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


def write_model(path: str | Path, model: AnyDoor, dtype: torch.dtype = torch.float16) -> None:
    """Writes a network's weights under their official names, rounded to `dtype`."""
    tensors = {key: tensor.to(dtype) for key, tensor in model.official_state_dict().items()}
    write_checkpoint(path, tensors, model.architecture)
