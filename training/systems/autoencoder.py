"""Trains stage 1 of a small model: its autoencoder. (The published model takes SD 2.1's as it is.)"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from diffusers import AutoencoderKL
from torch import Tensor, nn

from runtime.errors import InputError
from runtime.imaging.resize import resize_linear
from training import seeds
from training.data.device import crop_squares, flipped, generator
from training.data.synthetic.views import VIEW_SIZE
from training.data.view_store import SCENES, ViewStore
from training.loop import Batch
from training.loop_settings import LoopSettings
from training.network.architecture import LATENT_SCALE, Architecture
from training.network.modules import build_vae

POSTERIOR_STD = 0.01
"""Standard deviation of the posterior, in units of the latents' own."""

COLOUR_WEIGHT, GRADIENT_WEIGHT = 2.0, 0.5
"""Weights in the loss, beside the 1 of pixels: of colours alone, and of steps between neighbouring pixels."""

_MAIN_PATH = ("samplers.0.conv", "conv_in", "conv_shortcut", "conv_out", "quant_conv")
"""Convolutions that are not in a residual branch."""

_RANDOM_SHARE = 0.3
"""How much of their random weights these keep beside the linear start."""


@dataclass(frozen=True)
class AutoencoderSettings(LoopSettings):
    """How long, how fast and from how large pictures the whole autoencoder learns."""

    side: int = 48
    """Pixels per side."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.side <= VIEW_SIZE:
            raise InputError(f"side is {self.side}; expected 1 to the {VIEW_SIZE} pixels of a rendered view")


@dataclass(frozen=True)
class DecoderSettings(AutoencoderSettings):
    """How long, how fast and from how large pictures the decoder goes on."""

    side: int = 64
    """Pixels per side."""


@dataclass(frozen=True)
class SceneCrops:
    """Square pieces of rendered scenes at any scale, mirrored half of the time."""

    store: ViewStore
    side: int
    seed: int

    def __getitem__(self, number: int) -> dict[str, Any]:
        """Gives a picture (3, side, side), float32, -1..1."""
        rng = np.random.default_rng([self.seed, number])
        image = self.store.scene(int(rng.integers(len(self.store))), int(rng.integers(SCENES))).image
        size = int(rng.integers(self.side, image.shape[0] + 1))
        top, left = rng.integers(0, image.shape[0] - size + 1, 2)
        crop = resize_linear(image[top : top + size, left : left + size], (self.side, self.side))
        if rng.random() < 0.5:
            crop = crop[:, ::-1]
        return {"picture": np.ascontiguousarray(crop.transpose(2, 0, 1), np.float32) / 127.5 - 1}

    def batch(self, numbers: range, device: torch.device) -> dict[str, Tensor]:
        """Draws a batch of pieces in a device's memory, which takes all scenes at the first call."""
        scenes, rng, count = (
            self.store.resident("scenes", device),
            generator(self.seed, numbers, device),
            len(numbers),
        )
        rows = torch.randint(len(scenes), (count,), generator=rng, device=device)
        views = torch.randint(SCENES, (count,), generator=rng, device=device)
        pictures = scenes[rows, views, :, :, :3].permute(0, 3, 1, 2).float()
        shares = torch.rand(4, count, generator=rng, device=device)
        longest = pictures.shape[2]
        sizes = self.side + (shares[0] * (longest - self.side + 1)).long()
        top, left = ((share * (longest - sizes + 1)).long() for share in shares[1:3])
        crops = crop_squares(pictures, left, top, sizes, self.side).round()
        return {"picture": flipped(crops, shares[3] < 0.5) / 127.5 - 1}


@torch.no_grad()
def start_linear(vae: AutoencoderKL) -> None:
    """Starts as a nearly linear network that keeps colours; otherwise it draws grey pictures for long.

    Residual branches are silent; the convolutions that change the size start near averaging and repeating,
    those that change the number of channels near a rotation.
    """
    for name, layer in vae.named_modules():
        if name.endswith((".conv2", ".to_out.0")):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        elif isinstance(layer, nn.Conv2d) and name.endswith(_MAIN_PATH):
            outputs, inputs, side, _ = layer.weight.shape
            passing = torch.zeros_like(layer.weight)
            if "downsamplers" in name:  # the padding is on the right and below: these taps are a 2 x 2 mean
                passing[:, :, :2, :2] = torch.eye(outputs)[:, :, None, None] / 4
            elif "upsamplers" in name:
                passing[:, :, 1, 1] = torch.eye(outputs)
            else:
                passing[:, :, side // 2, side // 2] = nn.init.orthogonal_(torch.empty(outputs, inputs))
            layer.weight.mul_(_RANDOM_SHARE).add_(passing)


class AutoencoderTask:
    """Reconstruction: absolute and squared errors of pixels, absolute ones of their gradients."""

    def __init__(
        self,
        architecture: Architecture,
        store: ViewStore,
        side: int,
        seed: int = seeds.AUTOENCODER_CROPS,
    ) -> None:
        self.module = self.network = build_vae(architecture)
        start_linear(self.module)
        self._data = SceneCrops(store, side, seed)

    def dataset(self) -> SceneCrops:
        """Gives pieces of scenes."""
        return self._data

    def loss(self, module: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Computes the loss of decoding the posterior's mode; the noise of a sample would only blur it."""
        picture = batch["picture"]
        error = module(picture).sample - picture
        # grey and colour apart: otherwise colours, whose differences are small, are learned last
        grey = error.mean(1, keepdim=True)
        colour = error - grey
        gradients = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
        squares = error.square().mean() + COLOUR_WEIGHT * colour.square().mean()
        loss = (
            error.abs().mean() + COLOUR_WEIGHT * colour.abs().mean() + GRADIENT_WEIGHT * gradients + squares
        )
        return {"loss": loss, "grey": grey.detach().abs().mean(), "colour": colour.detach().abs().mean()}


def decoder_task(
    architecture: Architecture, store: ViewStore, side: int, weights: Mapping[str, Tensor]
) -> AutoencoderTask:
    """Makes the task that goes on with the decoder alone, on larger pictures; no latent changes."""
    task = AutoencoderTask(architecture, store, side, seeds.DECODER_CROPS)
    task.module.load_state_dict(weights)
    task.module.encoder.requires_grad_(False)
    task.module.quant_conv.requires_grad_(False)
    return task


@torch.no_grad()
def normalise_latents(vae: AutoencoderKL, pictures: Tensor) -> None:
    """Folds mean and spread of the latents into the weights: times `LATENT_SCALE` they have variance 1.

    The decoder sees what it saw before; only the latents in between change their units, per channel.

    Args:
        vae: changed in place.
        pictures: what to measure them on, (N, 3, H, W), -1..1.
    """
    latents = vae.encode(pictures).latent_dist.mean
    shift = latents.mean((0, 2, 3))
    factor = 1 / (latents.std((0, 2, 3)) * LATENT_SCALE)
    # mean' = (mean - shift) * factor; the second half of the channels is the log variance
    vae.quant_conv.weight[: len(shift)] *= factor[:, None, None, None]
    vae.quant_conv.bias[: len(shift)] = (vae.quant_conv.bias[: len(shift)] - shift) * factor
    # this autoencoder was trained without noise and never learned a variance: make it small
    vae.quant_conv.weight[len(shift) :] = 0
    vae.quant_conv.bias[len(shift) :] = 2 * math.log(POSTERIOR_STD / LATENT_SCALE)
    # z = z' / factor + shift, then the convolution
    vae.post_quant_conv.bias += F.conv2d(shift[None, :, None, None], vae.post_quant_conv.weight).flatten()
    vae.post_quant_conv.weight /= factor[None, :, None, None]
