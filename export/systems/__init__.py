"""Which graphs a system has: one module per system."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from export.systems.system import ExportSource


def open_source(
    path: Path, unet_head_width: int | None = None, dino_heads: int | None = None
) -> ExportSource:
    """Opens a checkpoint of any system.

    Args:
        path: .safetensors, .ckpt or .pth file.
        unet_head_width: channels per attention head of the UNet, where the file does not say.
        dino_heads: attention heads of the ID encoder, where the file does not say.

    Raises:
        CheckpointError: the file cannot be read, or is no checkpoint of a known system.
    """
    from export.systems.anydoor import AnyDoorSource
    from training.network.checkpoint import read_checkpoint

    return AnyDoorSource(read_checkpoint(path, unet_head_width, dino_heads))


def published_source(precision: str) -> ExportSource:
    """The network of the published AnyDoor checkpoint without weights, to export a skeleton from.

    Args:
        precision: fp32 or fp16.
    """
    from export.precision import TORCH_DTYPES
    from export.systems.anydoor import AnyDoorSource
    from training.network.architecture import Architecture

    return AnyDoorSource.without_weights(Architecture(), TORCH_DTYPES[precision])
