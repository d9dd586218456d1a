"""Defines the sizes of a network, and reads AnyDoor's from the tensors of an official checkpoint."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

from engines.errors import AnyDoorError

LATENT_SCALE = 0.18215
"""The latents of SD 2.1's VAE are multiplied by this, so that they have about unit variance."""

REFERENCE_SIZE = 224
"""Side of the reference that the ID encoder looks at, in pixels."""

HINT_BLOCK_CHANNELS = (16, 32, 96, 256)
"""Widths of the hint block; the original fixes them for any size of UNet (cldm.py, input_hint_block)."""

_MOST_MODULES = 1000
"""Of one kind that a network has; more would take minutes to build."""

SD21_HEAD_WIDTH = 64
SD21_NORM_GROUPS = 32
DINO_HEAD_WIDTH = 64

Shapes = Mapping[str, tuple[int, ...]]

Prediction = Literal["epsilon", "v"]
SceneOrder = Literal["mask_latents", "latents_keep"]
ReferenceBackground = Literal["white", "black"]
_CHOICES: Mapping[str, Any] = {
    "prediction": Prediction,
    "scene_order": SceneOrder,
    "reference_background": ReferenceBackground,
}
"""Fields of an architecture that are names -> their type."""

PREDICTED: Mapping[Prediction, str] = {"epsilon": "the noise", "v": "v"}
"""What the UNet's output means, for people."""


class ArchitectureError(AnyDoorError):
    """The tensors are not those of a network that is known here; the text says why."""


_MAY_BE_NONE = ("scene_channels", "adapter_layers")
"""Sizes of a network that may be 0."""


def check_sizes(architecture: object) -> None:
    """Refuses widths and depths that no network has.

    Raises:
        ArchitectureError: names the first.
    """
    for name, value in vars(architecture).items():
        least = 0 if name in _MAY_BE_NONE else 1
        for size in value if isinstance(value, tuple) else (value,):
            if type(size) is int and size < least:
                raise ArchitectureError(f"{name} is {size}; expected at least {least}")


@dataclass(frozen=True)
class DiffusionArchitecture:
    """What determines the shapes and the meaning of the weights of UNet and autoencoder.

    The defaults are SD 2.1.
    """

    not_inferable: ClassVar[tuple[str, ...]]
    """Fields that the shapes of the weights do not determine; checkpoints have them in their metadata."""

    unet_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    unet_attention: tuple[bool, ...] = (True, True, True, False)
    """Whether the level has transformer blocks, top level first."""
    unet_layers: int = 2
    """Residual blocks per level on the way down; one more on the way up."""
    unet_head_width: int = SD21_HEAD_WIDTH
    """Channels per attention head. Cannot be read off the weights."""
    unet_norm_groups: int = SD21_NORM_GROUPS
    """Groups of the normalisation layers of UNet and ControlNet. Cannot be read off the weights."""
    token_width: int = 1024
    latent_channels: int = 4
    vae_channels: tuple[int, ...] = (128, 256, 512, 512)
    vae_layers: int = 2
    vae_norm_groups: int = SD21_NORM_GROUPS
    """Groups of the VAE's normalisation layers. Cannot be read off the weights."""
    prediction: Prediction = "epsilon"
    """What the UNet's output means: the noise, or sqrt(a_t) noise - sqrt(1 - a_t) latent (Salimans and Ho,
    2022, appendix D). The network as a whole always answers with the noise. Cannot be read off the
    weights."""

    def __post_init__(self) -> None:
        check_sizes(self)
        if not self.unet_channels or not self.vae_channels:
            raise ArchitectureError(
                "unet_channels and vae_channels must name the width of at least one level"
            )
        if len(self.unet_channels) != len(self.unet_attention):
            raise ArchitectureError(
                f"unet_channels names {len(self.unet_channels)} levels and unet_attention "
                f"{len(self.unet_attention)}; they must be the same"
            )

    @property
    def unet_heads(self) -> tuple[int, ...]:
        """Attention heads per level."""
        return tuple(width // self.unet_head_width for width in self.unet_channels)

    @property
    def latent_factor(self) -> int:
        """How many picture pixels one latent pixel spans, per side."""
        return int(2 ** (len(self.vae_channels) - 1))

    @property
    def side_step(self) -> int:
        """Pixels that the sides of a picture are multiples of, so that all levels can halve its latent."""
        return self.latent_factor * int(2 ** (len(self.unet_channels) - 1))


@dataclass(frozen=True)
class SceneArchitecture(DiffusionArchitecture):
    """A UNet as of Stable Diffusion 1.x or 2.x, which may see the scene that it draws into."""

    unet_head_count: int | None = None
    """Attention heads of every level, where that is what the levels share. Cannot be read off the weights."""
    unet_linear_projection: bool = True
    """Whether the projections around the transformer blocks are linear layers, or 1 x 1 convolutions."""
    scene_channels: int = 0
    """Channels that the UNet sees beside the noisy latent: none, or the mask and the latent of a scene."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scene_channels not in (0, 1 + self.latent_channels):
            raise ArchitectureError(
                f"its UNet takes {self.latent_channels + self.scene_channels} channels: expected "
                f"{self.latent_channels}, or {2 * self.latent_channels + 1} with mask and scene"
            )

    @property
    def unet_heads(self) -> tuple[int, ...]:
        """Attention heads per level."""
        if self.unet_head_count is None:
            return super().unet_heads
        return (self.unet_head_count,) * len(self.unet_channels)


NOT_INFERABLE = ("unet_head_width", "unet_norm_groups", "vae_norm_groups", "dino_heads", "prediction")


@dataclass(frozen=True)
class Architecture(DiffusionArchitecture):
    """Everything that determines the shapes and the meaning of AnyDoor's weights.

    The defaults are the published model: SD 2.1 with DINOv2 ViT-g/14.
    """

    not_inferable: ClassVar[tuple[str, ...]] = NOT_INFERABLE

    dino_width: int = 1536
    dino_depth: int = 40
    dino_heads: int = 24
    """Attention heads of the ID encoder. Cannot be read off the weights."""
    dino_mlp_ratio: int = 4
    """The SwiGLU layers are two thirds of this times as wide as the tokens."""
    dino_patch: int = 14
    dino_grid: int = 37
    """Patches per side that the position embeddings were trained for (518 px)."""

    @property
    def token_count(self) -> int:
        """ID tokens per reference: the class token and one per patch."""
        return 1 + (REFERENCE_SIZE // self.dino_patch) ** 2

    def detail_shapes(self, resolution: int) -> tuple[tuple[int, int, int], ...]:
        """Computes the (channels, height, width) of the detail maps for a picture of `resolution` pixels."""
        side, channels = resolution // self.latent_factor, self.unet_channels
        shapes = [(channels[0], side, side)]
        for level, width in enumerate(channels):
            shapes += [(width, side, side)] * self.unet_layers
            if level < len(channels) - 1:
                side //= 2
                shapes.append((width, side, side))
        return (*shapes, (channels[-1], side, side))


_METADATA_PREFIX = "anydoor."

RESOLUTION = "resolution"
"""Setting of a model that is none of its network: side of the pictures that it was trained on, in pixels."""


def settings_to_metadata(
    architecture: DiffusionArchitecture, resolution: int | None = None
) -> dict[str, str]:
    """Gives the metadata of a checkpoint: "anydoor.FIELD" -> value, for fields that are `not_inferable`.

    Args:
        architecture: sizes of the network.
        resolution: side of the pictures that the model was trained on, in pixels, if that is known.
    """
    settings = {name: getattr(architecture, name) for name in architecture.not_inferable}
    settings[RESOLUTION] = resolution
    return {_METADATA_PREFIX + name: str(value) for name, value in settings.items() if value is not None}


def settings_from_metadata(
    metadata: Mapping[str, str], names: Iterable[str] = NOT_INFERABLE
) -> dict[str, Any]:
    """Reads what `settings_to_metadata` wrote: field -> value, for those of `names` that are there.

    Raises:
        ArchitectureError: a value is not one that the field can have.
    """
    found: dict[str, Any] = {}
    for name in names:
        text = metadata.get(_METADATA_PREFIX + name)
        if text is None:
            continue
        if name in _CHOICES:
            if text not in get_args(_CHOICES[name]):
                raise ArchitectureError(f"its metadata says '{text}' of {name}, which is not known here")
            found[name] = text
        elif text.isdecimal() and int(text) > 0:
            found[name] = int(text)
        else:
            raise ArchitectureError(
                f"its metadata says that {name} is '{text}', which is not a number above 0"
            )
    return found


@contextmanager
def inferring() -> Iterator[None]:
    """Turns what shapes of another kind raise into an `ArchitectureError`; decorates what reads sizes off
    them."""
    try:
        yield
    except ArchitectureError:
        raise
    except (LookupError, ArithmeticError, ValueError) as error:
        raise ArchitectureError("the shapes of its tensors do not make a network") from error


@inferring()
def infer_architecture(
    shapes: Shapes,
    unet_head_width: int | None = None,
    dino_heads: int | None = None,
    vae_norm_groups: int | None = None,
    unet_norm_groups: int | None = None,
    prediction: Prediction | None = None,
) -> Architecture:
    """Reads the sizes of a network off the shapes of an official checkpoint.

    The arguments after the shapes are what no shape determines.

    Args:
        shapes: official key -> shape.
        unet_head_width: channels per head of UNet and ControlNet; 64 if None, as in SD 2.1.
        dino_heads: heads of the ID encoder; one per 64 channels if None, as in every DINOv2.
        vae_norm_groups: groups of the VAE's normalisation layers; 32 if None, as in SD 2.1.
        unet_norm_groups: the same of UNet and ControlNet.
        prediction: what the UNet's output means; the noise if None, as in the released model.

    Raises:
        ArchitectureError: a tensor that determines a size is missing, or a head width does not divide.
    """
    sizes = infer_diffusion(shapes)
    return Architecture(
        **sizes,
        unet_head_width=_unet_head_width(sizes["unet_channels"], unet_head_width or SD21_HEAD_WIDTH),
        unet_norm_groups=unet_norm_groups or SD21_NORM_GROUPS,
        token_width=shape_of(shapes, "cond_stage_model.projector.weight")[0],
        latent_channels=shape_of(shapes, "model.diffusion_model.input_blocks.0.0.weight")[1],
        vae_norm_groups=vae_norm_groups or SD21_NORM_GROUPS,
        **infer_dino(shapes, dino_heads),
        prediction=prediction or "epsilon",
    )


def infer_dino(shapes: Shapes, heads: int | None = None) -> dict[str, Any]:
    """Reads the sizes of DINOv2 off the shapes, as fields of an architecture; `heads` no shape tells."""
    prefix = "cond_stage_model.model."
    if not any(key.startswith(prefix) for key in shapes):
        raise ArchitectureError(f"it has no DINOv2: nothing begins with {prefix}")
    if f"{prefix}blocks.0.mlp.fc1.weight" in shapes:
        raise ArchitectureError(
            "its DINOv2 has plain MLPs, as ViT-S, ViT-B and ViT-L do; only SwiGLU, that of ViT-g/14, is read"
        )
    width = shape_of(shapes, f"{prefix}cls_token")[-1]
    mlp_width = shape_of(shapes, f"{prefix}blocks.0.mlp.w12.weight")[0]
    return {
        "dino_width": width,
        "dino_depth": count(shapes, re.escape(prefix) + r"blocks\.(\d+)\."),
        "dino_heads": _dino_heads(width, heads),
        "dino_mlp_ratio": round(mlp_width * 0.75 / width),
        "dino_patch": shape_of(shapes, f"{prefix}patch_embed.proj.weight")[-1],
        "dino_grid": round((shape_of(shapes, f"{prefix}pos_embed")[1] - 1) ** 0.5),
    }


def infer_diffusion(shapes: Shapes) -> dict[str, Any]:
    """Reads levels, widths and layers of UNet and VAE off the shapes, as fields of an architecture."""
    channels, attention, layers = _unet_levels(shapes)
    return {
        "unet_channels": channels,
        "unet_attention": attention,
        "unet_layers": layers,
        "vae_channels": _vae_channels(shapes),
        "vae_layers": count(shapes, r"first_stage_model\.encoder\.down\.0\.block\.(\d+)\."),
    }


def shape_of(shapes: Shapes, key: str) -> tuple[int, ...]:
    """Looks up a shape.

    Raises:
        ArchitectureError: there is no such key.
    """
    if key not in shapes:
        raise ArchitectureError(f"'{key}' is missing, so the size of the network is unknown")
    return tuple(shapes[key])


def _unet_head_width(channels: tuple[int, ...], head_width: int) -> int:
    if any(width % head_width for width in channels):
        raise ArchitectureError(
            f"{head_width} channels per attention head do not divide the UNet's widths {channels}; "
            "weights cannot tell the head width: give --unet-head-width"
        )
    return head_width


def _dino_heads(width: int, heads: int | None) -> int:
    if heads is None:
        heads = width // DINO_HEAD_WIDTH if width % DINO_HEAD_WIDTH == 0 else 0
    if not heads or width % heads:
        raise ArchitectureError(
            f"the number of attention heads of an ID encoder of width {width} cannot be guessed from "
            "its weights: give --dino-heads"
        )
    return heads


def _vae_channels(shapes: Shapes) -> tuple[int, ...]:
    levels = count(shapes, r"first_stage_model\.encoder\.down\.(\d+)\.")
    key = "first_stage_model.encoder.down.{}.block.0.conv1.weight"
    return tuple(shape_of(shapes, key.format(level))[0] for level in range(levels))


def count(shapes: Shapes, pattern: str) -> int:
    """Returns one more than the largest index that `pattern` captures among the keys.

    Raises:
        ArchitectureError: no key matches.
    """
    found = [int(match[1]) for key in shapes if (match := re.match(pattern, key))]
    if not found:
        raise ArchitectureError(f"no key matches {pattern}, so the size of the network is unknown")
    if max(found) >= _MOST_MODULES:
        raise ArchitectureError(f"a key that matches {pattern} has the number {max(found)}: none goes so far")
    return max(found) + 1


def _unet_levels(shapes: Shapes) -> tuple[tuple[int, ...], tuple[bool, ...], int]:
    """Widths, presence of attention, and residual blocks per level, top level first."""
    prefix = "model.diffusion_model.input_blocks."
    channels: list[int] = []
    attention: list[bool] = []
    blocks_per_level = [0]
    for index in range(1, count(shapes, re.escape(prefix) + r"(\d+)\.")):
        if f"{prefix}{index}.0.op.weight" in shapes:
            blocks_per_level.append(0)
            continue
        if blocks_per_level[-1] == 0:
            channels.append(shapes[f"{prefix}{index}.0.out_layers.3.weight"][0])
            attention.append(f"{prefix}{index}.1.proj_in.weight" in shapes)
        blocks_per_level[-1] += 1
    if len(set(blocks_per_level)) != 1:
        raise ArchitectureError(
            f"the UNet's levels have {blocks_per_level} residual blocks; all must have the same number"
        )
    return tuple(channels), tuple(attention), blocks_per_level[0]
