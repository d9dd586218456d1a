"""Makes the checkpoint that training starts from: Stable Diffusion 2.1 and DINOv2, joined.

    python export/initialise.py --stable-diffusion v2-1_512-ema-pruned.ckpt \\
        --dinov2 dinov2_vitg14_pretrain.pth --output init.safetensors

The detail ControlNet starts as a copy of the UNet's encoder with zero convolutions, so it changes nothing
before it is trained; the hint block and the projector start from random numbers. The text encoder is
left out. Source: tool_add_control_sd21.py of the original; ControlNet (Zhang et al., 2023), section 3.1.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from engines.errors import AnyDoorError
from training.network.architecture import Architecture, ArchitectureError, infer_architecture
from training.network.checkpoint import CheckpointError, compare_shapes, write_checkpoint
from training.network.checkpoint_keys import DINO_KEY, read_network
from training.network.modules import AnyDoor
from training.network.official_keys import PREFIXES, schedule_buffers

PROJECTOR = PREFIXES["id_encoder"] + "projector.weight"
_TOKEN_WIDTH_KEY = PREFIXES["unet"] + "middle_block.1.transformer_blocks.0.attn2.to_k.weight"


def join(
    stable_diffusion: Mapping[str, Tensor],
    dinov2: Mapping[str, Tensor],
    seed: int = 0,
    unet_head_width: int | None = None,
    dino_heads: int | None = None,
) -> tuple[dict[str, Tensor], Architecture]:
    """Joins Stable Diffusion and DINOv2 to an AnyDoor network that has not been trained yet.

    Args:
        stable_diffusion: tensors of SD 2.1 in the original layout; keys of other parts are ignored.
        dinov2: tensors of a DINOv2 encoder, as Meta publishes it.
        seed: of the random parts.
        unet_head_width: channels per attention head, 64 if None.
        dino_heads: heads of DINOv2, one per 64 channels if None.

    Returns:
        Official key -> tensor, with the noise schedule, and the network's sizes.

    Raises:
        CheckpointError: a weight is missing or has the wrong shape.
    """
    kept = (PREFIXES["unet"], PREFIXES["vae"])
    tensors = {key: tensor for key, tensor in stable_diffusion.items() if key.startswith(kept)}
    tensors |= {f"{PREFIXES['id_encoder']}model.{key}": tensor for key, tensor in dinov2.items()}
    if _TOKEN_WIDTH_KEY not in tensors:
        raise CheckpointError(f"the Stable Diffusion checkpoint has no '{_TOKEN_WIDTH_KEY}'")
    width = tensors[_TOKEN_WIDTH_KEY].shape[1]
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()} | {PROJECTOR: (width, 0)}
    try:
        architecture = infer_architecture(shapes, unet_head_width, dino_heads)
    except ArchitectureError as error:
        raise CheckpointError(f"the two files do not make an AnyDoor network: {error}") from error
    tensors |= _fresh(architecture, tensors, seed)
    with torch.device("meta"):
        expected = AnyDoor(architecture).official_shapes()
    problem = compare_shapes({key: tuple(tensor.shape) for key, tensor in tensors.items()}, expected)
    if problem:
        raise CheckpointError(f"the two files do not make an AnyDoor network: {problem}")
    return schedule_buffers() | tensors, architecture


def _fresh(architecture: Architecture, unet: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    """ControlNet and projector as they are before training."""
    torch.manual_seed(seed)
    control = AnyDoor(architecture, parts=["control"]).official_state_dict()
    for key, tensor in control.items():
        source = key.replace(PREFIXES["control"], PREFIXES["unet"])
        control[key] = unet[source].clone() if source in unet else tensor
    projector = torch.nn.Linear(architecture.dino_width, architecture.token_width)
    return control | {
        PROJECTOR: projector.weight.data,
        PROJECTOR.replace("weight", "bias"): projector.bias.data,
    }


def parser() -> argparse.ArgumentParser:
    """Defines the command line."""
    result = argparse.ArgumentParser(
        prog="initialise.py",
        description="Join Stable Diffusion 2.1 and DINOv2 to the checkpoint that training starts from.",
        epilog="example:\n  python export/initialise.py --stable-diffusion v2-1_512-ema-pruned.ckpt "
        "--dinov2 dinov2_vitg14_pretrain.pth --output init.safetensors\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.add_argument(
        "--stable-diffusion", type=Path, required=True, metavar="FILE", help="in the original layout"
    )
    result.add_argument(
        "--dinov2", type=Path, required=True, metavar="FILE", help="DINOv2 with SwiGLU (ViT-g/14)"
    )
    result.add_argument("--ema", action="store_true", help="take Stable Diffusion's averaged weights")
    result.add_argument("--output", type=Path, required=True, metavar="FILE.safetensors")
    result.add_argument("--seed", type=int, default=0, help="of the parts that start from random numbers")
    result.add_argument("--unet-head-width", type=int, metavar="N", help="channels per head (default: 64)")
    result.add_argument("--dino-heads", type=int, metavar="N", help="heads of DINOv2 (default: width / 64)")
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    options = parser().parse_args(arguments)
    try:
        tensors, architecture = join(
            read_network(options.stable_diffusion, ema=options.ema).file.tensors,
            read_network(options.dinov2, DINO_KEY).file.tensors,
            options.seed,
            options.unet_head_width,
            options.dino_heads,
        )
        write_checkpoint(options.output, tensors, architecture)
    except AnyDoorError as error:
        print(f"initialise.py: {error}", file=sys.stderr)
        return 2
    print(f"{options.output}: {len(tensors)} tensors")
    return 0


if __name__ == "__main__":
    sys.exit(main())
