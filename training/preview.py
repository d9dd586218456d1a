"""Draws samples while training: held-out objects in scenes, beside the true pictures.

examples:
    python -m training.preview training/recipes/anydoor-small.toml build/samples.png
    python -m training.preview RECIPE build/samples.png --folder runs/next --count 20
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from numpy.typing import NDArray
from torch import Tensor

from engines.errors import AnyDoorError
from runtime.diffusion.ddim import MAX_STEPS, ddim_schedule
from runtime.errors import InputError
from runtime.imaging.collage import crop_scene, make_hint
from runtime.imaging.geometry import Ratios
from runtime.imaging.modes import MODES
from runtime.imaging.reference import prepare_reference
from runtime.systems.anydoor import DEFAULTS
from training.assemble import trained_model
from training.assemble_imprint import trained_imprint
from training.config import ImprintRecipe, Recipe, read_recipe
from training.data.pairs import LARGEST_BOX, Picture, UnfitPairError, check_masks
from training.data.synthetic.views import HELD_OUT, reference_view, scene_view
from training.data.view_store import as_shot
from training.network.architecture import REFERENCE_SIZE
from training.network.modules import AnyDoor
from training.preview_imprint import STEPS, ImprintPreview
from training.sheets import column, write_sheet
from training.systems.anydoor import Denoiser, DiffusionTask
from training.systems.imprint import SceneDenoiser


@torch.no_grad()
def sample(
    model: AnyDoor, tokens: Tensor, hints: Tensor, steps: int, guidance_scale: float, seed: int = 0
) -> Tensor:
    """Returns samples by DDIM with eta 0 from pure noise, at the timesteps that the runtime uses.

    Args:
        model: UNet and ControlNet.
        tokens: (2 N, T, D), of N references and of N times the black one.
        hints: (N, 4, R, R).
        steps: 1..999.
        guidance_scale: of classifier-free guidance; the unconditional reference is black.
        seed: of the noise.

    Returns:
        Scaled latents (N, C, h, w).

    Raises:
        InputError: the number of steps is out of range.
    """
    schedule = ddim_schedule(model.alphas_cumprod.cpu().numpy(), steps)
    count, side = len(hints), hints.shape[-1] // model.architecture.latent_factor
    generator = torch.Generator().manual_seed(seed)
    latent = torch.randn(count, model.architecture.latent_channels, side, side, generator=generator)
    latent = latent.to(hints.device)
    for timestep, (from_latent, from_noise, _) in zip(
        schedule.timesteps.tolist(), schedule.coefficients.tolist()
    ):
        both = torch.full((2 * count,), timestep, device=hints.device)
        estimate = model(latent.repeat(2, 1, 1, 1), both, tokens, hints.repeat(2, 1, 1, 1))
        wanted, unconditional = estimate.chunk(2)
        noise = unconditional + guidance_scale * (wanted - unconditional)
        latent = from_latent * latent + from_noise * noise
    return latent


@dataclass(frozen=True, eq=False)
class HeldOutPair:
    """An object that no training saw and a scene with it, prepared as the runtime does."""

    reference: Picture  # (224, 224, 3)
    hint: NDArray[np.float32]  # (4, R, R), see runtime.imaging.collage
    picture: NDArray[np.float32]  # (3, R, R), -1..1, what should be drawn


class Preview:
    """Sheets of samples with the weights that training has reached, always of the same held-out pairs.

    Guidance, steps, ratios and mode are the recipe's defaults, where it has none the runtime's.
    """

    def __init__(
        self,
        recipe: Recipe,
        model: AnyDoor,
        count: int = 6,
        steps: int | None = None,
        guidance_scale: float | None = None,
    ) -> None:
        """Takes the autoencoder and the ID encoder of `model`, which do not learn while it is used.

        Raises:
            InputError: the recipe's defaults cannot be used.
        """
        self._model = model
        self._steps = steps if steps is not None else int(recipe.default_number("steps", STEPS))
        usual = recipe.default_number("guidance_scale", DEFAULTS["guidance_scale"])
        self._guidance_scale = guidance_scale if guidance_scale is not None else usual
        self._pairs = held_out_pairs(recipe, count)
        references = np.stack([pair.reference for pair in self._pairs])
        self._references = torch.from_numpy(references).permute(0, 3, 1, 2) / 255
        self._hints = torch.from_numpy(np.stack([pair.hint for pair in self._pairs]))

    def __call__(self, weights: Mapping[str, Tensor]) -> Picture:
        """Draws the sheet: one column per pair."""
        return np.concatenate(self.columns(weights), axis=1)

    @torch.no_grad()
    def columns(self, weights: Mapping[str, Tensor]) -> list[Picture]:
        """Draws a column per pair: reference, collage, mask, sample, and the true picture.

        weights: of `Denoiser`, as `DiffusionTask` trains it. They get a network of their own, because the one
            that is trained may be sharded over several processes.
        """
        frozen = self._model
        model = AnyDoor(frozen.architecture, ("unet", "control", "id_encoder"))
        DiffusionTask.load(model, weights)
        black = torch.zeros(1, 3, REFERENCE_SIZE, REFERENCE_SIZE)
        device = PartialState().device
        frozen.vae.to(device)
        shown = torch.cat([self._references, black]).to(device)
        model.to(device)
        features = frozen.id_encoder.to(device).features(shown)
        tokens = model.id_encoder.projector(features)
        count = len(self._pairs)
        both = torch.cat([tokens[:count], tokens[count:].expand(count, -1, -1)])
        latents = sample(model, both, self._hints.to(device), self._steps, self._guidance_scale)
        drawn = frozen.decode(latents).cpu().numpy()
        return [
            column(pair.reference, pair.hint, picture, pair.picture)
            for pair, picture in zip(self._pairs, drawn, strict=True)
        ]


def held_out_pairs(recipe: Recipe, count: int) -> list[HeldOutPair]:
    """Makes pairs of objects that no training saw, with the ratios and the mode of the recipe's defaults.

    Raises:
        InputError: a ratio or the mode cannot be used.
    """
    usual = Ratios()
    names = {"reference_ratio": usual.reference, "box_ratio": usual.box, "crop_ratio": usual.crop}
    ratios = Ratios(*(recipe.default_number(name, ratio) for name, ratio in names.items()))
    mode = recipe.defaults.get("mode", DEFAULTS["mode"])
    if mode not in MODES:
        raise InputError(f"[defaults] mode is {mode!r}; expected one of {', '.join(MODES)}")
    pairs: list[HeldOutPair] = []
    seed, side = HELD_OUT, recipe.pairs.resolution
    while len(pairs) < count:
        shown, scene = as_shot(reference_view(seed, 0)), as_shot(scene_view(seed, 0))
        seed += 1
        try:
            check_masks(shown.mask, scene.mask, LARGEST_BOX)
        except UnfitPairError:
            continue
        reference = prepare_reference(shown.image, shown.mask, ratios.reference)
        made = make_hint(scene.image, scene.mask, reference, ratios, MODES[str(mode)], side)
        pairs.append(HeldOutPair(reference.image, made.hint, crop_scene(scene.image, made.geometry, side)))
    return pairs


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns 0, or 2 if something that it was given cannot be used."""
    parser = argparse.ArgumentParser(
        prog="python -m training.preview",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", type=Path, help="what was trained")
    parser.add_argument("output", type=Path, help="the sheet, a PNG")
    parser.add_argument("--folder", type=Path, help="default: runs/NAME of the recipe")
    parser.add_argument("--count", type=int, default=10, help="of samples; default: 10")
    parser.add_argument("--steps", type=int, help=f"of sampling; default: the recipe's, else {STEPS}")
    parser.add_argument(
        "--guidance-scale", type=float, help=f"default: the recipe's, else {DEFAULTS['guidance_scale']:g}"
    )
    options = parser.parse_args(arguments)
    if options.count < 1:
        parser.error(f"--count is {options.count}; expected at least 1")
    if options.steps is not None and not 1 <= options.steps <= MAX_STEPS:
        parser.error(f"--steps is {options.steps}; expected 1 to {MAX_STEPS}")
    try:
        recipe, folder = read_recipe(options.recipe), options.folder or Path("runs") / options.recipe.stem
        settings = options.count, options.steps, options.guidance_scale
        if not isinstance(recipe, ImprintRecipe | Recipe):
            raise InputError(f"'{options.recipe}': there are no sheets of {recipe.system} after training")
        if isinstance(recipe, ImprintRecipe):
            imprint = trained_imprint(recipe, folder)
            trained = SceneDenoiser(imprint, backbone=False).state_dict()
            columns = ImprintPreview(recipe, imprint, *settings).columns(trained)
        else:
            model = trained_model(recipe, folder)
            columns = Preview(recipe, model, *settings).columns(Denoiser(model).state_dict())
        write_sheet(columns, options.output)
    except (AnyDoorError, OSError) as error:
        print(f"preview: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
