"""Recipes: those that are shipped can be read, and a slip in one is refused in a sentence."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from runtime.errors import InputError
from training.config import (
    DreamBoothRecipe,
    ImprintRecipe,
    Recipe,
    SegmenterRecipe,
    StableDiffusionRecipe,
    read_recipe,
)
from training.data.pairs import PairRules
from training.network.imprint import Imprint
from training.network.modules import AnyDoor
from training.network.segmenter import PATCH
from training.systems.anydoor import Denoising

RECIPES = sorted((Path(__file__).parents[2] / "training" / "recipes").glob("*.toml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_can_be_read(path: Path) -> None:
    recipe = read_recipe(path)
    if isinstance(recipe, DreamBoothRecipe):
        expected = {"dreambooth": ("a hmv cup", 1000), "dreambooth-small": ("a gzj mug", 300)}
        assert (recipe.subject.prompt, recipe.subject.steps) == expected[path.stem]
        return
    if isinstance(recipe, SegmenterRecipe):
        assert recipe.architecture.side % (PATCH * 2 ** (len(recipe.architecture.channels) - 1)) == 0
        return
    if isinstance(recipe, StableDiffusionRecipe):
        assert recipe.resolution % recipe.architecture.side_step == 0
        return
    assert recipe.pairs.resolution % recipe.architecture.latent_factor == 0
    with torch.device("meta"):
        if isinstance(recipe, ImprintRecipe):
            Imprint(recipe.architecture)
        else:
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
        ("[pairs]\nresolutoin = 3\n", r"\[pairs\] has no 'resolutoin'; did you mean 'resolution'\?"),
        ("[diffusion]\nbatch = 3\n", r"\[diffusion\].*steps"),
        ("[pairs\n", "cannot read the recipe"),
        (
            '[architecture]\nprediction = "V"\n',
            r'prediction of \[architecture\] is "V", expected "eps.* or "v"',
        ),
        ("[data]\nobjects = -1\n", r"\[data\]: objects is -1; expected at least 1"),
        ("[data]\nsingle = 2\n", r"\[data\]: single is 2; expected 0 to 1"),
        ("[identity]\nsteps = 0\n", r"\[identity\]: steps is 0; expected at least 1"),
        ("[identity]\nsteps = 9\nsave_every = 0\n", "save_every is 0; expected at least 1"),
        ("[identity]\nsteps = 9\nlearning_rate = nan\n", "a learning rate is nan; expected at least 0"),
        ("[identity]\nsteps = 9\nwarmup = -3\n", "warmup is -3; expected at least 0"),
        ("[identity]\nsteps = 9\nclip = 0\n", "clip is 0; expected more than 0"),
        ("[identity]\nsteps = 9\nema = 1\n", "ema is 1; expected a decay from 0 to below 1"),
        ("[decoder]\nsteps = 9\nside = 1000\n", "side is 1000; expected 1 to the 160 pixels"),
        ("[autoencoder]\nsteps = 9\nside = 50\n", r"\[autoencoder\]: side is 50; expected a multiple of 8"),
        ("[pairs]\nresolution = 96\n", r"\[pairs\]: resolution is 96; expected a multiple of 64"),
        ("[pairs]\nresolution = 0\n", r"\[pairs\]: resolution is 0; expected at least 1"),
        (
            "[pairs]\ncrop_ratios = [3, 1]\n",
            r"crop_ratios is \[3, 1\]; expected two numbers from 1, the lower",
        ),
        ("[pairs]\nbox_masks = nan\n", "box_masks is nan; expected 0 to 1"),
        (
            "[denoising]\nattention_guide = 0.1\nguided_heads = 4\n[architecture]\nunet_head_width = 160\n",
            r"guided_heads is 4, and a level of \[architecture\] has 2",
        ),
        ("[denoising]\ndrop = -1\n", r"\[denoising\]: drop is -1; expected 0 to 1"),
        ("[architecture]\ndino_heads = 0\n", r"\[architecture\]: dino_heads is 0; expected at least 1"),
        ("[architecture]\nunet_norm_groups = 7\n", "unet_channels must be multiples of unet_norm_groups, 7"),
        ("[defaults]\nsteps = 0\n", r"\[defaults\]: steps must be a whole number from 1 to 999, not 0"),
        ("[defaults]\nstep = 9\n", r"\[defaults\]: there is no parameter 'step'"),
        ("[data]\nrepeats = 0\n", r"\[data\]: repeats is 0; expected at least 1"),
        ('[data]\nkind = "vidoe"\n', r'kind of \[data\] is "vidoe", expected "video" or'),
        ('[pairs]\ntimesteps = "papre"\n', r'timesteps of \[pairs\] is "papre", expected "uniform" or'),
        ('[hint_block]\nsteps = 1\nprecision = "bf-16"\n', r'is "bf-16", expected "no" or "auto" or "bf16"'),
        ("[hint_block]\nsteps = 1.5\n", r"steps of \[hint_block\] is 1.5, expected a whole number"),
        ("[hint_block]\nsteps = true\n", "is true, expected a whole number"),
        ("[denoising]\ncontrol = 1\n", "is 1, expected true or false"),
        ('[pairs]\nflip = "0.5"\n', 'is "0.5", expected a number'),
        ("[pairs]\ncrop_ratios = [1.0]\n", r"is \[1.0\], expected a list, 2 times a number"),
        ('[architecture]\nunet_channels = [8, "9"]\n', 'is .8, "9".*, expected a list, a whole number'),
        ("[architecture]\nunet_channels = 8\n", "is 8, expected a list"),
        ("[data]\nkind = 1979-05-27\n", 'is "1979-05-27", expected "video"'),
        ("hint_block = 3\n", r"hint_block is 3, expected a section \[hint_block\]"),
        ("[[hint_block]]\nsteps = 1\n", r"expected a section \[hint_block\]"),
        ("start = 3\n", "start of the recipe is 3, expected a text"),
        ("strat = 'x'\n", "the recipe has no 'strat'"),
        ('checkpoint_dtype = "fp16"\n', 'expected "float32" or "bfloat16" or "float16"'),
        ("[sources]\nname = 3\n", r"sources are written \[\[sources\]\]"),
        ("[[sources]]\nname = 3\nroot = 'x'\n", r"name of \[sources\] is 3, expected a text"),
        ('[[sources]]\nname = "Video"\nroot = "x"\n', "no data set is called 'Video'"),
        ("defaults = 2\n", r"defaults is 2, expected a section \[defaults\]"),
        ('[defaults]\ncrop_ratio = ["a"]\n', r'crop_ratio of \[defaults\] is \["a"\], expected'),
        ('[defaults]\nmode = "nope"\n', r"\[defaults\]: there is no mode 'nope'"),
        ('[defaults]\nedge = "x"\n', r"\[defaults\]: there is no edge 'x'"),
        ('[defaults]\nmask_level = "x"\n', r"\[defaults\]: there is no mask level 'x'"),
        ("[defaults]\nstrength = 7\n", "strength must be a number from 0 to 1, not 7"),
        ("[defaults]\nstrength = 0\n", "strength must be above 0"),
        ("[defaults]\nrefine = 5000\n", "refine must be a whole number from 0 to 999, not 5000"),
        ('[[sources]]\nname = "DUT"\nroot = "x"\nweight = 0\n', "has a weight above 0"),
        ('[[sources]]\nname = "DUT"\nroot = "x"\nweight = -1\n', "weight is -1; expected at least 0"),
        ('[[sources]]\nname = "DUT"\nroot = "x"\nweight = nan\n', "weight is nan; expected at least 0"),
        ("[pairs]\nbox_ratio = 0.5\n", "box_ratio is 0.5; expected at least 1"),
        ("[architecture]\nunet_head_width = 0\n", r"\[architecture\]: unet_head_width is 0; expected at"),
        ("[architecture]\nunet_channels = []\n", "must name the width of at least one level"),
        ("[architecture]\nunet_attention = [true]\n", "unet_channels names 4 levels and unet_attention 1"),
        (
            '[denoising]\nattention_guide = 0.1\n[[sources]]\nname = "DUT"\nroot = "x"\n',
            "is for rendered pairs",
        ),
    ],
)
def test_a_slip_in_a_recipe_is_told(text: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "slip.toml"
    path.write_text(text)
    with pytest.raises(InputError, match=says):
        read_recipe(path)


@pytest.mark.parametrize(
    ("system", "change", "says"),
    [
        (
            "segmenter-small",
            "architecture.side=127",
            r"\[architecture\]: side is 127; expected a mul",
        ),
        ("segmenter-small", "architecture.channels=[10, 20]", "channels must be multiples of norm_groups, 8"),
        ("segmenter-small", "architecture.norm_groups=7", "channels must be multiples of norm_groups, 7"),
        ("segmenter-small", "architecture.norm_groups=0", "norm_groups is 0; expected at least 1"),
        ("segmenter-small", "architecture.channels=[]", "channels must name the width of at least one level"),
        ("segmenter-small", "pictures.plain=2", r"\[pictures\]: plain is 2; expected 0 to 1"),
        ("imprint-small", "architecture.adapter_heads=0", "adapter_heads is 0; expected at least 1"),
        (
            "imprint-small",
            "augmentation.corners=[0.5, 0.1]",
            r"corners is \[0.5, 0.1\]; expected two",
        ),
        ("imprint-small", "augmentation.rotation=nan", "rotation is nan; expected at least 0"),
        ("imprint-small", "augmentation.perspective=5", "perspective is 5; expected 0 to 1"),
        ("imprint-small", "compositing.drop=2", r"\[compositing\]: drop is 2; expected 0 to 1"),
        ("imprint-small", "compositing.drop=nan", "drop is nan; expected 0 to 1"),
        ("imprint-small", "compositing.empty=-3", "empty is -3; expected 0 to 1"),
        ("imprint-small", "compositing.attention_guide=-1", "attention_guide is -1; expected at least 0"),
        ("imprint-small", "compositing.guided_heads=2", "guided_heads is 2; expected 1 or 4"),
        (
            "imprint-small",
            "architecture.unet_head_width=64",
            r"\[views\] guided_heads is 4, and a level of \[architecture\] has 2",
        ),
        ("imprint-small", "views.window=-1", r"\[views\]: window is -1; expected at least 0"),
        ("stable-diffusion-small", "architecture.text_heads=0", "text_heads is 0; expected at least 1"),
        (
            "stable-diffusion-small",
            "architecture.unet_head_width=0",
            "unet_head_width is 0; expected",
        ),
        ("stable-diffusion-small", "resolution=0", "resolution is 0; expected at least 1"),
        ("stable-diffusion-small", "resolution=-64", "resolution is -64; expected at least 1"),
        ("stable-diffusion-small", "resolution=60", "resolution is 60; expected a multiple of"),
        ("dreambooth", "subject.resolution=-512", r"\[subject\]: resolution is -512; expected at least 1"),
        ("dreambooth", "subject.previews=-1", r"\[subject\]: previews is -1; expected at least 0"),
    ],
)
def test_a_value_that_no_training_can_have_is_told(system: str, change: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        read_recipe(next(path for path in RECIPES if path.stem == system), [change])


def test_whole_numbers_are_numbers_and_lists_may_be_of_any_length(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(
        "[pairs]\nflip = 0\ncrop_ratios = [1, 2]\n"
        "[architecture]\nunet_channels = [32, 64, 96]\nunet_attention = [true, true, false]\n"
    )
    recipe = read_recipe(path)
    assert (recipe.pairs.flip, recipe.pairs.crop_ratios) == (0.0, (1.0, 2.0))
    assert recipe.architecture.unet_channels == (32, 64, 96)


def test_changes_take_the_place_of_what_a_recipe_says() -> None:
    path = next(path for path in RECIPES if path.stem == "imprint-small")
    asked = ["compositing.swap=1", "compositing.rates={unet=1e-3}", "data.pairs=12", "views=false"]
    plain, changed = read_recipe(path), read_recipe(path, asked)
    assert isinstance(plain, ImprintRecipe)
    assert isinstance(changed, ImprintRecipe)
    assert plain.views
    assert changed.views is None
    assert plain.compositing
    assert changed.compositing == replace(
        plain.compositing, swap=1.0, rates={**plain.compositing.rates, "unet": 1e-3}
    )
    assert changed.data == replace(plain.data, pairs=12)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("compositing.swap", "'compositing.swap' is not a change of the recipe: write SECTION.KEY=VALUE"),
        ("system=imprint", "strings in quotes"),
        ("compositing.swop=1", "did you mean 'swap'"),
        ("compositing=true", r"compositing is true, expected a section \[compositing\]"),
    ],
)
def test_a_slip_in_a_change_is_told(change: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        read_recipe(next(path for path in RECIPES if path.stem == "imprint-small"), [change])


def test_defaults_are_read_as_they_are_written(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(
        '[defaults]\nguidance_scale = 2\ncrop_ratio = 1.3\nmode = "crop"\nguidance_interval = [0, 500]\n'
    )
    expected = {"guidance_scale": 2, "crop_ratio": 1.3, "mode": "crop", "guidance_interval": (0, 500)}
    assert read_recipe(path).defaults == expected


def test_a_recipe_that_is_no_text_is_told(tmp_path: Path) -> None:
    path = tmp_path / "binary.toml"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="cannot read the recipe"):
        read_recipe(path)


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
