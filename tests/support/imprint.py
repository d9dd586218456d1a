"""The smallest networks of IMPRINT, and a checkpoint in the layout of ObjectStitch's public code."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from runtime import Compositor
from tests.support.module_engine import module_compositor
from tests.support.shared import lock, shared_folder
from training.network.checkpoint import write_checkpoint
from training.network.imprint import UNCONDITIONAL, Imprint, ImprintArchitecture
from training.network.official_keys import schedule_buffers

TINY_IMPRINT = ImprintArchitecture(
    unet_channels=(32, 64),
    unet_attention=(False, True),
    unet_layers=1,
    unet_head_width=32,
    unet_norm_groups=8,
    token_width=32,
    vae_channels=(32, 32, 32, 32),
    vae_layers=1,
    dino_width=64,
    dino_depth=1,
    dino_heads=1,
    dino_grid=16,
    adapter_layers=1,
)

TINY_OBJECT_STITCH = replace(
    TINY_IMPRINT,
    unet_head_count=8,
    unet_linear_projection=False,
    id_backbone="clip",
    dino_depth=2,
    adapter_layers=2,
    scene_order="latents_keep",
    reference_background="black",
)


def tiny_imprint(architecture: ImprintArchitecture = TINY_IMPRINT, seed: int = 0) -> Imprint:
    torch.manual_seed(seed)
    return Imprint(architecture).eval()


def object_stitch_tensors(seed: int = 0) -> dict[str, Tensor]:
    """Tensors with the keys of the public code, which owns what it names apart from its image encoder.

    Its classes: LatentDiffusion (`learnable_vector`, `proj_out`) with a FrozenCLIPImageEmbedder
    (`transformer`, `mapper`, `final_ln`), in the repository's ldm/.
    """
    model = tiny_imprint(TINY_OBJECT_STITCH, seed)
    for weight in model.parameters():
        if weight.dim() == 1:
            nn.init.normal_(weight, mean=1.0 if weight.mean() > 0.5 else 0.0, std=0.1)
    tensors = model.official_state_dict()
    for name in ("weight", "bias"):
        tensors[f"proj_out.{name}"] = tensors.pop(f"cond_stage_model.projector.{name}")
    tensors[UNCONDITIONAL] = torch.randn(1, 1, TINY_OBJECT_STITCH.token_width)
    positions = torch.arange(TINY_OBJECT_STITCH.token_count)[None]
    tensors["cond_stage_model.transformer.vision_model.embeddings.position_ids"] = positions
    return schedule_buffers() | tensors


def object_stitch_file(path: Path) -> Path:
    """ObjectStitch.pth: a Lightning checkpoint."""
    torch.save({"state_dict": object_stitch_tensors(), "epoch": 39}, path)
    return path


def imprint_file(path: Path, model: Imprint | None = None) -> Path:
    """A checkpoint in our own layout."""
    model = model or tiny_imprint()
    write_checkpoint(path, schedule_buffers() | model.official_state_dict(), model.architecture)
    return path


def tiny_imprint_bundle() -> Path:
    """A bundle of `imprint_file`; do not write into it."""
    from export.build import build_bundle
    from export.options import BuildOptions
    from export.progress import Progress
    from export.systems import open_source

    path = shared_folder() / "imprint"
    with lock(path.with_suffix(".lock")):
        if not path.exists():
            checkpoint = imprint_file(path.with_suffix(".checkpoint"))
            build_bundle(open_source(checkpoint), path, BuildOptions(resolution=64), Progress(quiet=True))
    return path


def object_stitch_compositor(folder: Path) -> Compositor:
    """Of `object_stitch_file`, with pictures that are not square. Its graphs are PyTorch's."""
    from export.systems import open_source

    return module_compositor(open_source(object_stitch_file(folder / "ObjectStitch.pth")), folder, (64, 96))
