"""Sheets of samples: drawn with the given weights, the recipe's defaults, and the runtime's DDIM."""

from __future__ import annotations

import io
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from runtime.errors import InputError
from runtime.imaging.collage import make_hint
from runtime.imaging.geometry import Ratios
from runtime.imaging.modes import MODES
from runtime.imaging.reference import prepare_reference
from tests.support.tiny import TINY, RandomPairs, open_zero_convolutions
from training.config import Default, Recipe
from training.data.pairs import PairRules
from training.data.synthetic.views import HELD_OUT, reference_view, scene_view
from training.data.view_store import as_shot
from training.loop import train
from training.loop_settings import LoopSettings
from training.network.modules import AnyDoor
from training.preview import Preview, held_out_pairs, main, sample
from training.systems.anydoor import Denoiser, Denoising, DiffusionTask

RECIPE = Recipe(architecture=TINY, pairs=PairRules(resolution=32))


def tiny_model() -> AnyDoor:
    torch.manual_seed(0)
    model = AnyDoor(TINY)
    open_zero_convolutions(model)
    return model.eval()


def with_defaults(**defaults: Default) -> Recipe:
    return replace(RECIPE, defaults=defaults)


def test_samples_are_drawn_with_the_weights_that_are_given(tmp_path: Path) -> None:
    model = tiny_model()
    task = DiffusionTask(model, RandomPairs(), Denoising())
    preview = Preview(RECIPE, model, count=2, steps=2)
    before = preview(task.module.state_dict())
    assert before.shape == (5 * 32, 2 * 32, 3)
    train(task, LoopSettings(steps=1, batch=2, learning_rate=1e-2), tmp_path, preview)
    after = preview(task.module.state_dict())
    assert np.array_equal(after[:96], before[:96])  # reference, collage and mask
    assert not np.array_equal(after[96:128], before[96:128])  # sample
    events = EventAccumulator(str(tmp_path / "events"), {"images": 0})
    events.Reload()
    drawn = Image.open(io.BytesIO(events.Images("samples")[0].encoded_image_string))
    assert np.array_equal(np.asarray(drawn), after)


@torch.no_grad()
@pytest.mark.parametrize("steps", [1, 4, 7])
def test_a_step_is_ddim_s_with_guidance(steps: int) -> None:
    """The last step, of the formula by hand: x0 by equation 12 of the paper, then to the last alpha."""
    model = tiny_model()
    tokens, hints = torch.randn(2, 257, 32), torch.rand(1, 4, 32, 32) * 2 - 1
    timesteps = [step * math.ceil(1000 / steps) + 1 for step in range(steps)]
    latent = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(5))
    alphas = model.alphas_cumprod.double()
    for timestep, following in zip(timesteps[::-1], [*timesteps[-2::-1], 0]):
        times = torch.tensor([timestep])
        wanted, black = (model(latent, times, each[None], hints) for each in tokens)
        noise = black + 3.0 * (wanted - black)
        now, after = alphas[timestep], alphas[following]
        clean = (latent - (1 - now).sqrt() * noise) / now.sqrt()
        latent = (after.sqrt() * clean + (1 - after).sqrt() * noise).float()
    found = sample(model, tokens, hints, steps, 3.0, seed=5)
    torch.testing.assert_close(found, latent, rtol=1e-4, atol=1e-4)


def test_guidance_and_steps_are_the_recipe_s() -> None:
    model = tiny_model()
    weights = Denoiser(model).state_dict()
    expected = Preview(RECIPE, model, 1, steps=3, guidance_scale=4.0)(weights)
    assert np.array_equal(Preview(with_defaults(guidance_scale=4, steps=3), model, 1)(weights), expected)
    assert not np.array_equal(Preview(with_defaults(guidance_scale=1, steps=3), model, 1)(weights), expected)


def test_ratios_and_mode_are_the_recipe_s() -> None:
    seed = HELD_OUT
    shown, scene = as_shot(reference_view(seed, 0)), as_shot(scene_view(seed, 0))
    for mode in MODES:
        pair = held_out_pairs(with_defaults(mode=mode, crop_ratio=1.3, reference_ratio=1.5), 1)[0]
        reference = prepare_reference(shown.image, shown.mask, 1.5)
        expected = make_hint(scene.image, scene.mask, reference, Ratios(1.5, 1.1, 1.3), MODES[mode], 32)
        assert np.array_equal(pair.reference, reference.image)
        assert np.array_equal(pair.hint, expected.hint)


@pytest.mark.parametrize(
    ("defaults", "says"),
    [
        ({"mode": "box"}, r"\[defaults\] mode is 'box'; expected one of crop, shape, keep_background"),
        ({"crop_ratio": "large"}, r"\[defaults\] crop_ratio is 'large'; expected a number"),
        ({"crop_ratio": 0.5}, "the crop ratio is 0.5; expected 1 to 100"),
        ({"guidance_scale": (1.0, 2.0)}, r"\[defaults\] guidance_scale is \(1.0, 2.0\); expected a number"),
    ],
)
def test_defaults_that_cannot_be_used_are_told(defaults: dict[str, Default], says: str) -> None:
    with pytest.raises(InputError, match=says):
        Preview(with_defaults(**defaults), tiny_model(), 1)


@pytest.mark.parametrize("steps", ["0", "1000"])
def test_steps_that_cannot_be_taken_are_told(steps: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["recipe.toml", "samples.png", "--steps", steps])
    assert ended.value.code == 2
    assert f"--steps is {steps}; expected 1 to 999" in capsys.readouterr().err
