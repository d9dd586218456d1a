"""Builds AnyDoor in PyTorch from modules of diffusers and transformers, in any size.

One class for training and for export. What differs from the parts it is made of, and why, is in three
places: `DetailControlNet` never looks at the latent, `IDEncoder` places its position embeddings as the
original does, and everything else is Stable Diffusion 2.1. Source: AnyDoor, section 3; the released code,
cldm/cldm.py and ldm/modules/encoders/modules.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor, nn
from transformers import Dinov2Config, Dinov2Model
from transformers.models.dinov2.modeling_dinov2 import Dinov2Embeddings

from runtime.diffusion.noise_schedule import alphas_cumprod
from training.network.adapter import ContentAdapter
from training.network.architecture import (
    HINT_BLOCK_CHANNELS,
    LATENT_SCALE,
    Architecture,
    DiffusionArchitecture,
)
from training.network.official_keys import PREFIXES, expected_shapes, from_official, to_official

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def _unet_settings(architecture: DiffusionArchitecture) -> dict[str, Any]:
    """Builds what UNet and ControlNet share."""
    attention = architecture.unet_attention
    return {
        "in_channels": architecture.latent_channels,
        "down_block_types": tuple("CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attention),
        "block_out_channels": architecture.unet_channels,
        "layers_per_block": architecture.unet_layers,
        "norm_num_groups": architecture.unet_norm_groups,
        # diffusers calls the number of heads by the name of their width
        "attention_head_dim": architecture.unet_heads,
        "cross_attention_dim": architecture.token_width,
        "use_linear_projection": True,
    }


def build_unet(architecture: DiffusionArchitecture, **settings: Any) -> UNet2DConditionModel:
    """Builds the UNet of Stable Diffusion 2.1, cross-attending to ID tokens instead of text.

    Args:
        architecture: its sizes.
        settings: of diffusers, where another UNet differs from it.
    """
    attention = architecture.unet_attention
    return UNet2DConditionModel(
        **_unet_settings(architecture) | settings,
        out_channels=architecture.latent_channels,
        up_block_types=tuple("CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attention)),
    )


def build_vae(architecture: DiffusionArchitecture) -> AutoencoderKL:
    """Builds the autoencoder of Stable Diffusion 2.1."""
    levels = len(architecture.vae_channels)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=architecture.vae_channels,
        layers_per_block=architecture.vae_layers,
        latent_channels=architecture.latent_channels,
        norm_num_groups=architecture.vae_norm_groups,
        scaling_factor=LATENT_SCALE,
    )


class DetailControlNet(ControlNetModel):  # type: ignore[misc]
    """The detail extractor (section 3.3): a ControlNet that sees the hint, the timestep and the ID tokens.

    Unlike a ControlNet it never looks at the noisy latent: it starts from the embedded hint and leaves its
    first convolution out (cldm.py, ControlNet.forward). `conv_in` is kept, unused, because official
    checkpoints have its weights. So the detail maps of a hint can be computed before sampling starts.
    """

    def forward(self, hint: Tensor, timestep: Tensor, tokens: Tensor) -> tuple[Tensor, ...]:
        """Computes detail maps for one hint per timestep, or for one hint at all timesteps.

        Args:
            hint: (N or 1, 4, H, W); collage in -1..1 RGB, and the mask channel. Or its `hint_features`.
            timestep: (N,) in 0..999.
            tokens: ID tokens (N, T, D).

        Returns:
            One map per skip connection of the UNet and one for its middle, each (N, C, h, w).
        """
        embedding = self.time_embedding(self.time_proj(timestep).to(hint.dtype))
        features = hint if hint.shape[1] == HINT_BLOCK_CHANNELS[-1] else self.hint_features(hint)
        hidden = self.controlnet_cond_embedding.conv_out(features).expand(timestep.shape[0], -1, -1, -1)
        skips = [hidden]
        for block in self.down_blocks:
            if getattr(block, "has_cross_attention", False):
                hidden, outputs = block(hidden, temb=embedding, encoder_hidden_states=tokens)
            else:
                hidden, outputs = block(hidden, temb=embedding)
            skips += outputs
        hidden = self.mid_block(hidden, embedding, encoder_hidden_states=tokens)
        maps = [conv(skip) for conv, skip in zip(self.controlnet_down_blocks, skips)]
        return (*maps, self.controlnet_mid_block(hidden))

    def hint_features(self, hint: Tensor) -> Tensor:
        """Computes the hint block except for its last convolution: (N, 4, H, W) -> (N, 256, h, w)."""
        block = self.controlnet_cond_embedding
        features = F.silu(block.conv_in(hint))
        for layer in block.blocks:
            features = F.silu(layer(features))
        return features


def build_control(architecture: Architecture) -> DetailControlNet:
    """Builds the detail extractor that fits `build_unet`; its zero convolutions are zero."""
    return DetailControlNet(
        **_unet_settings(architecture),
        conditioning_channels=4,
        conditioning_embedding_out_channels=HINT_BLOCK_CHANNELS,
    )


class _PositionEmbeddings(Dinov2Embeddings):  # type: ignore[misc]
    """DINOv2's embeddings with the position grid resampled as the original code does it.

    The original passes a scale factor of 16.1/37 rather than a size of 16, and the factor moves the sampling
    points (dinov2, interpolate_pos_encoding). The weights were trained with these positions.
    """

    def interpolate_pos_encoding(self, embeddings: Tensor, height: int, width: int) -> Tensor:
        positions: Tensor = self.position_embeddings
        if positions.shape[1] == embeddings.shape[1]:
            return positions
        side = round((positions.shape[1] - 1) ** 0.5)
        grid = positions[:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
        factors = tuple((pixels // self.patch_size + 0.1) / side for pixels in (height, width))
        grid = F.interpolate(grid.float(), scale_factor=factors, mode="bicubic").to(positions.dtype)
        return torch.cat([positions[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)


class Normalisation(nn.Module):
    """Normalises pictures (N, 3, H, W) per channel; no checkpoint has its numbers."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        for name, values in (("mean", mean), ("std", std)):
            # there even where all else has no memory before it is loaded
            channels = torch.tensor(values, device="cpu").view(1, 3, 1, 1)
            self.register_buffer(name, channels, persistent=False)

    def forward(self, pictures: Tensor) -> Tensor:
        """Gives (pictures - mean) / std."""
        return (pictures - self.mean) / self.std


class IDEncoder(nn.Module):
    """The ID extractor (section 3.2): DINOv2 and what makes ID tokens of its tokens, the projector."""

    def __init__(self, architecture: Architecture, projector: ContentAdapter | None = None) -> None:
        """Builds it with fresh weights; the projector is one linear layer unless another is given."""
        super().__init__()
        self.normalise = Normalisation(IMAGENET_MEAN, IMAGENET_STD)
        a = architecture
        config = Dinov2Config(
            hidden_size=a.dino_width,
            num_hidden_layers=a.dino_depth,
            num_attention_heads=a.dino_heads,
            mlp_ratio=a.dino_mlp_ratio,
            use_swiglu_ffn=True,
            image_size=a.dino_grid * a.dino_patch,
            patch_size=a.dino_patch,
            layer_norm_eps=1e-6,
        )
        self.dino = Dinov2Model(config)
        self.dino.embeddings = _PositionEmbeddings(config)
        self.projector = projector or ContentAdapter(a.dino_width, a.token_width)

    @property
    def backbone(self) -> nn.Module:
        """What looks at the picture: DINOv2."""
        return self.dino  # type: ignore[no-any-return]

    def forward(self, reference: Tensor) -> Tensor:
        """Computes ID tokens (N, T, D) of background-free references (N, 3, 224, 224) in 0..1 RGB.

        A black picture gives the unconditional tokens of classifier-free guidance.
        """
        tokens: Tensor = self.projector(self.features(reference))
        return tokens

    def features(self, reference: Tensor) -> Tensor:
        """Computes DINOv2's tokens (N, T, width) of references, before the projector; see `forward`."""
        tokens: Tensor = self.dino(self.normalise(reference)).last_hidden_state
        return tokens

    @torch.no_grad()
    def fix_positions(self, size: int) -> None:
        """Resamples the position grid once, for pictures of `size` pixels, instead of at every call."""
        embeddings = self.dino.embeddings
        patches = (size // embeddings.patch_size) ** 2
        probe = embeddings.position_embeddings.new_empty(1, patches + 1, 0)
        grid = embeddings.interpolate_pos_encoding(probe, size, size)
        embeddings.position_embeddings = nn.Parameter(grid, requires_grad=False)


BUILDERS: Mapping[str, Callable[[Architecture], nn.Module]] = {
    "unet": build_unet,
    "control": build_control,
    "vae": build_vae,
    "id_encoder": IDEncoder,
}
"""Part of `AnyDoor` -> what builds it; the parts are those of `official_keys.PREFIXES`."""


class DiffusionNetwork(nn.Module):
    """What the networks of all systems have: a UNet, an autoencoder and a noise schedule."""

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    alphas_cumprod: Tensor
    signal_rate: Tensor
    noise_rate: Tensor

    def __init__(self, architecture: DiffusionArchitecture, parts: Mapping[str, nn.Module]) -> None:
        """Takes the parts that are there.

        Args:
            architecture: its sizes.
            parts: name -> module; export goes through a large network one part at a time.
        """
        super().__init__()
        self.prediction = architecture.prediction
        self.parts = tuple(parts)
        for name, part in parts.items():
            setattr(self, name, part)
        self.register_buffer("alphas_cumprod", torch.from_numpy(alphas_cumprod()), persistent=False)
        # apart, because in half precision 1 - alphas_cumprod is 0 where there is little noise
        self.register_buffer("signal_rate", self.alphas_cumprod.sqrt(), persistent=False)
        self.register_buffer("noise_rate", (1 - self.alphas_cumprod).sqrt(), persistent=False)

    def noise_of(self, output: Tensor, latent: Tensor, timestep: Tensor) -> Tensor:
        """Returns the noise in `latent` (N, C, h, w), by the UNet's output for it; `timestep` (N,)."""
        if self.prediction == "epsilon":
            return output
        signal, noise = (
            rate[timestep.long()].view(-1, 1, 1, 1) for rate in (self.signal_rate, self.noise_rate)
        )
        return signal * output + noise * latent

    def encode(self, picture: Tensor) -> DiagonalGaussianDistribution:
        """Computes the VAE's posterior of pictures (N, 3, H, W), -1..1; scale samples by `LATENT_SCALE`."""
        return self.vae.encode(picture).latent_dist

    def decode(self, latent: Tensor) -> Tensor:
        """Decodes scaled latents (N, C, h, w) to pictures (N, 3, H, W), -1..1 but not clipped."""
        return self.vae.decode(latent / LATENT_SCALE, return_dict=False)[0]  # type: ignore[no-any-return]


class ReferenceNetwork(DiffusionNetwork):
    """A network that is told by a picture what to draw; its checkpoints have AnyDoor's layout."""

    id_encoder: IDEncoder

    def __init__(self, architecture: Architecture, parts: Mapping[str, nn.Module]) -> None:
        super().__init__(architecture, parts)
        self.architecture = architecture

    def encode_reference(self, reference: Tensor) -> Tensor:
        """Computes ID tokens (N, T, D) of references (N, 3, 224, 224) in 0..1 RGB."""
        return self.id_encoder(reference)  # type: ignore[no-any-return]

    def official_shapes(self) -> dict[str, tuple[int, ...]]:
        """Maps official key -> shape, for every weight of the parts that were built."""
        shapes: dict[str, tuple[int, ...]] = {}
        for part in self.parts:
            names = {k: v.shape for k, v in getattr(self, part).state_dict().items()}
            shapes |= expected_shapes(part, names, self.architecture)
        return shapes

    def official_state_dict(self) -> dict[str, Tensor]:
        """Gives the weights under their official names, without the buffers of the noise schedule."""
        state: dict[str, Tensor] = {}
        for part in self.parts:
            state |= to_official(part, getattr(self, part).state_dict(), self.architecture)
        return state

    def load_official_state_dict(self, tensors: Mapping[str, Tensor], assign: bool = False) -> None:
        """Loads the weights of all parts that were built from tensors under official names.

        Args:
            tensors: official key -> tensor; other keys are ignored, so check them first.
            assign: take the tensors themselves (their memory, dtype and device) instead of copying them.
        """
        for part in self.parts:
            module = getattr(self, part)
            names = {k: v.shape for k, v in module.state_dict().items()}
            module.load_state_dict(from_official(part, names, tensors, self.architecture), assign=assign)


class AnyDoor(ReferenceNetwork):
    """The whole network. `unet`, `control`, `vae` and `id_encoder` are its parts."""

    control: DetailControlNet
    architecture: Architecture

    def __init__(self, architecture: Architecture, parts: Iterable[str] = tuple(PREFIXES)) -> None:
        """Builds a network with fresh weights.

        Args:
            architecture: its sizes.
            parts: which parts to build; export goes through a large network one part at a time.
        """
        super().__init__(architecture, {part: BUILDERS[part](architecture) for part in parts})

    def detail_maps(self, hint: Tensor, timestep: Tensor, tokens: Tensor) -> tuple[Tensor, ...]:
        """Computes detail maps; see `DetailControlNet.forward`."""
        return self.control(hint, timestep, tokens)  # type: ignore[no-any-return]

    def predict_noise(
        self, latent: Tensor, timestep: Tensor, tokens: Tensor, details: Sequence[Tensor]
    ) -> Tensor:
        """Estimates the noise in `latent` (N, C, h, w); `timestep` (N,), tokens (N, T, D)."""
        output: Tensor = self.unet(
            latent,
            timestep,
            encoder_hidden_states=tokens,
            down_block_additional_residuals=tuple(details[:-1]),
            mid_block_additional_residual=details[-1],
            return_dict=False,
        )[0]
        return self.noise_of(output, latent, timestep)

    def forward(self, latent: Tensor, timestep: Tensor, tokens: Tensor, hint: Tensor) -> Tensor:
        """Estimates the noise, for training: detail maps and UNet in one go (equation 3)."""
        return self.predict_noise(latent, timestep, tokens, self.detail_maps(hint, timestep, tokens))
