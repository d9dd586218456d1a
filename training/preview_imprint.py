"""Draws samples of IMPRINT while training: held-out objects in their scenes, at all mask levels."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from accelerate import PartialState
from numpy.random import Generator
from torch import Tensor

from runtime.diffusion.ddim import ddim_schedule
from runtime.imaging.reference import BACKGROUNDS
from training.config import ImprintRecipe
from training.data.augment import Augmentation
from training.data.composites import Composite, CompositeMaker
from training.data.pairs import Picture, Shot, UnfitPairError, as_reference
from training.data.sources import Source
from training.data.synthetic.views import HELD_OUT, reference_view, scene_view
from training.data.view_store import as_shot
from training.network.architecture import LATENT_SCALE
from training.network.imprint import Imprint
from training.sheets import column
from training.systems.imprint import load_parts

STEPS = 20
"""Steps of a sample where neither the caller nor the recipe says how many."""

GUIDANCE_SCALE = 3.0
"""The default, from ObjectStitch's paper."""


class HeldOutObjects(Source):
    """Rendered objects that no training sees, drawn when they are asked for."""

    kind = "multi-view"
    either_side = False

    def __init__(self) -> None:
        super().__init__(Path())

    def __len__(self) -> int:
        return HELD_OUT

    def pair(self, index: int, rng: Generator) -> tuple[Shot, Shot]:
        """Draws an object alone and in a scene."""
        seed = HELD_OUT + index
        return as_shot(reference_view(seed, 0)), as_shot(scene_view(seed, 0))


def held_out_composites(recipe: ImprintRecipe, count: int) -> list[Composite]:
    """Makes samples of held-out objects as the runtime would, with the recipe's ratios of [defaults]."""
    crop, room = (recipe.default_number(name, 0.0) for name in ("crop_ratio", "reference_ratio"))
    rules = replace(
        recipe.pairs,
        flip=0.0,
        mirror=0.0,
        crop_ratios=(crop, crop) if crop else recipe.pairs.crop_ratios,
        reference_ratios=(room, room) if room else recipe.pairs.reference_ratios,
    )
    unchanged = Augmentation(rotation=0.0, perspective=0.0, colour=0.0)
    maker = CompositeMaker(rules, unchanged, BACKGROUNDS[recipe.architecture.reference_background])
    objects = HeldOutObjects()
    made: list[Composite] = []
    for number in itertools.count():
        if len(made) == count:
            break
        rng = np.random.default_rng([HELD_OUT, number])
        with contextlib.suppress(UnfitPairError):
            made.append(maker(objects, *objects.pair(number, rng), rng, hole=False))
    return made


def composite_column(composite: Composite, *pictures: np.ndarray) -> Picture:  # type: ignore[type-arg]
    """Stacks reference, scene, mask (white: draw; grey: scene; black: beyond it), pictures, and the truth."""
    mask = np.where(composite.counts, 1.0, np.where(composite.mask, -1.0, 0.0)).astype(np.float32)
    known = np.concatenate([composite.scene, mask[None]])
    return column(composite.reference, known, *pictures, composite.picture)


class ImprintPreview:
    """Sheets of samples with the weights that stage 2 has reached, always of the same held-out objects."""

    def __init__(
        self,
        recipe: ImprintRecipe,
        model: Imprint,
        count: int = 6,
        steps: int | None = None,
        guidance_scale: float | None = None,
    ) -> None:
        """Takes the autoencoder and the backbone of `model`; guidance and steps are the recipe's defaults.

        Raises:
            InputError: the recipe's defaults cannot be used.
        """
        self._model = model
        self._steps = steps if steps is not None else int(recipe.default_number("steps", STEPS))
        usual = recipe.default_number("guidance_scale", GUIDANCE_SCALE)
        self._guidance_scale = guidance_scale if guidance_scale is not None else usual
        self._composites = held_out_composites(recipe, count)

    def __call__(self, weights: Mapping[str, Tensor]) -> Picture:
        """Draws the sheet: one column per object."""
        return np.concatenate(self.columns(weights), axis=1)

    @torch.no_grad()
    def columns(self, weights: Mapping[str, Tensor]) -> list[Picture]:
        """Draws a column per object: reference, scene, mask, sample, and the true picture.

        weights: of `SceneDenoiser`. They get a network of their own, because the one that is trained may be
            sharded over several processes.
        """
        frozen = self._model
        device = PartialState().device
        frozen.vae.to(device)
        model = Imprint(frozen.architecture, ("unet", "id_encoder"))
        model.id_encoder.load_state_dict(frozen.id_encoder.state_dict())
        load_parts(model, weights, ("backbone", "adapter", "unet"))
        model.to(device).eval()

        def stacked(planes: Sequence[np.ndarray]) -> Tensor:  # type: ignore[type-arg]
            return torch.from_numpy(np.stack(planes)).to(device)

        made = self._composites
        picture, scene = stacked([each.picture for each in made]), stacked([each.scene for each in made])
        mask = stacked([each.mask[None].astype(np.float32) for each in made])
        background, known = (frozen.encode(each).mean * LATENT_SCALE for each in (picture, scene))
        small = F.interpolate(mask, known.shape[-2:], mode="nearest")
        tokens = model.encode_reference(stacked([as_reference(each.reference) for each in made]))
        both = torch.cat([tokens, frozen.unconditional.to(tokens).expand_as(tokens)])
        latents = sample(
            model, both, torch.cat([small, known], 1), background, self._steps, self._guidance_scale
        )
        drawn = frozen.decode(latents).cpu().numpy()
        return [composite_column(each, shown) for each, shown in zip(made, drawn, strict=True)]


@torch.no_grad()
def sample(
    model: Imprint,
    tokens: Tensor,
    scene: Tensor,
    background: Tensor,
    steps: int,
    guidance_scale: float,
    seed: int = 0,
) -> Tensor:
    """Returns samples by DDIM with eta 0; after each step all but the mask is the background, as noisy as the
    rest.

    Args:
        model: its UNet.
        tokens: (2 N, T, D), of N references and of no reference.
        scene: (N, 1 + C, h, w), see `Imprint.predict_noise`.
        background: (N, C, h, w), scaled latents of the scene as it is.
        steps: 1..999.
        guidance_scale: of classifier-free guidance.
        seed: of the noise.

    Returns:
        Scaled latents (N, C, h, w).

    Raises:
        InputError: the number of steps is out of range.
    """
    schedule = ddim_schedule(model.alphas_cumprod.cpu().numpy(), steps)
    start = torch.randn(background.shape, generator=torch.Generator().manual_seed(seed)).to(background)
    latent, drawn = start, scene[:, :1]
    rows = zip(
        schedule.timesteps.tolist(),
        schedule.coefficients.tolist(),
        schedule.background_coefficients.tolist(),
        strict=True,
    )
    for timestep, (from_latent, from_noise, _), (signal, noise) in rows:
        both = torch.full((len(tokens),), timestep, device=latent.device)
        estimate = model.predict_noise(latent.repeat(2, 1, 1, 1), both, tokens, scene.repeat(2, 1, 1, 1))
        wanted, unconditional = estimate.chunk(2)
        epsilon = unconditional + guidance_scale * (wanted - unconditional)
        moved = from_latent * latent + from_noise * epsilon
        latent = drawn * moved + (1 - drawn) * (signal * background + noise * start)
    return latent
