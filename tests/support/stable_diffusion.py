"""Small Stable Diffusion checkpoints with random weights, made by diffusers and transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel

from runtime.systems.tokenizer import END, START
from tests.support.shared import lock, shared_folder, traced_once
from tests.support.vocabulary import clip_tokenizer, learned_merges
from training.network.stable_diffusion_checkpoint import read_stable_diffusion, write_single_file

Version = Literal["1.x", "2.x"]

WIDTH = 64
"""Of the tokens."""

# the number of heads, which diffusers calls their width: 8 per level, or one per 64 channels
UNET: dict[str, dict[str, Any]] = {
    "1.x": {"attention_head_dim": 8, "use_linear_projection": False},
    "2.x": {"attention_head_dim": (1, 2), "use_linear_projection": True},
}


@cache
def pipeline(
    version: Version, inpaint: bool = False, prediction_type: str = "epsilon"
) -> StableDiffusionPipeline | StableDiffusionInpaintPipeline:
    """A pipeline; the same weights at every call."""
    torch.manual_seed(0)
    tokenizer = clip_tokenizer(
        learned_merges(), **({} if version == "1.x" else {"pad": "!", "any_case": (START, END)})
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(32, 64),
        layers_per_block=1,
    )
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            hidden_size=WIDTH,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=1,
            vocab_size=len(tokenizer),
            hidden_act="quick_gelu" if version == "1.x" else "gelu",
            bos_token_id=len(tokenizer) - 2,
            eos_token_id=len(tokenizer) - 1,
        )
    )
    # last, so that the others are the same for any number of its channels
    unet = UNet2DConditionModel(
        sample_size=64,
        in_channels=9 if inpaint else 4,
        block_out_channels=(64, 128),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=WIDTH,
        **UNET[version],
    )
    kind = StableDiffusionInpaintPipeline if inpaint else StableDiffusionPipeline
    return kind(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
            prediction_type=prediction_type,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def weights(pipe: Any) -> dict[str, dict[str, torch.Tensor]]:
    """Part -> its state_dict."""
    return {part: getattr(pipe, part).state_dict() for part in ("unet", "vae", "text_encoder")}


def folder(path: Path, version: Version = "1.x", **options: Any) -> Path:
    """A checkpoint in the layout of diffusers."""
    pipeline(version).save_pretrained(path, **options)
    return path


def single_file(path: Path, version: Version = "1.x") -> Path:
    """A checkpoint in the original layout, with what published files have and nobody needs."""
    write_single_file(path, read_stable_diffusion(folder(path.parent / "source", version)))
    tensors = load_file(path)
    tensors["model_ema.decay"] = torch.zeros(())
    if version == "1.x":
        tensors["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    else:
        last = {key for key in tensors if "resblocks.1." in key}
        tensors |= {key.replace("resblocks.1.", "resblocks.2."): tensors[key].clone() for key in last}
        tensors["cond_stage_model.model.text_projection"] = torch.zeros(64, 64)
        tensors["cond_stage_model.model.logit_scale"] = torch.zeros(())
    save_file(tensors, path)
    return path


def tiny_stable_diffusion_bundle(
    channels: Literal[4, 9] = 4,
    prediction: Literal["epsilon", "v"] = "epsilon",
    version: Version = "2.x",
    resolution: int | tuple[int, int] = 64,
) -> Path:
    """A bundle with the weights of `pipeline`; do not write into it.

    The two that most tests take are built together, because they differ in one graph.
    """
    how = prediction, version, resolution
    together = (4, 9) if how == ("epsilon", "2.x", 64) else (channels,)
    with lock(shared_folder() / "stable-diffusion.lock"), traced_once():
        return {each: _bundle(each, *how) for each in together}[channels]


def _bundle(channels: int, prediction: str, version: Version, resolution: int | tuple[int, int]) -> Path:
    from export.build import build_bundle
    from export.options import BuildOptions
    from export.progress import Progress
    from export.systems import open_source

    size = str(resolution).strip("()").replace(", ", "x")
    path = shared_folder() / "-".join(("stable-diffusion", version, str(channels), prediction, size))
    if not path.exists():
        checkpoint = path.with_name(f"{path.name}-checkpoint")
        pipe = pipeline(version, channels == 9, "v_prediction" if prediction == "v" else "epsilon")
        pipe.save_pretrained(checkpoint)
        build_bundle(open_source(checkpoint), path, BuildOptions(resolution=resolution), Progress(quiet=True))
    return path


def change_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text("utf-8"))
    change(content)
    path.write_text(json.dumps(content), "utf-8")
