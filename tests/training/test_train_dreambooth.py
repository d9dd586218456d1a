"""A whole run of DreamBooth, from a recipe to a checkpoint that is built and draws."""

from __future__ import annotations

from pathlib import Path

import pytest
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

from tests.support.stable_diffusion import pipeline
from tests.training.systems.test_dreambooth import save_pictures
from training.inspect_data import main as inspect
from training.network.lora import merge_lora
from training.network.stable_diffusion_checkpoint import read_stable_diffusion
from training.train import main

Capture = pytest.CaptureFixture[str]


def recipe(place: Path, inpaint: bool = False, layout: str = "original", **changes: object) -> Path:
    """A recipe for a small start and three pictures."""
    pipeline("1.x", inpaint).save_pretrained(place / "start")
    save_pictures(place / "pictures", (40, 40, 40))
    settings: dict[str, object] = {
        "pictures": f'"{place / "pictures"}"',
        "class": '"cat"',
        "identifier": '"mat"',
        "class_images": 2,
        "resolution": 32,
        "steps": 2,
        "save_every": 1,
        "draw_every": 2,
        "previews": 0,
        "learning_rate": 1e-3,
        **changes,
    }
    lines = [f'system = "dreambooth"\nstart = "{place / "start"}"\nlayout = "{layout}"\n[subject]']
    lines += [f"{name} = {value}" for name, value in settings.items() if value is not None]
    path = place / "cat.toml"
    path.write_text("\n".join(lines), "utf-8")
    return path


def test_a_subject_from_three_pictures(tmp_path: Path, capsys: Capture) -> None:
    assert main([str(recipe(tmp_path)), "--folder", str(tmp_path / "run")]) == 0
    told, warned = capsys.readouterr()
    assert "dreambooth, in" in told
    assert "'a mat cat' from the pictures in" in told
    assert "beside 2 pictures of 'a cat'; all layers of UNet and text encoder learn" in told
    assert "train: warning: the identifier 'mat'" in warned
    run = tmp_path / "run"
    assert sorted(path.name for path in (run / "prior").glob("*.png")) == ["00000.png", "00001.png"]
    start, tuned = read_stable_diffusion(tmp_path / "start"), read_stable_diffusion(run / "model.safetensors")
    changed = {
        part
        for part, tensors in start.parts.items()
        if any(not tensor.equal(tuned.parts[part][name]) for name, tensor in tensors.items())
    }
    assert changed == {"unet", "text_encoder"}
    last = load_file(run / "step-00002" / "model.safetensors")
    assert all(tensor.equal(last[key]) for key, tensor in load_file(run / "model.safetensors").items())
    assert (run / "step-00001" / "model.safetensors").is_file()
    sheet = tmp_path / "sheet.png"
    assert inspect([str(tmp_path / "cat.toml"), str(sheet), "--folder", str(run)]) == 0
    assert Image.open(sheet).size == (2 * 32, 2 * 32)  # the subject above its class


@pytest.mark.parametrize("inpaint", [False, True])
def test_a_subject_in_the_layout_of_diffusers(tmp_path: Path, inpaint: bool) -> None:
    settings = {"prior_weight": 0.0, "steps": 1}
    for layout in ("original", "diffusers"):
        path = recipe(tmp_path / layout, inpaint, layout, **settings)
        assert main([str(path), "--folder", str(tmp_path / layout / "run")]) == 0
    file, folder = tmp_path / "original/run/model.safetensors", tmp_path / "diffusers/run/model"
    assert (folder.with_name("step-00001") / "model").is_dir()
    assert not (folder.with_name("model.safetensors")).exists()
    one, other = read_stable_diffusion(file), read_stable_diffusion(folder)
    assert one.architecture == other.architecture
    for part, tensors in one.parts.items():
        assert all(tensor.equal(other.parts[part][name]) for name, tensor in tensors.items())
    opened = DiffusionPipeline.from_pretrained(folder)
    start = DiffusionPipeline.from_pretrained(tmp_path / "diffusers/start")
    assert type(opened) is type(start)
    assert opened.tokenizer("a mat cat").input_ids == start.tokenizer("a mat cat").input_ids
    assert opened.unet.config.sample_size == 32 // one.architecture.latent_factor


def test_a_subject_as_low_rank_updates(tmp_path: Path) -> None:
    path = recipe(tmp_path, rank=2, prior_weight=0.0, previews=1)
    assert main([str(path), "--folder", str(tmp_path / "run")]) == 0
    assert list((tmp_path / "run" / "subject" / "events").iterdir())
    assert not (tmp_path / "run" / "prior").exists()
    start = read_stable_diffusion(tmp_path / "start")
    merged = merge_lora(start, tmp_path / "run" / "pytorch_lora_weights.safetensors")
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight"
    assert not merged.parts["unet"][name].equal(start.parts["unet"][name])


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"class": None}, "[subject] lacks 'class', which has no default"),
        ({"class": '" "'}, "[subject]: class is empty"),
        ({"identifier": None}, "[subject] lacks 'identifier'"),
        ({"class_noun": '"cat"'}, "[subject] has no 'class_noun'"),
        ({"rank": -1}, "[subject]: rank is -1; expected at least 0"),
        ({"prior_weight": "nan"}, "[subject]: prior_weight is nan; expected at least 0"),
        ({"previews": -1}, "[subject]: previews is -1; expected at least 0"),
        ({"resolution": 0}, "[subject]: resolution is 0; expected at least 1"),
        ({"resolution": 31}, "[subject]: resolution is 31; expected a multiple of 4 for"),
        ({"pictures": '"none"'}, "there is no folder 'none' with pictures of the subject"),
    ],
)
def test_what_cannot_be_learned_is_refused_in_a_sentence(
    tmp_path: Path, capsys: Capture, changes: dict[str, object], sentence: str
) -> None:
    assert main([str(recipe(tmp_path, **changes)), "--folder", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("train: ")
    assert sentence in error
    assert not (tmp_path / "run").exists()


def test_a_layout_of_low_rank_updates_is_refused(tmp_path: Path, capsys: Capture) -> None:
    assert main([str(recipe(tmp_path, layout="diffusers", rank=2)), "--folder", str(tmp_path / "run")]) == 2
    assert "layout has no effect with a rank: low-rank updates are a single file" in capsys.readouterr().err
