"""Trains stage 2 of a small model: its ID encoder. (The published model takes DINOv2 as it is.)

Two things are asked of it, as of DINOv2: that two views of one object look alike to it and views of different
objects do not, and that each patch token describes its patch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from runtime.imaging.masks import MASK_THRESHOLD
from runtime.imaging.reference import prepare_reference
from training import seeds
from training.data.device import change_light, draw_tenths, flipped, generator, prepare_references
from training.data.pairs import CommonRules, augment_reference, tenths
from training.data.view_store import REFERENCES, ViewStore, as_shot
from training.loop import Batch
from training.network.architecture import REFERENCE_SIZE, Architecture
from training.network.modules import IDEncoder

PATCH_SIDE = 6
"""Pixels per side at which a patch token must reproduce its patch."""

PATCH_WEIGHT = 4.0
"""Weight of the patches' error beside the contrast between views."""

REFERENCE_RATIOS = (1.1, 1.4)
"""Room around the object, drawn in tenths; both ends are included."""

PIXEL_SHARE = 0.85
"""Share of a token's channels that start with the colours of its patch; the others start with its place."""

WAVE_GAIN = 0.5
"""By how much more the next faster wave of a patch is raised than the one before."""

RESIDUAL_SCALE = 0.1
"""What the residual branches are multiplied by at the start."""

SHARPNESS = 2.3
"""Start of the logarithm of the factor that makes logits of the products of identity vectors."""


@dataclass(frozen=True)
class TwoViews:
    """Two background-free views of one object."""

    store: ViewStore
    seed: int
    rules: CommonRules

    def __getitem__(self, number: int) -> dict[str, Any]:
        """Gives views (2, 3, 224, 224), float32, 0..1."""
        rng = np.random.default_rng([self.seed, number])
        row = int(rng.integers(len(self.store)))
        views = []
        for index in range(2):
            view = self.store.reference(row, index % REFERENCES)
            shot = augment_reference(as_shot(view), self.rules, rng)
            ratio = tenths(REFERENCE_RATIOS, rng)
            prepared = prepare_reference(shot.image, shot.mask, ratio)
            views.append(prepared.image.transpose(2, 0, 1).astype(np.float32) / 255)
        return {"views": np.stack(views)}

    def batch(self, numbers: range, device: torch.device) -> dict[str, Tensor]:
        """Draws a batch of pairs of views in a device's memory, which takes all of them at the first call."""
        references, rng = self.store.resident("references", device), generator(self.seed, numbers, device)
        rows = torch.randint(len(references), (len(numbers),), generator=rng, device=device)
        chosen = torch.stack([references[rows, index % REFERENCES] for index in range(2)], 1)
        shares = torch.rand(5, 2 * len(numbers), generator=rng, device=device)
        views = flipped(chosen.flatten(0, 1).permute(0, 3, 1, 2), shares[0] < self.rules.flip).float()
        pictures = change_light(views[:, :3], shares[1] < self.rules.brighten, shares[2:4])
        ratios = draw_tenths(REFERENCE_RATIOS, shares[4])
        prepared, _ = prepare_references(pictures, views[:, 3] > MASK_THRESHOLD, ratios, REFERENCE_SIZE)
        return {"views": prepared.view(-1, 2, *prepared.shape[1:]) / 255}


@torch.no_grad()
def start_with_pixels(encoder: IDEncoder) -> None:
    """Starts with tokens that hold the colours of their patch and its place, and nothing else.

    A transformer with random weights takes long to learn that neighbouring pixels belong together, and where
    to look; what the residual branches add is small at first. The first channels of a token are
    the coefficients of its patch's slowest waves (a discrete cosine transform) per colour, raised with the
    frequency because pictures have less of the fast ones. The next are sines and cosines of its place.
    """
    dino, (count, width) = encoder.dino, encoder.dino.embeddings.position_embeddings.shape[1:]
    projection = dino.embeddings.patch_embeddings.projection
    side, waves = projection.kernel_size[0], math.isqrt(round(PIXEL_SHARE * width / 3))
    order = torch.arange(waves)
    wave = torch.cos(torch.pi * order[:, None] * (torch.arange(side) + 0.5) / side) / side
    wave[1:] *= 2  # now the coefficient is the amplitude
    gain = 1 + WAVE_GAIN * (order[:, None] + order)
    planes = gain[..., None, None] * wave[:, None, :, None] * wave[None, :, None, :]
    projection.weight.zero_()
    projection.bias.zero_()
    for colour in range(3):
        projection.weight[colour : 3 * waves**2 : 3, colour] = planes.flatten(0, 1)
    grid = math.isqrt(count - 1)
    places = torch.cartesian_prod(torch.arange(grid), torch.arange(grid)) / grid
    octaves = torch.pi / 2 * 2.0 ** torch.arange((width - 3 * waves**2) // 4)
    angles = (places[:, :, None] * octaves).flatten(1)
    place = torch.cat([angles.sin(), angles.cos()], dim=1)
    positions = dino.embeddings.position_embeddings
    positions[0, 1:] = 0
    positions[0, 1:, 3 * waves**2 : 3 * waves**2 + place.shape[1]] = place
    for layer in dino.encoder.layer:
        layer.layer_scale1.lambda1.fill_(RESIDUAL_SCALE)
        layer.layer_scale2.lambda1.fill_(RESIDUAL_SCALE)


class IdentityModule(nn.Module):
    """The encoder with the two heads that only its training needs."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.encoder = IDEncoder(architecture)
        start_with_pixels(self.encoder)
        self.encoder.projector.requires_grad_(False)  # learned with the diffusion part
        self.encoder.dino.embeddings.mask_token.requires_grad_(False)
        width = architecture.dino_width
        self.identity = nn.Linear(2 * width, width)
        self.pixels = nn.Linear(width, 3 * PATCH_SIDE**2)
        self.sharpness = nn.Parameter(torch.tensor([SHARPNESS]))  # no scalar: those cannot be sharded
        self.register_load_state_dict_pre_hook(_sharpness_as_vector)  # type: ignore[no-untyped-call]

    def forward(self, views: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Computes what distinguishes views (N, 3, 224, 224), and what is in them.

        Returns:
            Unit identity vectors (N, D), pixels of each patch (N, 256, 108), and the factor (1,), at most
            100, that makes logits of the products of identity vectors.
        """
        tokens = self.encoder.features(views)
        summary = torch.cat([tokens[:, 0], tokens[:, 1:].mean(1)], dim=1)
        identity = F.normalize(self.identity(summary), dim=1)
        return identity, self.pixels(tokens[:, 1:]), self.sharpness.exp().clamp(max=100)


def _sharpness_as_vector(_: nn.Module, state: dict[str, Tensor], prefix: str, *__: object) -> None:
    """Takes a state that has a scalar, too."""
    if f"{prefix}sharpness" in state:
        state[f"{prefix}sharpness"] = state[f"{prefix}sharpness"].reshape(1)


class IdentityTask:
    """Contrast across views (InfoNCE, both ways) and reconstruction of shrunken patches."""

    def __init__(
        self,
        architecture: Architecture,
        store: ViewStore,
        rules: CommonRules,
        seed: int = seeds.IDENTITY_VIEWS,
    ) -> None:
        self.module = self.network = IdentityModule(architecture)
        self.patches = REFERENCE_SIZE // architecture.dino_patch
        self._data = TwoViews(store, seed, rules)

    def dataset(self) -> TwoViews:
        """Gives views of single objects."""
        return self._data

    def loss(self, module: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Computes the loss; also shows how often the other view of an object is the nearest of the batch."""
        views = batch["views"].transpose(0, 1).flatten(0, 1)  # all first views, then all second ones
        identity, pixels, sharpness = module(views)
        first, second = identity.chunk(2)
        # written out, because autocast would round a product of matrices
        likeness = (first[:, None] * second).sum(2) * sharpness
        same = torch.arange(len(first), device=likeness.device)
        contrast = 0.5 * (F.cross_entropy(likeness, same) + F.cross_entropy(likeness.T, same))
        small = F.interpolate(views, (self.patches * PATCH_SIDE,) * 2, mode="area")
        truth = F.pixel_unshuffle(small, PATCH_SIDE).flatten(2).transpose(1, 2)
        detail = (pixels - truth).abs().mean()
        found = (likeness.argmax(1) == same).float().mean()
        return {
            "loss": contrast + PATCH_WEIGHT * detail,
            "contrast": contrast.detach(),
            "detail": detail.detach(),
            "found": found,
        }
