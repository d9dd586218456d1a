"""Samples to look at while training: held-out objects put into scenes, beside what they should look like.

examples:
    python -m training.preview training/recipes/anydoor-small.toml build/samples.png
    python -m training.preview RECIPE build/samples.png --folder runs/next --count 20
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from training.config import Recipe, read_recipe
from training.data.pairs import Pair, Picture, Shot, UnfitPairError, make_pair
from training.data.synthetic.views import HELD_OUT, reference_view, scene_view
from training.inspect_data import column
from training.network.architecture import REFERENCE_SIZE
from training.network.modules import AnyDoor
from training.systems.anydoor import Denoiser, DiffusionTask
from training.systems.identity import dino_features


@torch.no_grad()
def sample(
    model: AnyDoor, tokens: Tensor, hints: Tensor, steps: int = 20, guidance_scale: float = 2.0, seed: int = 0
) -> Tensor:
    """DDIM with eta 0 from pure noise, at the timesteps that the runtime uses.

    Args:
        model: UNet and ControlNet.
        tokens: (2 N, T, D), of N references and of N times the black one.
        hints: (N, 4, R, R).
        steps: how many; 1000 / steps is a whole number.
        guidance: scale of classifier-free guidance; the unconditional reference is black.
        seed: of the noise.

    Returns:
        Scaled latents (N, C, h, w).
    """
    count, side = len(hints), hints.shape[-1] // model.architecture.latent_factor
    generator = torch.Generator().manual_seed(seed)
    latent = torch.randn(count, model.architecture.latent_channels, side, side, generator=generator)
    latent = latent.to(hints.device)
    alphas = model.alphas_cumprod
    for timestep in range(1000 - 1000 // steps + 1, 0, -(1000 // steps)):
        both = torch.full((2 * count,), timestep, device=hints.device)
        estimate = model(latent.repeat(2, 1, 1, 1), both, tokens, hints.repeat(2, 1, 1, 1))
        wanted, unconditional = estimate.chunk(2)
        noise = unconditional + guidance_scale * (wanted - unconditional)
        now, after = alphas[timestep], alphas[max(timestep - 1000 // steps, 0)]
        clean = (latent - (1 - now).sqrt() * noise) / now.sqrt()
        latent = after.sqrt() * clean + (1 - after).sqrt() * noise
    return latent


class Preview:
    """Sheets of samples with the weights that training has reached, always of the same held-out pairs."""

    def __init__(
        self, recipe: Recipe, model: AnyDoor, count: int = 6, steps: int = 20, guidance_scale: float = 2.0
    ) -> None:
        """Takes the autoencoder and the ID encoder of `model`, which do not learn while it is used."""
        self._model, self._steps, self._guidance = model, steps, guidance_scale
        self._pairs = held_out_pairs(recipe, count)
        references = np.stack([pair.reference for pair in self._pairs])
        self._references = torch.from_numpy(references).permute(0, 3, 1, 2) / 255
        self._hints = torch.from_numpy(np.stack([pair.hint for pair in self._pairs]))

    @torch.no_grad()
    def __call__(self, weights: Mapping[str, Tensor]) -> Picture:
        """One column per pair: reference, collage, mask, sample, and the true picture.

        weights: of `Denoiser`, as `DiffusionTask` trains it. They get a network of their own, because the one
        that is trained may be spread over several processes.
        """
        frozen = self._model
        model = AnyDoor(frozen.architecture, ("unet", "control", "id_encoder"))
        DiffusionTask.load(model, weights)
        black = torch.zeros(1, 3, REFERENCE_SIZE, REFERENCE_SIZE)
        device = next(frozen.vae.parameters()).device
        shown = torch.cat([self._references, black]).to(device)
        model.to(device)
        features = dino_features(frozen.id_encoder.to(device), shown)
        tokens = model.id_encoder.projector(features)
        count = len(self._pairs)
        both = torch.cat([tokens[:count], tokens[count:].expand(count, -1, -1)])
        latents = sample(model, both, self._hints.to(device), self._steps, self._guidance)
        drawn = frozen.decode(latents).cpu().numpy()
        columns = [column(pair, picture) for pair, picture in zip(self._pairs, drawn, strict=True)]
        return np.concatenate(columns, axis=1)


def held_out_pairs(recipe: Recipe, count: int) -> list[Pair]:
    """Pairs of objects that no training saw, box as mask, nothing augmented."""
    pairs: list[Pair] = []
    rules = type(recipe.pairs)(
        resolution=recipe.pairs.resolution,
        flip=0.0,
        brighten=0.0,
        box_masks=1.0,
        crop_ratios=recipe.pairs.crop_ratios,
    )
    number = 0
    while len(pairs) < count:
        views = reference_view(HELD_OUT + number, 0), scene_view(HELD_OUT + number, 0)
        number += 1
        try:
            reference, target = (Shot(view.image, view.mask > 128) for view in views)
            pairs.append(make_pair(reference, target, "multi-view", rules, np.random.default_rng(number)))
        except UnfitPairError:
            continue
    return pairs


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns 0, or 2 if what it is given cannot be used."""
    from training.train import REFUSALS, trained_model  # which draws with `Preview` itself

    parser = argparse.ArgumentParser(
        prog="python -m training.preview",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", type=Path, help="what was trained")
    parser.add_argument("output", type=Path, help="the sheet, a PNG")
    parser.add_argument("--folder", type=Path, help="default: runs/NAME of the recipe")
    parser.add_argument("--count", type=int, default=10, help="of samples; default: 10")
    parser.add_argument("--steps", type=int, default=20, help="of sampling, divides 1000; default: 20")
    parser.add_argument("--guidance-scale", type=float, default=2.0, help="default: 2")
    options = parser.parse_args(arguments)
    if options.count < 1 or options.steps < 1 or 1000 % options.steps:
        parser.error("--count is at least 1 and --steps divides 1000")
    try:
        recipe = read_recipe(options.recipe)
        model = trained_model(recipe, options.folder or Path("runs") / options.recipe.stem)
        preview = Preview(recipe, model, options.count, options.steps, options.guidance_scale)
        Image.fromarray(preview(Denoiser(model).state_dict())).save(options.output, "PNG")
    except REFUSALS as error:
        print(f"preview: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
