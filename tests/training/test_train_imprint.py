"""The command with a recipe of IMPRINT that takes seconds: all stages, what it says, what it refuses."""

from __future__ import annotations

import shutil
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.support.imprint import TINY_IMPRINT
from tests.training.test_train import STAGE, refusal, step_of, toml, train
from training.config import ImprintRecipe, read_recipe
from training.data.encoded import rows_done
from training.inspect_data import main as inspect
from training.network.checkpoint import read_checkpoint
from training.preview import main as preview
from training.preview_imprint import ImprintPreview
from training.small.stored import StoredSamples
from training.train import describe

SIZES = replace(TINY_IMPRINT, prediction="v")
TRAINED = ("autoencoder", "identity", "views", "compositing", "decoder")


def write_recipe(path: Path, head: str = "", **sections: dict[str, Any]) -> Path:
    """The example model's way, with hardly any of anything; `sections` change it."""
    sizes = {each.name: getattr(SIZES, each.name) for each in fields(SIZES)}
    recipe: dict[str, dict[str, Any]] = {
        "architecture": {name: value for name, value in sizes.items() if value is not None},
        "data": {"objects": 2, "pairs": 3, "single": 0.5},
        "pairs": {"resolution": 32},
        "defaults": {"guidance_scale": 2, "crop_ratio": 1.3},
        **dict.fromkeys(TRAINED, STAGE),
    }
    recipe["views"] = STAGE | {"attention_guide": 0.05}
    recipe["compositing"] = STAGE | {"attention_guide": 0.05, "drop": 0.3, "keep_unet": True}
    for name, values in sections.items():
        recipe[name] = recipe.get(name, {}) | values
    lines = ['system = "imprint"', head]
    for name, values in recipe.items():
        lines += [f"[{name}]", *(f"{key} = {toml(value)}" for key, value in values.items())]
    path.write_text("\n".join(lines))
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of all stages; do not write into it."""
    folder = tmp_path_factory.mktemp("run")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        draw_small_sheets(patch)
        train(write_recipe(folder / "tiny.toml", 'checkpoint_dtype = "float16"'), folder)
    torch.set_num_threads(threads)
    return folder


def draw_small_sheets(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("training.stages.imprint.ImprintPreview", lambda *given: ImprintPreview(*given, 1, 2))


@pytest.fixture
def copy(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it that may be changed. What is trained there draws small sheets."""
    draw_small_sheets(monkeypatch)
    return Path(shutil.copytree(run, tmp_path / "copy"))


def test_all_stages_make_a_checkpoint(run: Path) -> None:
    checkpoint = read_checkpoint(run / "model.safetensors")
    assert checkpoint.architecture == SIZES
    assert checkpoint.dtype == torch.float16
    assert checkpoint.defaults == {"guidance_scale": 2, "crop_ratio": 1.3}
    written = load_file(run / "model.safetensors")
    views, compositing = (
        torch.load(run / s / "mean.pt", weights_only=True) for s in ("views", "compositing")
    )
    # the encoder is that of stage 1, adapter and UNet those of stage 2
    key = "cond_stage_model.model.norm.weight"
    assert torch.equal(written[key], views["backbone.layernorm.weight"].half())
    assert torch.equal(written["cond_stage_model.projector.weight"], compositing["adapter.weight"].half())
    assert torch.equal(
        written["model.diffusion_model.out.2.weight"], compositing["unet.conv_out.weight"].half()
    )
    assert not any(name.startswith("backbone.") for name in compositing)


def test_a_run_that_is_given_again_goes_on(run: Path, copy: Path) -> None:
    longer = write_recipe(copy / "longer.toml", compositing={"steps": 4})
    train(longer, copy, "--stage", "compositing")
    assert step_of(copy / "compositing") == 4
    assert step_of(run / "compositing") == 2


def test_samples_of_another_encoder_are_refused(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Those of stage 2 were encoded by what stage 1 made."""
    other = write_recipe(copy / "other.toml", views={"steps": 3})
    train(other, copy, "--stage", "views")
    told = refusal(capsys, other, "--folder", copy, "--stage", "compositing")
    assert f"other weights of the autoencoder or the ID encoder: delete '{copy}/samples/done.txt'" in told


def test_without_encoded_samples_stage_2_makes_its_own(copy: Path) -> None:
    """As with data sets: nothing is encoded beforehand; here the backbone learns, too, as in an ablation."""
    shutil.rmtree(copy / "compositing")
    shutil.rmtree(copy / "samples")
    recipe = write_recipe(copy / "fresh.toml", data={"pairs": 0})
    text = recipe.read_text().replace(
        "[compositing]", "[compositing]\nbackbone = true\nrates = {}\nswap = 1.0"
    )
    recipe.write_text(text)
    train(recipe, copy, "--stage", "encode", "--stage", "compositing", "--stage", "checkpoint")
    assert not (copy / "samples").exists()
    written = load_file(copy / "model.safetensors")
    trained = torch.load(copy / "compositing" / "mean.pt", weights_only=True)
    key = "cond_stage_model.model.norm.weight"
    assert torch.equal(written[key], trained["backbone.layernorm.weight"])


def test_a_stored_sample_follows_from_its_number(run: Path) -> None:
    assert rows_done(run / "samples") == 3
    one, again = (StoredSamples(run / "samples", 0, 3) for _ in range(2))
    first = one[5]
    for name, value in first.items():
        np.testing.assert_array_equal(value, again[5][name])
    assert first["scene"].shape == (5, 4, 4)
    assert set(np.unique(first["scene"][0])) <= {0, 1}
    assert first["moments"].shape == (2, 4, 4, 4)
    assert first["features"].shape == (257, 64)


# --- what it says -----------------------------------------------------------------------------------------


def test_it_says_what_it_will_do(tmp_path: Path) -> None:
    recipe = read_recipe(Path(__file__).parents[2] / "training/recipes/imprint.toml")
    assert isinstance(recipe, ImprintRecipe)
    told = describe(recipe, ["views", "compositing"], tmp_path).splitlines()
    assert told[0] == f"imprint, in {tmp_path}: views, compositing"
    assert told[1] == (
        "views: 20000 steps of 4 x 8 samples per process, "
        "learning rate 4e-06 for backbone, 4e-05 for adapter, 4e-05 for unet"
    )
    assert told[2].endswith("learning rate 4e-05 for adapter, 4e-06 for unet, exchanged after step 20000")
    assert "MVImgNet (data/MVImgNet)" in told[3]


def test_samples_and_previews_are_drawn(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(run / "tiny.toml"), str(tmp_path / "a.png"), "--folder", str(run)]
    assert inspect([*arguments, "--count", "4", "--seconds", "0.01"]) == 0
    with Image.open(tmp_path / "a.png") as sheet:
        assert sheet.size == (4 * 32, 4 * 32)
    told = capsys.readouterr().out
    assert "views: the loop, encoding included, takes" in told
    assert "compositing: the loop" in told
    assert preview([*arguments, "--count", "1", "--steps", "2"]) == 0
    with Image.open(tmp_path / "a.png") as sheet:
        assert sheet.size == (32, 5 * 32)


@pytest.mark.parametrize(
    ("head", "says"),
    [
        ('system = "imprnt"', "system is 'imprnt', expected anydoor or imprint"),
        ("system = 3", "system is 3, expected anydoor"),
        ('system = "imprint"\n[diffusion]\nsteps = 1', "unknown section [diffusion]"),
        ('system = "imprint"\n[compositing]\nsteps = 1\nhole = 1', "[compositing] has no 'hole'"),
        ('system = "imprint"\n[views]\nsteps = 1\nrates = 3', "rates is 3, expected a section [rates]"),
        (
            'system = "imprint"\n[architecture]\nscene_channels = 0',
            "[architecture]: its UNet must see the scene",
        ),
        (
            'system = "imprint"\n[views]\nsteps = 1\n[[sources]]\nname = "DUT"\nroot = "a"',
            "no data set of [[sources]] with a weight above 0 is for the stage views",
        ),
    ],
)
def test_a_slip_in_a_recipe_is_told(
    head: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.toml"
    path.write_text(head)
    assert says in refusal(capsys, path)


def test_a_stage_of_another_system_is_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = refusal(capsys, run / "tiny.toml", "--folder", run, "--stage", "diffusion")
    assert "imprint has no stage 'diffusion'; it has: objects, autoencoder" in told
