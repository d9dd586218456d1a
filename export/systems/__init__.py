"""Defines the graphs of each system, one module per system."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from export.options import NOTHING_GIVEN, SourceOptions

if TYPE_CHECKING:
    from export.systems.system import ExportSource


def open_source(path: Path, options: SourceOptions = NOTHING_GIVEN) -> ExportSource:
    """Opens a checkpoint of any system, which is found from its keys.

    Args:
        path: see `training.network.checkpoint_file.read_tensors`; or a folder in the layout of diffusers.
        options: what the checkpoint does not say, and what goes into it.

    Raises:
        CheckpointError: it cannot be read, or is of no known system.
        AnyDoorError: an option does not go with its system.
    """
    from export.systems.anydoor import AnyDoorSource
    from export.systems.imprint import ImprintSource
    from export.systems.stable_diffusion import StableDiffusionSource
    from training.network.checkpoint import read_checkpoint
    from training.network.imprint import ImprintArchitecture
    from training.network.stable_diffusion_checkpoint import is_stable_diffusion

    if is_stable_diffusion(path):
        return StableDiffusionSource.open(path, options)
    checkpoint = read_checkpoint(path, options.unet_head_width, options.dino_heads, bool(options.ema))
    is_imprint = isinstance(checkpoint.architecture, ImprintArchitecture)
    options.require(
        "IMPRINT" if is_imprint else "AnyDoor", "unet_head_width", "dino_heads", "ema", "references"
    )
    source = ImprintSource if is_imprint else AnyDoorSource
    return source(checkpoint, options.references or 1)


def published_source(precision: str, system: str = "anydoor") -> ExportSource:
    """Returns a published network without weights, to export a skeleton from.

    Args:
        precision: fp32 or fp16.
        system: anydoor, or stable_diffusion: 2.x for inpainting.
    """
    from export.precision import TORCH_DTYPES
    from export.systems.anydoor import AnyDoorSource
    from export.systems.stable_diffusion import StableDiffusionSource
    from training.network.architecture import Architecture
    from training.network.stable_diffusion import StableDiffusionArchitecture

    dtype = TORCH_DTYPES[precision]
    if system == StableDiffusionSource.system:
        return StableDiffusionSource.without_weights(StableDiffusionArchitecture(scene_channels=5), dtype)
    return AnyDoorSource.without_weights(Architecture(), dtype)
