"""Samples to look at while training: held-out objects put into scenes, beside what they should look like."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from training.architecture import REFERENCE_SIZE
from training.config import Recipe, read_recipe
from training.data.pairs import Pair, Shot, UnfitPairError, make_pair
from training.data.synthetic.views import HELD_OUT, reference_view, scene_view
from training.inspect_data import column, draw_sheet
from training.model import AnyDoor
from training.train import trained_model


@torch.no_grad()
def sample(
    model: AnyDoor, references: Tensor, hints: Tensor, steps: int = 20, guidance: float = 2.0, seed: int = 0
) -> Tensor:
    """DDIM with eta 0 from pure noise, at the timesteps that the runtime uses.

    Args:
        model: the whole network.
        references: (N, 3, 224, 224), 0..1.
        hints: (N, 4, R, R).
        steps: how many; 1000 / steps is a whole number.
        guidance: scale of classifier-free guidance; the unconditional reference is black.
        seed: of the noise.

    Returns:
        Pictures (N, 3, R, R), about -1..1.
    """
    count, side = len(hints), hints.shape[-1] // model.architecture.latent_factor
    generator = torch.Generator().manual_seed(seed)
    latent = torch.randn(count, model.architecture.latent_channels, side, side, generator=generator)
    black = torch.zeros(1, 3, REFERENCE_SIZE, REFERENCE_SIZE)
    tokens = torch.cat(
        [model.encode_reference(references), model.encode_reference(black).expand(count, -1, -1)]
    )
    alphas = model.alphas_cumprod
    for timestep in range(1000 - 1000 // steps + 1, 0, -(1000 // steps)):
        both = torch.full((2 * count,), timestep)
        estimate = model(latent.repeat(2, 1, 1, 1), both, tokens, hints.repeat(2, 1, 1, 1))
        wanted, unconditional = estimate.chunk(2)
        noise = unconditional + guidance * (wanted - unconditional)
        now, after = alphas[timestep], alphas[max(timestep - 1000 // steps, 0)]
        clean = (latent - (1 - now).sqrt() * noise) / now.sqrt()
        latent = after.sqrt() * clean + (1 - after).sqrt() * noise
    return model.decode(latent)


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


def draw_preview(recipe: Recipe, folder: Path, path: Path, count: int, steps: int, guidance: float) -> None:
    """Writes a sheet, one column per pair: reference, collage, mask, sample, and the true picture."""
    model = trained_model(recipe, folder)
    pairs = held_out_pairs(recipe, count)
    references = torch.from_numpy(np.stack([p.reference for p in pairs])).permute(0, 3, 1, 2) / 255
    hints = torch.from_numpy(np.stack([p.hint for p in pairs]))
    drawn = sample(model, references, hints, steps, guidance).numpy()
    draw_sheet([column(pair, picture) for pair, picture in zip(pairs, drawn, strict=True)], path)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m training.preview", description=__doc__)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--folder", type=Path, help="default: runs/NAME of the recipe")
    parser.add_argument("--count", type=int, default=10)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=2.0)
    arguments = parser.parse_args()
    folder = arguments.folder or Path("runs") / arguments.recipe.stem
    recipe = read_recipe(arguments.recipe)
    draw_preview(recipe, folder, arguments.output, arguments.count, arguments.steps, arguments.guidance)


if __name__ == "__main__":
    main()
