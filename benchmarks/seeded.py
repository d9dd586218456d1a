"""Writes checkpoints with seeded weights, by the recipe that the golden data were recorded with.

    python benchmarks/seeded.py small SEED out.safetensors
    python benchmarks/seeded.py full SEED out.safetensors
    python benchmarks/seeded.py stable-diffusion-2-inpainting SEED FOLDER

A tensor depends on the seed, its official key and its shape alone. The weights are scaled so that every part
of the network has an effect and nothing overflows; the pictures look like noise. Stable Diffusion becomes a
folder in the layout of diffusers, because a file has no tokenizer.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from runtime.progress_bar import ProgressBar
from training.network.architecture import Architecture
from training.network.checkpoint import write_checkpoint
from training.network.modules import AnyDoor
from training.network.official_keys import schedule_buffers
from training.network.stable_diffusion import StableDiffusionArchitecture
from training.network.stable_diffusion_checkpoint import (
    official_shapes,
    read_stable_diffusion,
    write_folder,
)
from training.network.tokenizer_files import made_up_tokenizer

SMALL = Architecture(
    unet_channels=(32, 64, 96, 96),
    unet_head_width=8,
    token_width=64,
    vae_channels=(32, 64, 64, 64),
    dino_width=96,
    dino_depth=4,
    dino_heads=6,
)
"""The network of the golden cases."""

TINY = Architecture(
    unet_channels=(32, 64),
    unet_attention=(True, False),
    unet_layers=1,
    unet_head_width=8,
    token_width=32,
    vae_channels=(32, 32, 32, 32),
    vae_layers=1,
    dino_width=32,
    dino_depth=1,
    dino_heads=2,
)
"""The smallest network that has every kind of block; its bundle is built in less than a minute."""

ARCHITECTURES: Mapping[str, Architecture | StableDiffusionArchitecture] = {
    "tiny": TINY,
    "small": SMALL,
    "full": Architecture(),
    "stable-diffusion-small": StableDiffusionArchitecture(
        unet_channels=SMALL.unet_channels,
        unet_head_width=SMALL.unet_head_width,
        scene_channels=5,
        token_width=128,
        vae_channels=SMALL.vae_channels,
        text_width=128,
        text_layers=4,
        text_heads=2,
        text_mlp_width=512,
        text_vocabulary=1024,
    ),
    "stable-diffusion-2-inpainting": StableDiffusionArchitecture(scene_channels=5),
}

# (pattern of the key, gain); the first match counts; weight std = gain / sqrt(fan in)
GAINS = (
    (r"control_model\.input_hint_block\.14\.", 3.0),
    (r"control_model\.input_hint_block\.", 1.7),
    (r"control_model\.(zero_convs|middle_block_out)\.", 0.7),
    (r"(model\.diffusion_model|control_model)\..*\.(to_q|to_k)\.", 1.5),
    (r"(model\.diffusion_model|control_model)\..*\.emb_layers\.", 2.5),
    (r"first_stage_model\.decoder\.conv_out\.", 0.6),
)

# last part of the key -> (mean, std)
SPECIAL = {
    "gamma": (0.3, 0.05),
    "pos_embed": (0.0, 0.2),
    "cls_token": (0.0, 0.5),
    "mask_token": (0.0, 0.02),
    "bias": (0.0, 0.02),
    "in_proj_bias": (0.0, 0.02),
}
NORM_WEIGHT = (1.0, 0.1)


def seeded_tensor(key: str, shape: tuple[int, ...], seed: int) -> NDArray[np.float32]:
    """Return the weights of one official key, float32 of a shape."""
    digest = hashlib.sha256(f"{seed}:{key}".encode()).digest()
    generator = np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))
    values = generator.standard_normal(shape, dtype=np.float32)
    leaf = key.rsplit(".", 1)[-1]
    if leaf in SPECIAL or len(shape) == 1:
        mean, std = SPECIAL.get(leaf, NORM_WEIGHT)
        values *= np.float32(std)
        if mean:
            values += np.float32(mean)
        return values
    gain = next((gain for pattern, gain in GAINS if re.match(pattern, key)), 1.0)
    values *= np.float32(gain / np.sqrt(float(np.prod(shape[1:]))))
    return values


def seeded_checkpoint(
    path: Path, architecture: Architecture | StableDiffusionArchitecture, seed: int, quiet: bool = True
) -> None:
    """Write a checkpoint: a file in the official layout, or of Stable Diffusion a folder with a tokenizer."""
    if isinstance(architecture, StableDiffusionArchitecture):
        shapes = official_shapes(architecture)
    else:
        with torch.device("meta"):
            shapes = AnyDoor(architecture).official_shapes()
    tensors = {
        key: torch.from_numpy(seeded_tensor(key, shape, seed))
        for key, shape in ProgressBar(shapes.items(), desc="seeding", disable=quiet)
    }
    tensors |= schedule_buffers()
    if not isinstance(architecture, StableDiffusionArchitecture):
        write_checkpoint(path, tensors, architecture)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as temporary:
        file = Path(temporary) / "model.safetensors"
        write_checkpoint(file, tensors, architecture)
        checkpoint = read_stable_diffusion(file)
        tokenizer = made_up_tokenizer(architecture.text_vocabulary, checkpoint.pad)
        write_folder(path, replace(checkpoint, tokenizer=tokenizer))


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    result = argparse.ArgumentParser(
        prog="seeded.py",
        description="Write a checkpoint with seeded weights.",
        epilog="examples:\n"
        "  python benchmarks/seeded.py small 0 small.safetensors\n"
        "  python benchmarks/seeded.py stable-diffusion-2-inpainting 0 sd2-inpainting\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.add_argument("size", choices=list(ARCHITECTURES), help="of the network")
    result.add_argument("seed", type=int, metavar="SEED", help="a whole number")
    result.add_argument(
        "output",
        type=Path,
        metavar="FILE.safetensors",
        help="where to write it; of Stable Diffusion a folder",
    )
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Write a checkpoint; returns the exit code."""
    options = parser().parse_args(arguments)
    try:
        seeded_checkpoint(options.output, ARCHITECTURES[options.size], options.seed, quiet=False)
    except OSError as error:
        print(f"seeded.py: cannot write '{options.output}': {error.strerror or error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
