"""Recipes: what they say is what is run, and a trained network starts the next run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import TINY

from training.architecture import infer_architecture
from training.checkpoint import write_model
from training.config import Recipe, RecipeError, read_recipe
from training.data.mixture import Mixture
from training.data.pairs import PairRules, Shot
from training.data.sources import Source, SourceError
from training.diffusion import Denoising, DiffusionTask
from training.loop import LoopSettings, train
from training.model import AnyDoor
from training.small import open_control
from training.train import frozen_parts

RECIPES = sorted((Path(__file__).parents[2] / "training" / "recipes").glob("*.toml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_can_be_read(path: Path) -> None:
    recipe = read_recipe(path)
    assert recipe.pairs.resolution % recipe.architecture.latent_factor == 0
    with torch.device("meta"):
        AnyDoor(recipe.architecture)


def test_the_defaults_are_the_paper_s(tmp_path: Path) -> None:
    path = tmp_path / "empty.toml"
    path.write_text("")
    recipe = read_recipe(path)
    assert recipe == Recipe()
    assert recipe.pairs == PairRules(resolution=512)
    assert recipe.denoising == Denoising(control=True, unet_encoder=False, unet_decoder=True, projector=True)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[pear]\n", r"unknown section \[pear\]"),
        ("[pairs]\nresolutoin = 3\n", r"\[pairs\] has no 'resolutoin'"),
        ("[diffusion]\nbatch = 3\n", r"\[diffusion\].*steps"),
        ("[pairs\n", "cannot read the recipe"),
        ('[[sources]]\nname = "Video"\nroot = "x"\n', "no data set is called 'Video'"),
        (
            '[denoising]\nattention_guide = 0.1\n[[sources]]\nname = "DUT"\nroot = "x"\n',
            "is for rendered pairs",
        ),
    ],
)
def test_a_slip_in_a_recipe_is_told(text: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "slip.toml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=says):
        read_recipe(path)


def test_a_checkpoint_starts_the_next_run(tmp_path: Path) -> None:
    torch.manual_seed(1)
    model, path = AnyDoor(TINY), tmp_path / "model.safetensors"
    write_model(path, model, torch.float32)
    started = frozen_parts(replace(Recipe(architecture=TINY), start=str(path)), tmp_path)
    for name, value in model.state_dict().items():
        assert torch.equal(started.state_dict()[name], value), name
    shapes = {name: tuple(tensor.shape) for name, tensor in model.official_state_dict().items()}
    inferred = infer_architecture(shapes, unet_head_width=32, dino_heads=1, unet_norm_groups=8)
    assert inferred == TINY


def test_an_open_control_lets_the_hint_through() -> None:
    torch.manual_seed(0)
    control = AnyDoor(TINY, parts=["control"]).control
    open_control(control)
    hints, tokens = torch.rand(2, 4, 32, 32) * 2 - 1, torch.randn(2, 5, 32)
    with torch.no_grad():
        maps = control(hints, torch.tensor([5, 5]), tokens)
        others = control(hints.flip(0), torch.tensor([5, 5]), tokens)
    for detail, other in zip(maps, others, strict=True):
        assert (detail - other).std() > 0.05 * detail.std() > 0


class TwoDiscs(Source):
    """A data set of one object, which every third time has an empty mask."""

    kind = "video"

    def __len__(self) -> int:
        return 3

    def pair(self, index: int, rng: np.random.Generator) -> tuple[Shot, Shot]:
        row, column = np.mgrid[:48, :48]
        mask = (np.hypot(row - 24, column - 24) < 12) & (index > 0)
        images = rng.integers(0, 256, (2, 48, 48, 3), dtype=np.uint8)
        return Shot(images[0], mask), Shot(images[1], mask)


def test_a_mixture_is_trained_on(tmp_path: Path) -> None:
    pairs = Mixture([(TwoDiscs(tmp_path), 1.0)], PairRules(resolution=32), (4, 4, 4), drop=0.5)
    samples = [pairs[number] for number in range(12)]
    assert np.array_equal(samples[3]["hint"], pairs[3]["hint"])
    assert {bool(sample["reference"].any()) for sample in samples} == {True, False}
    torch.manual_seed(0)
    task = DiffusionTask(AnyDoor(TINY), pairs, Denoising())
    train(task, LoopSettings(steps=1, batch=2), tmp_path)
    assert (tmp_path / "mean.pt").exists()


def test_a_hopeless_mixture_says_why(tmp_path: Path) -> None:
    class Empty(TwoDiscs):
        def __len__(self) -> int:
            return 1

    pairs = Mixture([(Empty(tmp_path), 1.0)], PairRules(resolution=32), (4, 4, 4))
    with pytest.raises(SourceError, match=r"no fit pair.*mask covers 0\.0%"):
        pairs[0]
