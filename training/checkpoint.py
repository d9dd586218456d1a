"""Writing a trained network as an official checkpoint, which `export/build_engines.py` reads."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from training.model import AnyDoor


def write_official(model: AnyDoor, path: Path, dtype: torch.dtype = torch.float16) -> None:
    """Writes all weights under their official names as safetensors.

    What shapes cannot tell, the widths of attention heads and the groups of normalisations, goes
    into the file's metadata.
    """
    tensors = {key: tensor.to(dtype).contiguous() for key, tensor in model.official_state_dict().items()}
    metadata = {
        "format": "pt",
        "anydoor.unet_head_width": str(model.architecture.unet_head_width),
        "anydoor.vae_norm_groups": str(model.architecture.vae_norm_groups),
        "anydoor.unet_norm_groups": str(model.architecture.unet_norm_groups),
        "anydoor.dino_heads": str(model.architecture.dino_heads),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.partial")
    save_file(tensors, beside, metadata)
    beside.replace(path)
