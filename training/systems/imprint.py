"""Trains the two stages after IMPRINT: views of an object (3.1), and putting an object into a scene (3.2).

Both are denoising with a reference inside a mask. Stage 1 draws the whole of a picture without a scene, so
that one network serves both. Only its encoder goes on to stage 2, whose backbone does not learn.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from training.loop import Batch, NumberedDataset
from training.loop_settings import LoopSettings
from training.network.architecture import LATENT_SCALE
from training.network.imprint import Imprint
from training.ranges import check_least, check_shares
from training.small.attention_guide import AttentionGuide, check_guided_heads
from training.systems.anydoor import error_weights, noisy_latents

ENCODER = ("backbone", "adapter")
"""What goes on from stage 1 to stage 2."""


@dataclass(frozen=True)
class StageSettings(LoopSettings):
    """How long, how fast and what either stage learns: the adapter and the UNet's decoder in any case."""

    backbone: bool = False
    """Whether the image encoder learns."""
    unet_encoder: bool = True
    """Whether the rest of the UNet learns."""
    masked_loss: bool = True
    """Whether errors count inside the mask only."""
    attention_guide: float = 0.0
    """Weight of a second loss, for small models: see `training.small.attention_guide`."""
    guided_heads: int = 1
    """Heads of each cross-attention that it guides: 1 or 4."""
    checkpointing: bool = False
    """Compute activations twice instead of keeping them: less memory, a third more time."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, 0, "attention_guide")
        check_guided_heads(self.guided_heads)

    def apply(self, model: Imprint) -> None:
        """Sets `requires_grad` of every weight."""
        if self.checkpointing:
            model.unet.enable_gradient_checkpointing()
        model.requires_grad_(False)
        model.id_encoder.projector.requires_grad_(True)
        for name, weight in model.id_encoder.backbone.named_parameters():
            # DINOv2's mask token is in every checkpoint, and never used here
            weight.requires_grad_(self.backbone and not name.endswith("mask_token"))
        for name, weight in model.unet.named_parameters():
            decoder = name.startswith(("up_blocks.", "conv_norm_out.", "conv_out."))
            weight.requires_grad_(decoder or self.unet_encoder)


@dataclass(frozen=True)
class ViewsSettings(StageSettings):
    """Stage 1. The defaults are the paper's: image encoder, adapter and UNet decoder learn."""

    backbone: bool = True
    unet_encoder: bool = False
    rates: Mapping[str, float] = field(
        default_factory=lambda: {"backbone": 4e-6, "adapter": 4e-5, "unet": 4e-5}
    )
    window: int = 7
    """How far apart two views may be; 0 takes one view twice."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, 0, "window")


@dataclass(frozen=True)
class CompositingSettings(StageSettings):
    """Stage 2. The defaults are the paper's: adapter and UNet learn, one after the other more intensively."""

    rates: Mapping[str, float] = field(default_factory=lambda: {"adapter": 4e-5, "unet": 4e-6})
    swap: float = 0.5
    drop: float = 0.05
    """Probability that there is no reference, for classifier-free guidance."""
    empty: float = 0.5
    """Share of those in which there is no object either: the model is to continue the scene."""
    keep_unet: bool = False
    """Go on with the UNet of stage 1, for models that inherit none; the paper throws it away."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_shares(self, "drop", "empty")


class SceneDenoiser(nn.Module):
    """The parts that learn, as one module with one forward pass (which DDP needs)."""

    def __init__(self, model: Imprint, backbone: bool, guided: int = 0) -> None:
        """Takes the parts of a network; the backbone only where it learns, because it is large.

        `guided` heads of each cross-attention are guided.
        """
        super().__init__()
        self.adapter, self.unet = model.id_encoder.projector, model.unet
        if backbone:
            self.backbone = model.id_encoder.backbone
        # plain references, so that the network is not a second owner of these weights
        self._features = model.id_encoder.features if backbone else None
        self._call, self._without = model.predict_noise, model.without_reference
        self._guide = AttentionGuide([self.unet], guided) if guided else None

    def forward(
        self,
        latent: Tensor,
        timestep: Tensor,
        seen: Tensor,
        dropped: Tensor,
        scene: Tensor,
        places: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Estimates the noise in `latent`, and computes how far off the attention looks.

        Args:
            latent, timestep, scene: see `Imprint.predict_noise`.
            seen: references (N, 3, 224, 224) if the backbone learns, else its features (N, T, width).
            dropped: (N,), not 0 where there is no reference.
            places: see `AttentionGuide.loss`; without them the second result is 0.
        """
        tokens = self.adapter(self._features(seen) if self._features else seen)
        tokens = self._without(tokens, dropped != 0)
        if self._guide is None or places is None:
            return self._call(latent, timestep, tokens, scene), latent.new_zeros(())
        self._guide.clear()
        estimate = self._call(latent, timestep, tokens, scene)
        return estimate, self._guide.loss(places)


def load_parts(model: Imprint, weights: Mapping[str, Tensor], parts: Iterable[str]) -> None:
    """Puts what a stage trained into a network.

    Args:
        model: changed in place.
        weights: of `SceneDenoiser`, as the stage left them.
        parts: backbone, adapter and unet, as far as they are wanted; what the stage does not have is left.
    """
    homes = {
        "backbone": model.id_encoder.backbone,
        "adapter": model.id_encoder.projector,
        "unet": model.unet,
    }
    for part in parts:
        found = {n.removeprefix(f"{part}."): w for n, w in weights.items() if n.startswith(f"{part}.")}
        if found:
            homes[part].load_state_dict(found)


def masked_error(error: Tensor, counts: Tensor) -> Tensor:
    """Computes the mean of an error per sample inside a mask.

    IMPRINT multiplies by the mask (section 3.2). Here the sum is divided by its area, so that a small object
    counts as much as a large one.

    Args:
        error: (N, C, h, w).
        counts: (N, 1, h, w), 0 or 1; without any 1 the result is 0.
    """
    area = error.shape[1] * counts.sum((1, 2, 3))
    return (counts * error).sum((1, 2, 3)) / area.clamp(min=1)


class ImprintTask:
    """Mean squared error of what the UNet predicts, inside the mask."""

    def __init__(self, model: Imprint, samples: NumberedDataset, settings: StageSettings) -> None:
        settings.apply(model)
        guided = settings.guided_heads if settings.attention_guide else 0
        self.module = SceneDenoiser(model, settings.backbone, guided)
        self._settings, self.network, self._samples = settings, model, samples

    def dataset(self) -> NumberedDataset:
        """Gives samples, encoded or not."""
        return self._samples

    def loss(self, module: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Computes the loss of a batch of `Composites`, or of what `encoded` made of them."""
        settings, network, timestep = self._settings, self.network, batch["timestep"]
        if "picture" in batch:
            batch = self.encoded(batch)
        latents = batch["moments"][:, 0] + batch["moments"][:, 1] * batch["posterior_noise"]
        noisy = noisy_latents(latents, batch["noise"], timestep, network.alphas_cumprod)
        seen = batch["reference" if settings.backbone else "features"]
        inputs = (timestep, seen, batch["dropped"], batch["scene"], batch.get("places"))
        estimate, guide = module(noisy, *inputs)
        error = (estimate.float() - batch["noise"]).square()
        counts = batch["counts"] if settings.masked_loss else torch.ones_like(batch["counts"])
        per_sample = masked_error(error, counts)
        denoising = (error_weights(network, timestep) * per_sample).mean()
        shown = {"noise": per_sample.detach().mean()}
        if settings.attention_guide:
            shown |= {"denoising": denoising.detach(), "guide": guide.detach()}
        return {"loss": denoising + settings.attention_guide * guide, **shown}

    @torch.no_grad()
    def encoded(self, batch: Batch) -> dict[str, Tensor]:
        """Encodes the pictures of a batch, as far as nothing that does so learns.

        Adds moments (N, 2, C, h, w), mean and standard deviation of the latents; scene (N, 1 + C, h, w), the
        mask and the latents of the scene without what is to be drawn, which is grey; counts (N, 1, h, w); and
        features (N, T, width) where the backbone does not learn.
        """
        model = self.network.to(batch["picture"].device)
        picture, mask = batch["picture"], batch["mask"]
        posterior = model.encode(picture)
        moments = torch.stack([posterior.mean, posterior.std], dim=1) * LATENT_SCALE
        side = moments.shape[-2:]
        # the mean, as the runtime's graph gives it; masks become small as in diffusers' inpainting pipeline
        scene = model.encode(picture * (1 - mask)).mean * LATENT_SCALE
        small = {name: F.interpolate(batch[name], side, mode="nearest") for name in ("mask", "counts")}
        kept = {name: batch[name] for name in batch if name not in ("picture", "mask")}
        made = {"moments": moments, "scene": torch.cat([small["mask"], scene], 1), "counts": small["counts"]}
        if not self._settings.backbone:
            del kept["reference"]
            made["features"] = model.id_encoder.features(batch["reference"])
        return {**kept, **made}
