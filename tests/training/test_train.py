"""The command: all stages of a recipe that takes seconds, and what it refuses."""

from __future__ import annotations

import shutil
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.tiny import TINY
from training import inspect_data
from training.assemble import fresh_samples
from training.clock import TimeLimit
from training.config import read_recipe
from training.data.encoded import EncodedPairs
from training.data.pairs import PairRules
from training.network.checkpoint import read_checkpoint, write_model
from training.network.modules import AnyDoor
from training.network.official_keys import schedule_buffers
from training.preview import Preview
from training.preview import main as preview
from training.train import main, with_limit

DEFAULTS = {"steps": 2, "guidance_scale": 3, "crop_ratio": 1.3, "mode": "keep_background"}
STAGE: dict[str, Any] = {"steps": 2, "batch": 2, "save_every": 1, "ema": 0.5}


def toml(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(toml, value))}]"
    return {True: "true", False: "false"}[value] if isinstance(value, bool) else repr(value)


def write_recipe(path: Path, head: str = "", **sections: dict[str, Any]) -> Path:
    """The example model's way, with hardly any of anything; `sections` change it."""
    recipe: dict[str, dict[str, Any]] = {
        "architecture": {each.name: getattr(TINY, each.name) for each in fields(TINY)} | {"prediction": "v"},
        "data": {"objects": 3, "pairs": 5, "kind": "video", "single": 0.5},
        "pairs": {"resolution": 32},
        "denoising": {
            "hint_block": False,
            "unet_encoder": True,
            "attention_guide": 0.05,
            "place_keys": True,
            "drop": 0.1,
        },
        "defaults": DEFAULTS,
        **dict.fromkeys(("autoencoder", "decoder", "identity", "hint_block", "diffusion"), STAGE),
    }
    for name, values in sections.items():
        recipe[name] = recipe[name] | values
    lines = [head]
    for name, values in recipe.items():
        lines += [f"[{name}]", *(f"{key} = {toml(value)}" for key, value in values.items())]
    path.write_text("\n".join(lines))
    return path


def train(recipe: Path, folder: Path, *more: str) -> None:
    assert main([str(recipe), "--folder", str(folder), *more]) == 0


def step_of(folder: Path) -> int:
    return int(torch.load(folder / "last.pt", weights_only=True)["step"])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of all stages; do not write into it."""
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        draw_small_sheets(patch)
        train(write_recipe(folder / "tiny.toml", 'checkpoint_dtype = "float16"'), folder)
    return folder


def draw_small_sheets(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("training.stages.anydoor.Preview", lambda recipe, model: Preview(recipe, model, 1, 2))


@pytest.fixture
def copy(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it that may be changed. What is trained there draws small sheets."""
    draw_small_sheets(monkeypatch)
    return Path(shutil.copytree(run, tmp_path / "copy"))


def test_all_stages_make_a_checkpoint_that_can_be_built(run: Path) -> None:
    checkpoint = read_checkpoint(run / "model.safetensors")
    assert checkpoint.architecture.prediction == "v"
    assert checkpoint.dtype == torch.float16
    assert checkpoint.defaults == DEFAULTS
    assert checkpoint.resolution == 32
    written = load_file(run / "model.safetensors")
    for name, buffer in schedule_buffers().items():  # the original is strict about them
        assert torch.equal(written[name], buffer)
    trained = torch.load(run / "diffusion" / "mean.pt", weights_only=True)["projector.weight"]
    assert torch.equal(written["cond_stage_model.projector.weight"], trained.half())


@pytest.mark.parametrize("stage", ["autoencoder", "identity"])
def test_a_recipe_gives_the_same_network_every_time(run: Path, copy: Path, stage: str) -> None:
    """Also where a stage starts from fresh weights, whatever was drawn before."""
    shutil.rmtree(copy / stage)
    torch.manual_seed(12345)
    train(run / "tiny.toml", copy, "--stage", stage)
    found, expected = (torch.load(folder / stage / "mean.pt", weights_only=True) for folder in (copy, run))
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_a_run_that_is_given_again_goes_on(run: Path, copy: Path) -> None:
    """Two steps and two more are four, and the other stages are left as they are."""
    longer = write_recipe(copy / "longer.toml", diffusion={"steps": 4})
    train(longer, copy)
    assert step_of(copy / "diffusion") == 4
    for stage in ("autoencoder", "identity", "hint_block", "decoder"):
        assert (copy / stage / "last.pt").stat().st_mtime == (run / stage / "last.pt").stat().st_mtime
    resumed = torch.load(copy / "diffusion" / "last.pt", weights_only=True)["module"]
    shutil.rmtree(copy / "diffusion")
    train(longer, copy, "--stage", "diffusion")
    whole = torch.load(copy / "diffusion" / "last.pt", weights_only=True)["module"]
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())


def test_training_goes_on_at_a_higher_resolution_with_the_same_objects(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw_small_sheets(monkeypatch)
    start, objects = str(run / "model.safetensors"), str(run / "views")
    larger = write_recipe(
        tmp_path / "larger.toml",
        f"start = {start!r}",
        data={"objects_folder": objects},
        pairs={"resolution": 64},
    )
    stages = [f"--set={name}=false" for name in ("autoencoder", "decoder", "identity", "hint_block")]
    train(larger, tmp_path / "run", *stages)
    assert not (tmp_path / "run" / "views").exists()
    before, after = (read_checkpoint(path) for path in (start, tmp_path / "run" / "model.safetensors"))
    assert (before.resolution, after.resolution) == (32, 64)
    encoders = ("first_stage_model.", "cond_stage_model.model.")
    for name, weights in before.tensors.items():
        if name.startswith(encoders):
            assert torch.equal(after.tensors[name], weights), name
    learned = "model.diffusion_model.input_blocks.0.0.weight"
    assert not torch.equal(after.tensors[learned], before.tensors[learned])


@pytest.mark.parametrize("stored", [False, True], ids=["drawn", "of stored views"])
def test_pairs_are_made_while_it_trains(copy: Path, monkeypatch: pytest.MonkeyPatch, stored: bool) -> None:
    """Nothing is encoded ahead; a run that is stopped and resumed ends like one that is not."""
    monkeypatch.setattr("training.stages.anydoor.fresh_samples", partial(fresh_samples, chunk=2))
    for part in ("pairs", "hint_block", "diffusion"):
        shutil.rmtree(copy / part)
    data = {"pairs": 0, "repeats": 2, "stored_views": stored}
    train(write_recipe(copy / "short.toml", data=data), copy)
    longer = write_recipe(copy / "longer.toml", data=data, diffusion={"steps": 3})
    train(longer, copy)
    resumed = torch.load(copy / "diffusion" / "last.pt", weights_only=True)["module"]
    shutil.rmtree(copy / "diffusion")
    train(longer, copy, "--stage", "diffusion")
    whole = torch.load(copy / "diffusion" / "last.pt", weights_only=True)["module"]
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())
    assert not (copy / "pairs").exists()
    assert read_checkpoint(copy / "model.safetensors").system == "anydoor"


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object, command: Any = main) -> str:
    assert command([str(argument) for argument in arguments]) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith(f"{command.__module__.split('.')[1]}: ")
    return told


def test_what_cannot_be_used_is_told_in_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path / "tiny.toml")
    assert "cannot read the recipe" in refusal(capsys, tmp_path / "none.toml")
    assert "there is no checkpoint" in refusal(capsys, recipe, "--start", tmp_path / "none.safetensors")
    lost = write_recipe(tmp_path / "lost.toml", 'encoders = "lost.safetensors"')
    assert "there is no checkpoint at 'lost.safetensors'" in refusal(capsys, lost)
    stage = ["--folder", tmp_path, "--stage", "diffusion"]
    assert "there is no" in refusal(capsys, recipe, *stage)
    assert "there is no" in refusal(capsys, recipe, tmp_path / "a.png", "--folder", tmp_path, command=preview)
    missing = write_recipe(tmp_path / "missing.toml", denoising={"attention_guide": 0.0, "place_keys": False})
    missing.write_text(missing.read_text() + '\n[[sources]]\nname = "DUT"\nroot = "nowhere"\n')
    write_model(tmp_path / "start.safetensors", AnyDoor(read_architecture(recipe)))
    assert "nowhere" in refusal(capsys, missing, *stage, "--start", tmp_path / "start.safetensors")


def test_stages_share_the_time_that_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr("training.clock.time", SimpleNamespace(monotonic=lambda: clock.now))
    shares = {"identity": {"minutes": 1.0}, "diffusion": {"minutes": 3.0}, "decoder": {"minutes": 2}}
    recipe = read_recipe(write_recipe(tmp_path / "tiny.toml", **shares))
    stages, limit = ("autoencoder", "identity", "encode", "diffusion", "decoder"), TimeLimit(660, began=40)

    def seconds(stage: str, of: Any = recipe) -> float | None:
        given = getattr(with_limit(of, stages[stages.index(stage) :], limit), stage).limit
        return given.seconds if given else None

    assert seconds("autoencoder") is None
    assert seconds("identity") == 100  # a sixth of 600
    clock.now = 400  # it took longer
    assert with_limit(recipe, stages[2:], limit) is recipe
    assert seconds("diffusion") == 180
    assert seconds("diffusion", replace(recipe, start="model.safetensors")) == 300  # then no decoder learns
    clock.now = 1000
    assert seconds("decoder") == 0


def test_minutes_that_cannot_be_shared_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path / "tiny.toml", identity={"minutes": 1.0})
    command = [recipe, "--minutes", 5, "--stage", "autoencoder", "--stage", "encode"]
    assert "none of the stages has a share in the recipe" in refusal(capsys, *command)
    for minutes in ("0", "-1", "nan", "inf"):
        with pytest.raises(SystemExit, match="2"):
            main([str(recipe), f"--minutes={minutes}"])
        assert f"--minutes is {minutes}; expected more than 0" in capsys.readouterr().err
    negative = write_recipe(tmp_path / "negative.toml", identity={"minutes": -1.0})
    assert "minutes is -1; expected a share of --minutes, at least 0" in refusal(capsys, negative)
    given = write_recipe(tmp_path / "given.toml", identity={"limit": 3})
    assert "[identity] has no 'limit'" in refusal(capsys, given)


def test_threads_that_there_cannot_be_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for command in (main, inspect_data.main):
        for threads in ("0", "-1"):
            with pytest.raises(SystemExit, match="2"):
                command(["none.toml", f"--threads={threads}"])
            assert f"--threads is {threads}; expected at least 1" in capsys.readouterr().err


def test_a_stage_without_pairs_says_what_makes_them(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(copy / "pairs")
    shutil.rmtree(copy / "diffusion")
    told = refusal(capsys, copy / "tiny.toml", "--folder", copy, "--stage", "diffusion")
    assert "holds 0 encoded pairs, expected some to learn from: run the stage 'encode'" in told


def read_architecture(recipe: Path) -> Any:
    return read_recipe(recipe).architecture


@pytest.mark.parametrize("command", [main, preview])
def test_help_has_examples(command: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        command(["--help"])
    assert f"\n    python -m {command.__module__} " in capsys.readouterr().out


# --- encoded pairs ----------------------------------------------------------------------------------------


def test_pairs_of_other_weights_are_refused(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Until they are encoded again; and where it is not known which weights they are of, they are taken."""
    other = write_recipe(copy / "other.toml", identity={"steps": 3})
    train(other, copy, "--stage", "identity")
    for stage in ("encode", "hint_block", "diffusion"):
        told = refusal(capsys, other, "--folder", copy, "--stage", stage)
        assert f"other weights of the autoencoder or the ID encoder: delete '{copy}/pairs/done.txt'" in told
    (copy / "pairs" / "done.txt").unlink()
    train(other, copy, "--stage", "encode", "--stage", "diffusion")

    train(
        write_recipe(copy / "other.toml", hint_block={"steps": 3}, identity={"steps": 3}),
        copy,
        "--stage",
        "hint_block",
    )
    told = refusal(capsys, other, "--folder", copy, "--stage", "diffusion")
    assert f"other weights of the hint block: delete '{copy}/pairs/hints_done.txt'" in told
    (copy / "pairs" / "hints_done.sha256").unlink()
    train(other, copy, "--stage", "diffusion")
    assert (copy / "pairs" / "hints_done.sha256").exists()


def test_a_start_with_other_encoders_is_refused_too(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # half of the precision is another encoder
    start = ["--folder", copy, "--start", copy / "model.safetensors"]
    assert "other weights of the auto" in refusal(capsys, copy / "tiny.toml", *start)
    (copy / "pairs" / "done.txt").unlink()
    train(copy / "tiny.toml", *map(str, start[1:]))


def test_a_training_keeps_to_the_pairs_that_it_began_with(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also if more are encoded by the time that it goes on."""
    pairs, stage = copy / "pairs", copy / "diffusion"
    shutil.rmtree(stage)
    for name in ("done.txt", "hints_done.txt"):
        (pairs / name).write_text("3")
    train(copy / "tiny.toml", copy, "--stage", "diffusion")
    assert "learns from 3 of 5 pairs, those that were encoded when it began" in capsys.readouterr().err
    few = torch.load(stage / "last.pt", weights_only=True)["module"]

    (stage / "last.pt").unlink()
    train(copy / "tiny.toml", copy, "--stage", "encode", "--stage", "diffusion")
    assert (pairs / "hints_done.txt").read_text() == "5"
    again = torch.load(stage / "last.pt", weights_only=True)["module"]
    assert all(torch.equal(few[name], value) for name, value in again.items())
    (pairs / "done.txt").write_text("2")
    (pairs / "hints_done.txt").write_text("2")
    told = refusal(capsys, copy / "tiny.toml", "--folder", copy, "--stage", "diffusion")
    assert "holds 2 encoded pairs, expected 3" in told


def test_an_item_follows_from_its_number_and_the_rows(run: Path) -> None:
    few, all_rows = (EncodedPairs(run / "pairs", 0, PairRules(resolution=32), rows=rows) for rows in (1, 0))
    latents = [few[number]["features"] for number in range(8)]
    assert all(np.array_equal(latents[0], each) for each in latents)
    assert any(not np.array_equal(latents[0], all_rows[number]["features"]) for number in range(8))


# --- states and checkpoints -------------------------------------------------------------------------------


def test_a_state_with_a_scalar_sharpness_is_gone_on_from(run: Path, copy: Path) -> None:
    """As earlier versions saved it: in the module, in the optimizer's moments, in the mean."""
    path = copy / "identity" / "last.pt"
    state = torch.load(path, weights_only=True)
    expected = state["module"]["sharpness"].clone()
    trained = list(state["mean"])
    moments = state["optimizer"]["state"][trained.index("sharpness")]
    for values, name in (
        (state["module"], "sharpness"),
        (state["mean"], "sharpness"),
        (moments, "exp_avg"),
        (moments, "exp_avg_sq"),
    ):
        assert values[name].shape == (1,)
        values[name] = values[name][0]
    torch.save(state, path)
    train(write_recipe(copy / "longer.toml", identity={"steps": 3}), copy, "--stage", "identity")
    assert torch.load(path, weights_only=True)["module"]["sharpness"] != expected


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"prediction": "epsilon"}, "prediction = 'v', the recipe's has 'epsilon'"),
        ({"dino_heads": 2}, "dino_heads = 1, the recipe's has 2"),
        ({"latent_channels": 8}, "latent_channels = 4, the recipe's has 8"),
    ],
)
def test_a_start_of_another_architecture_is_refused(
    change: dict[str, Any], says: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path / "other.toml", architecture=change)
    assert says in refusal(capsys, recipe, "--folder", tmp_path, "--start", run / "model.safetensors")


def test_a_start_that_is_no_checkpoint_is_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = run / "tiny.toml"
    tensors = load_file(run / "model.safetensors")
    del tensors["control_model.zero_convs.0.0.bias"]
    save_file(tensors, tmp_path / "less.safetensors")
    assert "1 of" in refusal(capsys, recipe, "--start", tmp_path / "less.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "else.safetensors")
    assert "is not an AnyDoor checkpoint" in refusal(capsys, recipe, "--start", tmp_path / "else.safetensors")
    (tmp_path / "damaged.safetensors").write_bytes(b"1234567890")
    assert "damaged" in refusal(capsys, recipe, "--start", tmp_path / "damaged.safetensors")


def test_a_start_may_be_a_file_of_torch_save(copy: Path) -> None:
    """It is the same start as the .safetensors file with the same tensors."""
    torch.save({"state_dict": load_file(copy / "model.safetensors"), "epoch": 3}, copy / "model.ckpt")
    for name in ("model.safetensors", "model.ckpt"):
        for done in ("done.txt", "hints_done.txt"):
            (copy / "pairs" / done).unlink()
        shutil.rmtree(copy / "diffusion")
        stages = ["--stage", "encode", "--stage", "diffusion"]
        train(copy / "tiny.toml", copy, *stages, "--start", str(copy / name))
        (copy / "diffusion" / "last.pt").rename(copy / f"{name}.pt")
    states = [torch.load(copy / f"model.{kind}.pt", weights_only=True) for kind in ("safetensors", "ckpt")]
    assert all(torch.equal(states[0]["module"][name], value) for name, value in states[1]["module"].items())
