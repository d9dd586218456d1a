"""Makes the checkpoint that training starts from: Stable Diffusion and DINOv2, joined.

    python export/initialise.py --stable-diffusion v2-1_512-ema-pruned.ckpt \\
        --dinov2 dinov2_vitg14_pretrain.pth --output init.safetensors
    python export/initialise.py --system imprint --stable-diffusion 512-inpainting-ema.ckpt \\
        --dinov2 dinov2_vitg14_pretrain.pth --output imprint-start.safetensors

AnyDoor's detail ControlNet starts as a copy of the UNet's encoder with zero convolutions, so it changes
nothing before it is trained; the hint block and the projector start from random numbers. IMPRINT has neither:
its content adapter starts from random numbers, and its UNet is that of an inpainting model, or another one
that ignores the scene at first. The text encoder is left out. Source: tool_add_control_sd21.py of the
original; ControlNet (Zhang et al., 2023), section 3.1.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from engines.errors import AnyDoorError
from training.network.architecture import (
    Architecture,
    ArchitectureError,
    DiffusionArchitecture,
    infer_architecture,
)
from training.network.checkpoint import CheckpointError, write_checkpoint
from training.network.checkpoint_file import describe_differences
from training.network.checkpoint_keys import DINO_KEY, read_network
from training.network.imprint import Imprint, ImprintArchitecture, infer_imprint, with_scene
from training.network.modules import AnyDoor
from training.network.official_keys import PREFIXES, schedule_buffers

PROJECTOR = PREFIXES["id_encoder"] + "projector.weight"
_DINO = PREFIXES["id_encoder"] + "model."
_CLASS_TOKEN = "cls_token"
_FIRST, _LAST = PREFIXES["unet"] + "input_blocks.0.0.weight", PREFIXES["unet"] + "out.2.weight"
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
    tensors = _inherited(stable_diffusion, dinov2)
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()} | _projector_shape(tensors)
    try:
        architecture = infer_architecture(shapes, unet_head_width, dino_heads)
    except ArchitectureError as error:
        raise CheckpointError(f"the two files do not make an AnyDoor network: {error}") from error
    tensors |= _fresh(architecture, tensors, seed)
    with torch.device("meta"):
        expected = AnyDoor(architecture).official_shapes()
    _check(tensors, expected, "an AnyDoor")
    return schedule_buffers() | tensors, architecture


def join_imprint(
    stable_diffusion: Mapping[str, Tensor],
    dinov2: Mapping[str, Tensor],
    seed: int = 0,
    unet_head_width: int | None = None,
    dino_heads: int | None = None,
    adapter_layers: int = ImprintArchitecture.adapter_layers,
) -> tuple[dict[str, Tensor], ImprintArchitecture]:
    """Joins Stable Diffusion and DINOv2 to IMPRINT's network before it is trained.

    Args:
        stable_diffusion: see `join`; of an inpainting model, or of one whose UNet takes the latent alone.
        dinov2, seed, unet_head_width, dino_heads: see `join`.
        adapter_layers: of the content adapter.

    Returns:
        Official key -> tensor, with the noise schedule, and the network's sizes.

    Raises:
        CheckpointError: a weight is missing or has the wrong shape.
    """
    tensors = _inherited(stable_diffusion, dinov2)
    given = {"unet_head_width": unet_head_width, "dino_heads": dino_heads}
    try:
        tensors[_FIRST] = with_scene(tensors[_FIRST], tensors[_LAST].shape[0])
        shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()} | _projector_shape(tensors)
        settings = {name: value for name, value in given.items() if value is not None}
        architecture = replace(infer_imprint(shapes, settings), adapter_layers=adapter_layers)
    except (ArchitectureError, KeyError) as error:
        raise CheckpointError(f"the two files do not make an IMPRINT network: {error}") from error
    torch.manual_seed(seed)
    encoder = Imprint(replace(architecture, dino_depth=1), parts=["id_encoder"]).official_state_dict()
    tensors |= {key: encoder[key] for key in encoder if not key.startswith(_DINO)}
    with torch.device("meta"):
        expected = Imprint(architecture).official_shapes()
    _check(tensors, expected, "an IMPRINT")
    return schedule_buffers() | tensors, architecture


def _inherited(stable_diffusion: Mapping[str, Tensor], dinov2: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """UNet, autoencoder and image encoder under the names of our checkpoints."""
    if _CLASS_TOKEN not in dinov2:
        first = next(iter(dinov2), "none")
        raise CheckpointError(
            f"the DINOv2 checkpoint has no '{_CLASS_TOKEN}' (its first key is '{first}'): give one as Meta "
            "publishes it, like dinov2_vitg14_pretrain.pth"
        )
    kept = (PREFIXES["unet"], PREFIXES["vae"])
    tensors = {key: tensor for key, tensor in stable_diffusion.items() if key.startswith(kept)}
    tensors |= {_DINO + key: tensor for key, tensor in dinov2.items()}
    if _TOKEN_WIDTH_KEY not in tensors:
        raise CheckpointError(f"the Stable Diffusion checkpoint has no '{_TOKEN_WIDTH_KEY}'")
    return tensors


def _projector_shape(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Returns the shape of a projector that makes tokens as wide as the UNet takes them."""
    return {PROJECTOR: (tensors[_TOKEN_WIDTH_KEY].shape[1], 0)}


def _check(tensors: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]], name: str) -> None:
    problem = describe_differences({key: tuple(tensor.shape) for key, tensor in tensors.items()}, expected)
    if problem:
        raise CheckpointError(f"the two files do not make {name} network: {problem}")


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


JOINS: dict[str, Callable[..., tuple[dict[str, Tensor], DiffusionArchitecture]]] = {
    "anydoor": join,
    "imprint": join_imprint,
}
"""System -> what makes its start."""


def parser() -> argparse.ArgumentParser:
    """Defines the command line."""
    result = argparse.ArgumentParser(
        prog="initialise.py",
        description="Join Stable Diffusion and DINOv2 to the checkpoint that training starts from.",
        epilog="examples:\n  python export/initialise.py --stable-diffusion v2-1_512-ema-pruned.ckpt "
        "--dinov2 dinov2_vitg14_pretrain.pth --output init.safetensors\n"
        "  python export/initialise.py --system imprint --stable-diffusion 512-inpainting-ema.ckpt "
        "--dinov2 dinov2_vitg14_pretrain.pth --output imprint-start.safetensors\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.add_argument("--system", choices=JOINS, default="anydoor", help="what is to be trained")
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
        tensors, architecture = JOINS[options.system](
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
