"""Recipes: what they say is what is run, and a trained network starts the next run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support.tiny import TINY
from training.checkpoint import write_model
from training.config import Recipe, RecipeError, read_recipe
from training.data.mixture import Mixture
from training.data.pairs import PairRules, Shot
from training.data.sources import Source, SourceError
from training.loop import LoopSettings, train
from training.network.architecture import infer_architecture
from training.network.modules import AnyDoor
from training.small.recipe import open_control
from training.systems.anydoor import Denoising, DiffusionTask
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
        (
            '[architecture]\nprediction = "V"\n',
            r'prediction of \[architecture\] is "V", expected "eps.* or "v"',
        ),
        ('[data]\nkind = "vidoe"\n', r'kind of \[data\] is "vidoe", expected "video" or'),
        ('[pairs]\ntimesteps = "papre"\n', r'timesteps of \[pairs\] is "papre", expected "uniform" or'),
        ('[hint]\nsteps = 1\nprecision = "bf-16"\n', r'is "bf-16", expected "no" or "bf16" or "fp16"'),
        ("[hint]\nsteps = 1.5\n", r"steps of \[hint\] is 1.5, expected a whole number"),
        ("[hint]\nsteps = true\n", "is true, expected a whole number"),
        ("[denoising]\ncontrol = 1\n", "is 1, expected true or false"),
        ('[pairs]\nflip = "0.5"\n', 'is "0.5", expected a number'),
        ("[pairs]\ncrop_ratios = [1.0]\n", r"is \[1.0\], expected a list, 2 times a number"),
        ('[architecture]\nunet_channels = [8, "9"]\n', 'is .8, "9".*, expected a list, a whole number'),
        ("[architecture]\nunet_channels = 8\n", "is 8, expected a list"),
        ("[data]\nkind = 1979-05-27\n", 'is "1979-05-27", expected "video"'),
        ("hint = 3\n", r"hint is 3, expected a section \[hint\]"),
        ("[[hint]]\nsteps = 1\n", r"expected a section \[hint\]"),
        ("start = 3\n", "start of the recipe is 3, expected a text"),
        ("strat = 'x'\n", "the recipe has no 'strat'"),
        ('checkpoint_dtype = "fp16"\n', 'expected "float32" or "bfloat16" or "float16"'),
        ("[sources]\nname = 3\n", r"sources are written \[\[sources\]\]"),
        ("[[sources]]\nname = 3\nroot = 'x'\n", r"name of \[sources\] is 3, expected a text"),
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


def test_whole_numbers_are_numbers_and_lists_may_be_of_any_length(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text("[pairs]\nflip = 0\ncrop_ratios = [1, 2]\n[architecture]\nunet_channels = [32, 64, 96]\n")
    recipe = read_recipe(path)
    assert (recipe.pairs.flip, recipe.pairs.crop_ratios) == (0.0, (1.0, 2.0))
    assert recipe.architecture.unet_channels == (32, 64, 96)


def test_a_recipe_that_is_no_text_is_told(tmp_path: Path) -> None:
    path = tmp_path / "binary.toml"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(RecipeError, match="cannot read the recipe"):
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


class Counted(TwoDiscs):
    """Counts how often it is asked."""

    asked = 0

    def pair(self, index: int, rng: np.random.Generator) -> tuple[Shot, Shot]:
        self.asked += 1
        return super().pair(index, rng)


def test_data_sets_are_asked_as_often_as_they_weigh(tmp_path: Path) -> None:
    """Chi-square with two degrees of freedom; 13.8 is its 99.9 % quantile."""
    weights = np.array([6.0, 3.0, 1.0])
    sources = [Counted(tmp_path) for _ in weights]
    pairs = Mixture(list(zip(sources, weights, strict=True)), PairRules(resolution=8), (4, 1, 1))
    rng = np.random.default_rng(0)
    for _ in range(300):
        pairs.draw(rng)
    asked = np.array([source.asked for source in sources])
    expected = asked.sum() * weights / weights.sum()
    assert asked.sum() >= 300
    assert ((asked - expected) ** 2 / expected).sum() < 13.8


def test_the_published_mix_is_the_released_code_s() -> None:
    """Samples per epoch there: lengths of the data sets, those of videos, clothes and views taken twice."""
    recipe = read_recipe(next(path for path in RECIPES if path.stem == "anydoor"))
    weights = {source.name: 1000 * source.weight for source in recipe.sources}
    twice = {"YouTubeVOS": 40000, "YouTubeVIS": 40000, "UVO": 25000, "MOSE": 40000, "VIPSeg": 30000}
    twice |= {"MVImgNet": 40000, "VitonHD": 20000, "FashionTryon": 5000}
    salient = weights.pop("MSRA10K") + weights.pop("DUT") + weights.pop("HFlickr")
    assert salient == pytest.approx(20000)
    assert weights.pop("BURST") == weights["VIPSeg"]
    assert weights == {name: 2 * length for name, length in twice.items()} | {"LVIS": 20000, "SAM": 20000}


class Lopsided(TwoDiscs):
    """The object is a bar from edge to edge; the released code takes the set for another kind."""

    released_kind = "multi-view"

    def pair(self, index: int, rng: np.random.Generator) -> tuple[Shot, Shot]:
        mask = np.zeros((48, 48), bool)
        mask[16:32] = True
        return Shot(np.zeros((48, 48, 3), np.uint8), mask), Shot(np.zeros((48, 48, 3), np.uint8), mask)


def test_a_data_set_s_own_rules_are_followed(tmp_path: Path) -> None:
    source, rng = Lopsided(tmp_path), np.random.default_rng(0)
    for rule, kind in (("paper", "video"), ("code", "multi-view")):
        pairs = Mixture([(source, 1.0)], PairRules(resolution=8, timesteps=rule), (4, 1, 1))  # type: ignore[arg-type]
        source.either_side = True
        with pytest.raises(SourceError, match="more than 80% of its picture"):
            pairs.draw(rng)
        source.either_side = False
        assert pairs.draw(rng).kind == kind


def test_damaged_pairs_are_passed_over(tmp_path: Path) -> None:
    """Of three pairs one has no mask, and one a picture that is not as large as its mask."""

    class Damaged(TwoDiscs):
        def pair(self, index: int, rng: np.random.Generator) -> tuple[Shot, Shot]:
            reference, target = super().pair(index, rng)
            return (Shot(reference.image[:40], reference.mask) if index == 1 else reference), target

    pairs = Mixture([(Damaged(tmp_path), 1.0)], PairRules(resolution=8), (4, 1, 1))
    for number in range(10):
        assert pairs[number]["picture"].shape == (3, 8, 8)


def test_a_hopeless_mixture_says_why(tmp_path: Path) -> None:
    class Empty(TwoDiscs):
        def __len__(self) -> int:
            return 1

    pairs = Mixture([(Empty(tmp_path), 1.0)], PairRules(resolution=32), (4, 4, 4))
    with pytest.raises(SourceError, match=r"no fit pair.*mask covers 0\.0%"):
        pairs[0]
