"""Defines Stable Diffusion 1.x and 2.x in PyTorch: its sizes, read from the weights, and its parts.

    1.x   CLIP ViT-L reads the prompt; 8 attention heads per level; projections that are 1 x 1 convolutions
    2.x   OpenCLIP ViT-H does, up to its penultimate layer; 64 channels per head; linear projections

Either draws a picture from nothing (4 input channels) or into a scene (9: with the mask and the latent of
what is around it). Sources: Rombach et al., 2022; the configurations in the repositories
CompVis/stable-diffusion and Stability-AI/stablediffusion.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from training.network.architecture import (
    SD21_HEAD_WIDTH,
    ArchitectureError,
    SceneArchitecture,
    Shapes,
    count,
    infer_diffusion,
    inferring,
    shape_of,
)
from training.network.modules import DiffusionNetwork, build_unet, build_vae
from training.network.official_keys import CLIP_PREFIX, OPENCLIP_PREFIX, PREFIXES

SD1_HEADS = 8
"""Attention heads of every level of the UNet of 1.x."""

TEXT_HEAD_WIDTH = 64
"""Channels per attention head of CLIP's text encoders."""

OPENCLIP_LAYERS = 24
"""Layers of OpenCLIP ViT-H; Stable Diffusion 2.x leaves the last one out."""

TextEncoderName = Literal["clip", "openclip"]

ACTIVATIONS: Mapping[TextEncoderName, str] = {"clip": "quick_gelu", "openclip": "gelu"}
"""Text encoder -> its activation function, as transformers calls it. It tells them apart in a folder."""


@dataclass(frozen=True)
class StableDiffusionArchitecture(SceneArchitecture):
    """Everything that determines the shapes and the meaning of the weights.

    The defaults are Stable Diffusion 2.1.
    """

    not_inferable: ClassVar[tuple[str, ...]] = (
        "unet_head_width",
        "unet_head_count",
        "unet_norm_groups",
        "vae_norm_groups",
        "text_layers",
        "text_heads",
        "prediction",
    )

    text_encoder: TextEncoderName = "openclip"
    text_width: int = 1024
    text_layers: int = OPENCLIP_LAYERS - 1
    """Layers that are used. In the original layout, one more may be stored."""
    text_heads: int = 16
    """Attention heads of the text encoder. Cannot be read off the weights."""
    text_mlp_width: int = 4096
    text_vocabulary: int = 49408
    text_positions: int = 77

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.text_width != self.token_width:
            raise ArchitectureError(
                f"its UNet reads tokens of {self.token_width} numbers and its text encoder makes them of "
                f"{self.text_width}: the two are of different models"
            )
        per_level = self.unet_head_count or self.unet_head_width
        if any(width % per_level for width in self.unet_channels) or self.text_width % self.text_heads:
            raise ArchitectureError(
                "the number of attention heads does not divide the widths of its UNet, "
                f"{self.unet_channels}, or of its text encoder, {self.text_width}"
            )

    @property
    def version(self) -> str:
        """What people call it."""
        return {"clip": "1.x", "openclip": "2.x"}[self.text_encoder]


def find_text_encoder(shapes: Shapes) -> TextEncoderName | None:
    """Tells which text encoder a checkpoint in the original layout has, if any."""
    if f"{CLIP_PREFIX}embeddings.token_embedding.weight" in shapes:
        return "clip"
    return "openclip" if f"{OPENCLIP_PREFIX}token_embedding.weight" in shapes else None


@inferring()
def infer_stable_diffusion(shapes: Shapes, settings: Mapping[str, Any]) -> StableDiffusionArchitecture:
    """Reads the sizes off the shapes of a checkpoint in the original layout.

    Args:
        shapes: official key -> shape.
        settings: the fields that are `not_inferable`, as far as they are known. The others are those of
            Stable Diffusion 1.x or 2.x.

    Raises:
        ArchitectureError: a tensor that determines a size is missing, or what is there does not go together.
    """
    unet, vae = PREFIXES["unet"], PREFIXES["vae"]
    latent_channels = shape_of(shapes, f"{vae}post_quant_conv.weight")[0]
    linear = len(shape_of(shapes, f"{unet}middle_block.1.proj_in.weight")) == 2
    found: dict[str, Any] = {
        **infer_diffusion(shapes),
        **_infer_text_encoder(shapes),
        "token_width": shape_of(shapes, f"{unet}middle_block.1.transformer_blocks.0.attn2.to_k.weight")[1],
        "latent_channels": latent_channels,
        "scene_channels": shape_of(shapes, f"{unet}input_blocks.0.0.weight")[1] - latent_channels,
        "unet_linear_projection": linear,
    }
    if not settings.keys() & {"unet_head_width", "unet_head_count"}:
        found |= {"unet_head_width": SD21_HEAD_WIDTH} if linear else {"unet_head_count": SD1_HEADS}
    return StableDiffusionArchitecture(**{**found, **settings})


def _infer_text_encoder(shapes: Shapes) -> dict[str, Any]:
    name = find_text_encoder(shapes)
    if name == "clip":
        prefix = CLIP_PREFIX
        positions = shape_of(shapes, f"{prefix}embeddings.position_embedding.weight")
        vocabulary, width = shape_of(shapes, f"{prefix}embeddings.token_embedding.weight")
        mlp_width = shape_of(shapes, f"{prefix}encoder.layers.0.mlp.fc1.weight")[0]
        layers = count(shapes, r"cond_stage_model\.transformer\.text_model\.encoder\.layers\.(\d+)\.")
    elif name == "openclip":
        prefix = OPENCLIP_PREFIX
        positions = shape_of(shapes, f"{prefix}positional_embedding")
        vocabulary, width = shape_of(shapes, f"{prefix}token_embedding.weight")
        mlp_width = shape_of(shapes, f"{prefix}transformer.resblocks.0.mlp.c_fc.weight")[0]
        layers = count(shapes, r"cond_stage_model\.model\.transformer\.resblocks\.(\d+)\.")
        # some files have the last layer, which is not used, and some have not
        layers = OPENCLIP_LAYERS - 1 if layers == OPENCLIP_LAYERS - 1 else layers - 1
    else:
        raise ArchitectureError("it has no text encoder of Stable Diffusion 1.x or 2.x")
    return {
        "text_encoder": name,
        "text_width": width,
        "text_layers": layers,
        "text_heads": max(1, width // TEXT_HEAD_WIDTH),
        "text_mlp_width": mlp_width,
        "text_vocabulary": vocabulary,
        "text_positions": positions[0],
    }


def build_text_encoder(architecture: StableDiffusionArchitecture) -> CLIPTextModel:
    """Builds CLIP's text encoder; its `last_hidden_state` is what the UNet reads."""
    a = architecture
    encoder = CLIPTextModel(
        CLIPTextConfig(
            hidden_size=a.text_width,
            num_hidden_layers=a.text_layers,
            num_attention_heads=a.text_heads,
            intermediate_size=a.text_mlp_width,
            vocab_size=a.text_vocabulary,
            max_position_embeddings=a.text_positions,
            hidden_act=ACTIVATIONS[a.text_encoder],
            # the last two of the vocabulary
            bos_token_id=a.text_vocabulary - 2,
            eos_token_id=a.text_vocabulary - 1,
        )
    )
    # no checkpoint has this buffer, so it must be there where all else has no memory until weights are loaded
    encoder.embeddings.position_ids = torch.arange(a.text_positions, device="cpu")[None]
    return encoder


def build_scene_unet(architecture: SceneArchitecture) -> nn.Module:
    """Builds the UNet, with the channels of a scene if it sees one."""
    a = architecture
    return build_unet(  # type: ignore[no-any-return]
        a,
        in_channels=a.latent_channels + a.scene_channels,
        use_linear_projection=a.unet_linear_projection,
        sample_size=512 // 8,  # what a pipeline of diffusers draws unless it is told otherwise
    )


BUILDERS: Mapping[str, Callable[[StableDiffusionArchitecture], nn.Module]] = {
    "unet": build_scene_unet,
    "vae": build_vae,
    "text_encoder": build_text_encoder,
}
"""Part -> what builds it."""


class StableDiffusion(DiffusionNetwork):
    """The whole network, or some of its parts: those of `BUILDERS`."""

    text_encoder: CLIPTextModel

    def encode_prompt(self, ids: Tensor) -> Tensor:
        """Computes the tokens (N, 77, D) of encoded prompts (N, 77)."""
        return self.text_encoder(ids).last_hidden_state  # type: ignore[no-any-return]

    def predict_noise(self, latent: Tensor, timestep: Tensor, tokens: Tensor, *scene: Tensor) -> Tensor:
        """Estimates the noise in `latent`.

        Args:
            latent: (N, C, h, w).
            timestep: (N,).
            tokens: (N, 77, D).
            scene: none, or (N, 1 + C, h, w): mask (1 where to draw) and latents of the scene without what is
                there, in the order of `StableDiffusionInpaintPipeline` in diffusers.
        """
        inputs = torch.cat([latent, *scene], 1)
        output: Tensor = self.unet(inputs, timestep, encoder_hidden_states=tokens, return_dict=False)[0]
        return self.noise_of(output, latent, timestep)
