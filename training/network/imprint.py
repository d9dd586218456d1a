"""Defines the network after IMPRINT (Song et al., 2024): a reference's tokens, and a UNet that sees the
scene.

The authors have published neither code nor weights. What the paper does not say is taken from its relatives:
the content adapter from ObjectStitch's public reimplementation (bcmi/ObjectStitch-Image-Composition), whose
checkpoints are read as well, and how the UNet sees the scene from Stable Diffusion's inpainting models, which
training starts from. There is no ControlNet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from training.network.adapter import ContentAdapter
from training.network.architecture import (
    SD21_HEAD_WIDTH,
    Architecture,
    ArchitectureError,
    ReferenceBackground,
    SceneArchitecture,
    SceneOrder,
    Shapes,
    count,
    infer_diffusion,
    infer_dino,
    inferring,
    shape_of,
)
from training.network.checkpoint_file import LazyTensors, TensorFile, reader
from training.network.modules import IDEncoder, Normalisation, ReferenceNetwork, build_vae
from training.network.official_keys import CLIP_VISION_PREFIX, PREFIXES
from training.network.stable_diffusion import SD1_HEADS, build_scene_unet

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
CLIP_HEAD_WIDTH = 64

UNCONDITIONAL = "learnable_vector"
"""Official key of the token that stands for no reference, (1, 1, D). In ObjectStitch it never learns."""

_ADAPTER = PREFIXES["id_encoder"] + "projector."
_OBJECT_STITCH_ADAPTER = "proj_out."


@dataclass(frozen=True)
class ImprintArchitecture(SceneArchitecture, Architecture):
    """Everything that determines the shapes and the meaning of the weights.

    The defaults are Stable Diffusion 2's inpainting model with DINOv2 ViT-g/14. The fields dino_* are those
    of the image encoder, whichever it is.
    """

    not_inferable: ClassVar[tuple[str, ...]] = (
        *Architecture.not_inferable,
        "unet_head_count",
        "adapter_heads",
        "scene_order",
        "reference_background",
    )

    scene_channels: int = 5
    """Channels that the UNet sees beside the noisy latent: mask and latent of the scene."""
    scene_order: SceneOrder = "mask_latents"
    """What the UNet sees: mask (1 where to draw), then latents, as Stable Diffusion's inpainting models; or
    latents, then 1 - mask, as Paint-by-Example and ObjectStitch. Cannot be read off the weights."""
    reference_background: ReferenceBackground = "white"
    """What is around the object in the references that it was trained with: white, or black, as in
    ObjectStitch. Cannot be read off the weights."""
    id_backbone: Literal["dinov2", "clip"] = "dinov2"
    """The image encoder."""
    adapter_layers: int = 5
    """Transformer blocks of the content adapter."""
    adapter_heads: int = 1
    """Their attention heads. Cannot be read off the weights."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.scene_channels:
            raise ArchitectureError("its UNet must see the scene: scene_channels is 1 + latent_channels")
        if self.dino_width % self.adapter_heads:
            raise ArchitectureError(
                f"{self.adapter_heads} attention heads do not divide the adapter's width, {self.dino_width}"
            )


class CLIPEncoder(nn.Module):
    """CLIP's image encoder and the content adapter, in the place of `IDEncoder`.

    All tokens are used, each after the normalisation that CLIP itself gives to the first one only.
    """

    def __init__(self, architecture: ImprintArchitecture, projector: ContentAdapter) -> None:
        super().__init__()
        self.normalise = Normalisation(CLIP_MEAN, CLIP_STD)
        a = architecture
        self.clip = CLIPVisionModel(
            CLIPVisionConfig(
                hidden_size=a.dino_width,
                intermediate_size=a.dino_mlp_ratio * a.dino_width,
                num_hidden_layers=a.dino_depth,
                num_attention_heads=a.dino_heads,
                image_size=a.dino_grid * a.dino_patch,
                patch_size=a.dino_patch,
            )
        )
        # no checkpoint has this buffer, so it is there even where all else has no memory before it is loaded
        self.clip.embeddings.position_ids = torch.arange(a.token_count, device="cpu")[None]
        self.projector = projector

    @property
    def backbone(self) -> nn.Module:
        """What looks at the picture: CLIP."""
        return self.clip  # type: ignore[no-any-return]

    def forward(self, reference: Tensor) -> Tensor:
        """Computes ID tokens (N, T, D) of background-free references (N, 3, 224, 224) in 0..1 RGB."""
        tokens: Tensor = self.projector(self.features(reference))
        return tokens

    def features(self, reference: Tensor) -> Tensor:
        """Computes CLIP's tokens (N, T, width) of references, before the adapter; see `forward`."""
        hidden: Tensor = self.clip(self.normalise(reference)).last_hidden_state
        tokens: Tensor = self.clip.post_layernorm(hidden)
        return tokens


def build_encoder(architecture: ImprintArchitecture) -> IDEncoder | CLIPEncoder:
    """Builds the image encoder with its content adapter."""
    a = architecture
    adapter = ContentAdapter(a.dino_width, a.token_width, a.adapter_layers, a.adapter_heads)
    return IDEncoder(a, adapter) if a.id_backbone == "dinov2" else CLIPEncoder(a, adapter)


BUILDERS: Mapping[str, Callable[[ImprintArchitecture], nn.Module]] = {
    "unet": build_scene_unet,
    "vae": build_vae,
    "id_encoder": build_encoder,
}
"""Part of `Imprint` -> what builds it."""


class Imprint(ReferenceNetwork):
    """The whole network. `unet`, `vae` and `id_encoder` are its parts."""

    architecture: ImprintArchitecture
    unconditional: Tensor

    def __init__(self, architecture: ImprintArchitecture, parts: Iterable[str] = tuple(BUILDERS)) -> None:
        """Builds a network with fresh weights.

        Args:
            architecture: its sizes.
            parts: which parts to build; export goes through a large network one part at a time.
        """
        super().__init__(architecture, {part: BUILDERS[part](architecture) for part in parts})
        # as any black picture's, an encoder's tokens would drift while it learns; zeros do not
        self.register_buffer("unconditional", torch.zeros(1, 1, architecture.token_width), persistent=False)

    def without_reference(self, tokens: Tensor, which: Tensor) -> Tensor:
        """Replaces tokens (N, T, D) where `which` (N,) says that there is no reference."""
        return torch.where(which.view(-1, 1, 1), self.unconditional.to(tokens), tokens)

    def predict_noise(self, latent: Tensor, timestep: Tensor, tokens: Tensor, scene: Tensor) -> Tensor:
        """Estimates the noise in `latent`.

        Args:
            latent: (N, C, h, w).
            timestep: (N,).
            tokens: (N, T, D).
            scene: (N, 1 + C, h, w), whatever `scene_order` is: mask (1 where to draw), and the latents of the
                scene, grey where the mask is.
        """
        if self.architecture.scene_order == "latents_keep":
            scene = torch.cat([scene[:, 1:], 1 - scene[:, :1]], dim=1)
        seen = torch.cat([latent, scene], dim=1)
        output: Tensor = self.unet(seen, timestep, encoder_hidden_states=tokens, return_dict=False)[0]
        return self.noise_of(output, latent, timestep)

    def official_shapes(self) -> dict[str, tuple[int, ...]]:
        """Maps official key -> shape, for every weight of the parts that were built."""
        token = {UNCONDITIONAL: tuple(self.unconditional.shape)} if "id_encoder" in self.parts else {}
        return super().official_shapes() | token

    def official_state_dict(self) -> dict[str, Tensor]:
        """Gives the weights under their official names, without the buffers of the noise schedule."""
        token = {UNCONDITIONAL: self.unconditional} if "id_encoder" in self.parts else {}
        return super().official_state_dict() | token

    def load_official_state_dict(self, tensors: Mapping[str, Tensor], assign: bool = False) -> None:
        """Loads the weights of all parts that were built; see `ReferenceNetwork`."""
        super().load_official_state_dict(tensors, assign)
        if "id_encoder" in self.parts:
            self.unconditional = tensors[UNCONDITIONAL].detach().clone()


def with_scene(convolution: Tensor, latent_channels: int) -> Tensor:
    """Widens a UNet's first convolution, (O, C, 3, 3), to (O, 2 C + 1, 3, 3): it ignores the scene.

    Weights of an inpainting model's are given back as they are.
    """
    missing = 2 * latent_channels + 1 - convolution.shape[1]
    return F.pad(convolution, (0, 0, 0, 0, 0, missing)) if missing == latent_channels + 1 else convolution


# --- checkpoints ------------------------------------------------------------------------------------------


def is_imprint(shapes: Shapes) -> bool:
    """Tells whether a checkpoint's UNet sees a scene and its tokens come from a picture."""
    unet = PREFIXES["unet"]
    seen = shapes.get(f"{unet}input_blocks.0.0.weight", (0, 0))[1]
    given = shapes.get(f"{unet}out.2.weight", (seen,))[0]
    encoders = (PREFIXES["id_encoder"] + "model.cls_token", CLIP_VISION_PREFIX + "embeddings.class_embedding")
    return seen > given and any(key in shapes for key in encoders)


OBJECT_STITCH: Mapping[str, Any] = {"scene_order": "latents_keep", "reference_background": "black"}
"""What no shape tells of a checkpoint of ObjectStitch's public code: fields of the architecture."""
OBJECT_STITCH_DEFAULTS: Mapping[str, Any] = {"reference_ratio": 1.0}
"""Its references have no margin: the object touches the border."""


def is_object_stitch(shapes: Shapes) -> bool:
    """Tells whether a checkpoint is in the layout of ObjectStitch's public reimplementation."""
    return is_imprint(shapes) and f"{_OBJECT_STITCH_ADAPTER}weight" in shapes


def from_object_stitch(file: TensorFile) -> TensorFile:
    """Gives the tensors of ObjectStitch's public layout the names of ours.

    Its last linear layer lies outside of the image encoder. Buffers that nothing needs are left out.
    """
    names = {
        key.replace(_OBJECT_STITCH_ADAPTER, _ADAPTER) if key.startswith(_OBJECT_STITCH_ADAPTER) else key: key
        for key in file.shapes
        if not key.endswith(".position_ids")
    }
    tensors = LazyTensors({name: reader(file.tensors, key) for name, key in names.items()})
    return TensorFile(tensors, {name: file.shapes[key] for name, key in names.items()}, file.metadata)


@inferring()
def infer_imprint(shapes: Shapes, settings: Mapping[str, Any]) -> ImprintArchitecture:
    """Reads the sizes off the shapes of a checkpoint in our layout.

    Args:
        shapes: official key -> shape.
        settings: the fields that are `not_inferable`, as far as they are known. The others are those of
            Stable Diffusion 1.x or 2.x, of DINOv2 or CLIP, and of the public adapter.

    Raises:
        ArchitectureError: a tensor that determines a size is missing, or what is there does not go together.
    """
    unet, encoder = PREFIXES["unet"], PREFIXES["id_encoder"]
    latent_channels = shape_of(shapes, f"{unet}out.2.weight")[0]
    linear = len(shape_of(shapes, f"{unet}middle_block.1.proj_in.weight")) == 2
    clip = CLIP_VISION_PREFIX + "embeddings.class_embedding" in shapes
    adapter = rf"{encoder}mapper\.resblocks\.(\d+)\."
    found: dict[str, Any] = {
        **infer_diffusion(shapes),
        **(_infer_clip(shapes) if clip else infer_dino(shapes, settings.get("dino_heads"))),
        "id_backbone": "clip" if clip else "dinov2",
        "token_width": shape_of(shapes, f"{_ADAPTER}weight")[0],
        "latent_channels": latent_channels,
        "scene_channels": shape_of(shapes, f"{unet}input_blocks.0.0.weight")[1] - latent_channels,
        "unet_linear_projection": linear,
        "adapter_layers": count(shapes, adapter) if f"{encoder}final_ln.weight" in shapes else 0,
    }
    if not settings.keys() & {"unet_head_width", "unet_head_count"}:
        found |= {"unet_head_width": SD21_HEAD_WIDTH} if linear else {"unet_head_count": SD1_HEADS}
    return ImprintArchitecture(**{**found, **settings})


def _infer_clip(shapes: Shapes) -> dict[str, Any]:
    prefix = CLIP_VISION_PREFIX
    width = shape_of(shapes, f"{prefix}embeddings.class_embedding")[0]
    positions = shape_of(shapes, f"{prefix}embeddings.position_embedding.weight")[0]
    return {
        "dino_width": width,
        "dino_depth": count(shapes, prefix.replace(".", r"\.") + r"encoder\.layers\.(\d+)\."),
        "dino_heads": max(1, width // CLIP_HEAD_WIDTH),
        "dino_mlp_ratio": shape_of(shapes, f"{prefix}encoder.layers.0.mlp.fc1.weight")[0] // width,
        "dino_patch": shape_of(shapes, f"{prefix}embeddings.patch_embedding.weight")[-1],
        "dino_grid": round((positions - 1) ** 0.5),
    }
