"""Which graphs a system has: one module per system."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from export.systems.system import ExportSource


def open_source(
    path: Path, unet_head_width: int | None = None, dino_heads: int | None = None, ema: bool = False
) -> ExportSource:
    """Opens a checkpoint of any system, which is found from its keys.

    Args:
        path: see `training.network.checkpoint_file.read_tensors`; or a folder in the layout of diffusers.
        unet_head_width: channels per attention head of the UNet, where the file does not say.
        dino_heads: attention heads of the ID encoder, where the file does not say.
        ema: take the averages of weights, of those that have one.

    Raises:
        CheckpointError: it cannot be read, is of no known system, or of one that has no graphs.
    """
    from export.systems.anydoor import AnyDoorSource
    from training.network.checkpoint import CheckpointError, read_checkpoint
    from training.network.stable_diffusion_checkpoint import is_stable_diffusion, read_stable_diffusion

    if is_stable_diffusion(path):
        raise CheckpointError(
            f"'{path}' is {read_stable_diffusion(path).describe()}. This system cannot be exported yet: give "
            "a checkpoint of AnyDoor"
        )
    return AnyDoorSource(read_checkpoint(path, unet_head_width, dino_heads, ema))


def published_source(precision: str) -> ExportSource:
    """The network of the published AnyDoor checkpoint without weights, to export a skeleton from.

    Args:
        precision: fp32 or fp16.
    """
    from export.precision import TORCH_DTYPES
    from export.systems.anydoor import AnyDoorSource
    from training.network.architecture import Architecture

    return AnyDoorSource.without_weights(Architecture(), TORCH_DTYPES[precision])
