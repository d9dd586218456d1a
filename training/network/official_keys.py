"""Maps the tensor names of official checkpoints to the modules of diffusers and transformers.

A table of renamings, applied to our names. Two things are more than a new name: DINOv2 and OpenCLIP keep
query, key and value in one tensor, and DINOv2 the SwiGLU's two inputs in another; and the VAE's attention
stores its linear layers as 1 x 1 convolutions. Both ways are exact, so a checkpoint survives the round trip
bit for bit.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from runtime.diffusion.noise_schedule import betas
from training.network.architecture import DiffusionArchitecture

PREFIXES = {
    "unet": "model.diffusion_model.",
    "control": "control_model.",
    "vae": "first_stage_model.",
    "id_encoder": "cond_stage_model.",
}
"""Part of `AnyDoor` -> prefix of its official keys."""

CLIP_PREFIX = "cond_stage_model.transformer.text_model."
"""Prefix of the text encoder of Stable Diffusion 1.x, CLIP's, with the names of transformers."""
CLIP_VISION_PREFIX = "cond_stage_model.transformer.vision_model."
"""Prefix of CLIP's image encoder, as in ObjectStitch, with the names of transformers."""
OPENCLIP_PREFIX = "cond_stage_model.model."
"""Prefix of the text encoder of Stable Diffusion 2.x, OpenCLIP's; AnyDoor's DINOv2 has the same."""

SCHEDULE_KEYS = (
    "betas",
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
    "posterior_variance",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
    "logvar",
)
"""Buffers of the noise schedule at the top of an official checkpoint; all follow from `alphas_cumprod`."""

_RESIDUAL_BLOCK = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}

_VAE_RULES = (
    (r"\.conv_norm_out\.", ".norm_out."),
    (r"\.down_blocks\.(\d+)\.resnets\.", r".down.\1.block."),
    (r"\.down_blocks\.(\d+)\.downsamplers\.0\.", r".down.\1.downsample."),
    (r"\.mid_block\.resnets\.0\.", ".mid.block_1."),
    (r"\.mid_block\.resnets\.1\.", ".mid.block_2."),
    (r"\.mid_block\.attentions\.0\.group_norm\.", ".mid.attn_1.norm."),
    (r"\.mid_block\.attentions\.0\.to_([qkv])\.", r".mid.attn_1.\1."),
    (r"\.mid_block\.attentions\.0\.to_out\.0\.", ".mid.attn_1.proj_out."),
    (r"\.conv_shortcut\.", ".nin_shortcut."),
)

_DINO_RULES = (
    (r"^dino\.embeddings\.cls_token$", "model.cls_token"),
    (r"^dino\.embeddings\.mask_token$", "model.mask_token"),
    (r"^dino\.embeddings\.position_embeddings$", "model.pos_embed"),
    (r"^dino\.embeddings\.patch_embeddings\.projection\.", "model.patch_embed.proj."),
    (r"^dino\.encoder\.layer\.", "model.blocks."),
    (r"^dino\.layernorm\.", "model.norm."),
    (r"\.attention\.[qkv]_proj\.", ".attn.qkv."),
    (r"\.attention\.o_proj\.", ".attn.proj."),
    (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
    (r"\.mlp\.(gate|up)_proj\.", ".mlp.w12."),
    (r"\.mlp\.down_proj\.", ".mlp.w3."),
    # IMPRINT's content adapter, under the names of ObjectStitch's public reimplementation
    (r"^projector\.norm\.", "final_ln."),
    (r"^projector\.blocks\.", "mapper.resblocks."),
    (r"^(mapper\.resblocks\.\d+)\.norm([12])\.", r"\1.ln_\2."),
    (r"^(mapper\.resblocks\.\d+)\.qkv\.", r"\1.attn.c_qkv."),
    (r"^(mapper\.resblocks\.\d+)\.out\.", r"\1.attn.c_proj."),
    (r"^(mapper\.resblocks\.\d+)\.mlp\.0\.", r"\1.mlp.c_fc."),
    (r"^(mapper\.resblocks\.\d+)\.mlp\.2\.", r"\1.mlp.c_proj."),
)

_OPENCLIP_RULES = (
    (r"^embeddings\.token_embedding\.", "token_embedding."),
    (r"^embeddings\.position_embedding\.weight$", "positional_embedding"),
    (r"^encoder\.layers\.", "transformer.resblocks."),
    (r"^final_layer_norm\.", "ln_final."),
    (r"\.layer_norm([12])\.", r".ln_\1."),
    (r"\.self_attn\.[qkv]_proj\.", ".attn.in_proj_"),
    (r"\.self_attn\.out_proj\.", ".attn.out_proj."),
    (r"\.mlp\.fc1\.", ".mlp.c_fc."),
    (r"\.mlp\.fc2\.", ".mlp.c_proj."),
)

_PARTS_OF_FUSED = {
    "q_proj": (0, 3),
    "k_proj": (1, 3),
    "v_proj": (2, 3),
    "gate_proj": (0, 2),
    "up_proj": (1, 2),
}


@dataclass(frozen=True)
class OfficialTensor:
    """Where one of our tensors lives in an official checkpoint."""

    key: str
    part: int = 0
    parts: int = 1
    """Our tensor is part `part` of `parts` equal ones along the first axis."""


def official_tensor(part: str, name: str, architecture: DiffusionArchitecture) -> OfficialTensor:
    """Finds the official place of a tensor.

    Args:
        part: a key of `PREFIXES`, or clip or openclip for a text encoder.
        name: the tensor's name in the state_dict of that part.
        architecture: which blocks have attention.
    """
    if part == "clip":
        return OfficialTensor(CLIP_PREFIX + name)
    if part == "id_encoder" and name.startswith("clip."):
        return OfficialTensor(CLIP_VISION_PREFIX + name.removeprefix("clip."))
    if part in ("id_encoder", "openclip"):
        prefix, rules = {
            "id_encoder": (PREFIXES["id_encoder"], _DINO_RULES),
            "openclip": (OPENCLIP_PREFIX, _OPENCLIP_RULES),
        }[part]
        fused = next((v for k, v in _PARTS_OF_FUSED.items() if f".{k}." in name), (0, 1))
        return OfficialTensor(prefix + _substitute(name, rules), *fused)
    if part == "vae":
        return OfficialTensor(PREFIXES[part] + _vae_name(name, len(architecture.vae_channels)))
    return OfficialTensor(PREFIXES[part] + _unet_name(name, architecture))


def to_official(
    part: str, tensors: Mapping[str, torch.Tensor], architecture: DiffusionArchitecture
) -> dict[str, torch.Tensor]:
    """Gives the state_dict of one part under its official names."""
    pieces: dict[str, dict[int, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        place = official_tensor(part, name, architecture)
        is_convolution = part == "vae" and re.search(r"\.attn_1\.(q|k|v|proj_out)\.weight$", place.key)
        piece = tensor[:, :, None, None] if is_convolution else tensor
        pieces.setdefault(place.key, {})[place.part] = piece
    return {
        key: torch.cat([parts[i] for i in range(len(parts))]) if len(parts) > 1 else parts[0]
        for key, parts in pieces.items()
    }


def from_official(
    part: str,
    names: Mapping[str, torch.Size],
    tensors: Mapping[str, torch.Tensor],
    architecture: DiffusionArchitecture,
) -> dict[str, torch.Tensor]:
    """Gives the tensors of one part under our names, as views of the official ones where possible.

    Args:
        part: see `official_tensor`.
        names: our tensor name -> shape, as in the state_dict of the part.
        tensors: official key -> tensor; has every key that is needed.
        architecture: sizes of the network.
    """
    result = {}
    for name, shape in names.items():
        place = official_tensor(part, name, architecture)
        result[name] = tensors[place.key].chunk(place.parts)[place.part].reshape(shape)
    return result


def expected_shapes(
    part: str, names: Mapping[str, torch.Size], architecture: DiffusionArchitecture
) -> dict[str, tuple[int, ...]]:
    """Maps official key -> shape, for one part of a network of this architecture."""
    with torch.device("meta"):
        empty = {name: torch.empty(shape) for name, shape in names.items()}
    return {k: tuple(v.shape) for k, v in to_official(part, empty, architecture).items()}


def _substitute(name: str, rules: Iterable[tuple[str, str]]) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def _vae_name(name: str, levels: int) -> str:
    def count_from_the_top(match: re.Match[str]) -> str:
        kind = "block." if match[2] == "resnets." else "upsample."
        return f".up.{levels - 1 - int(match[1])}.{kind}"

    # the original numbers the decoder's levels as it numbers the encoder's, diffusers in order of execution
    name = re.sub(r"\.up_blocks\.(\d+)\.(resnets\.|upsamplers\.0\.)", count_from_the_top, name)
    return _substitute(name, _VAE_RULES)


def _unet_name(name: str, architecture: DiffusionArchitecture) -> str:
    """UNet and ControlNet: the original numbers all blocks of a side in one row."""
    per_level = architecture.unet_layers + 1
    stem, _, rest = name.partition(".")
    if stem == "time_embedding":
        return rest.replace("linear_1", "time_embed.0").replace("linear_2", "time_embed.2")
    flat = {"conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}
    flat["controlnet_mid_block"] = "middle_block_out.0"
    if stem in flat:
        return f"{flat[stem]}.{rest}"
    if stem == "controlnet_down_blocks":
        index, _, leaf = rest.partition(".")
        return f"zero_convs.{index}.0.{leaf}"
    if stem == "controlnet_cond_embedding":
        return _hint_block_name(rest)
    if stem == "mid_block":
        kind, index, leaf = rest.split(".", 2)
        position = 1 if kind == "attentions" else 2 * int(index)
        return f"middle_block.{position}.{_inside(kind, leaf)}"
    level, kind, index, leaf = rest.split(".", 3)
    if stem == "down_blocks":
        if kind == "downsamplers":
            return f"input_blocks.{(int(level) + 1) * per_level}.0.op.{leaf.removeprefix('conv.')}"
        block = 1 + int(level) * per_level + int(index)
        return f"input_blocks.{block}.{int(kind == 'attentions')}.{_inside(kind, leaf)}"
    if kind == "upsamplers":
        position = 2 if architecture.unet_attention[::-1][int(level)] else 1
        return f"output_blocks.{(int(level) + 1) * per_level - 1}.{position}.{leaf}"
    block = int(level) * per_level + int(index)
    return f"output_blocks.{block}.{int(kind == 'attentions')}.{_inside(kind, leaf)}"


def _inside(kind: str, leaf: str) -> str:
    """Returns names inside a residual block; those inside a transformer are the same on both sides."""
    if kind == "attentions":
        return leaf
    layer, _, tensor = leaf.partition(".")
    return f"{_RESIDUAL_BLOCK[layer]}.{tensor}"


def _hint_block_name(rest: str) -> str:
    """Returns the hint block is one row of convolutions with an activation after each but the last."""
    stem, _, leaf = rest.partition(".")
    if stem == "conv_in":
        return f"input_hint_block.0.{leaf}"
    if stem == "conv_out":
        return f"input_hint_block.14.{leaf}"
    index, _, leaf = leaf.partition(".")
    return f"input_hint_block.{2 * (int(index) + 1)}.{leaf}"


def schedule_buffers() -> dict[str, torch.Tensor]:
    """Computes the noise schedule's buffers as an official checkpoint has them, each (1000,) float32.

    The original computes them in float64 from the betas and rounds at the end (ldm/models/diffusion/ddpm.py,
    register_schedule), and refuses a checkpoint without them.
    """
    beta = betas()
    alpha = 1.0 - beta
    now = np.cumprod(alpha)
    before = np.append(1.0, now[:-1])
    variance = beta * (1.0 - before) / (1.0 - now)
    buffers = {
        "betas": beta,
        "alphas_cumprod": now,
        "alphas_cumprod_prev": before,
        "sqrt_alphas_cumprod": np.sqrt(now),
        "sqrt_one_minus_alphas_cumprod": np.sqrt(1.0 - now),
        "log_one_minus_alphas_cumprod": np.log(1.0 - now),
        "sqrt_recip_alphas_cumprod": np.sqrt(1.0 / now),
        "sqrt_recipm1_alphas_cumprod": np.sqrt(1.0 / now - 1),
        "posterior_variance": variance,
        # the first variance is 0, and its logarithm is cut off
        "posterior_log_variance_clipped": np.log(np.maximum(variance, 1e-20)),
        "posterior_mean_coef1": beta * np.sqrt(before) / (1.0 - now),
        "posterior_mean_coef2": (1.0 - before) * np.sqrt(alpha) / (1.0 - now),
        "logvar": np.zeros_like(beta),
    }
    return {key: torch.from_numpy(value.astype(np.float32)) for key, value in buffers.items()}
