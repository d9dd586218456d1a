"""A small text-conditioned model, from a recipe to a folder in diffusers' layout that draws."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from training.assemble import network_in
from training.config import StableDiffusionRecipe, read_recipe
from training.inspect_data import main as inspect
from training.network.stable_diffusion import StableDiffusion
from training.network.stable_diffusion_checkpoint import read_stable_diffusion
from training.small.stored import StoredSamples
from training.stages.stable_diffusion import start_network
from training.systems.stable_diffusion import PromptTask, draw_pictures
from training.train import main

RECIPE = Path("training/recipes/stable-diffusion-small.toml")
INPAINTING = Path("training/recipes/stable-diffusion-inpainting-small.toml")


def short(folder: Path, recipe: Path = RECIPE, **changes: str) -> Path:
    """A recipe of a small model, a few steps long."""
    text = recipe.read_text("utf-8")
    settings = {"objects": "2", "pairs": "6", "steps": "2", "batch": "2", "save_every": "1"}
    settings |= {"warmup": "1", "ema": "0.1", **changes}
    lines = []
    for line in text.splitlines():
        name = line.partition(" = ")[0]
        lines.append(f"{name} = {settings[name]}" if name in settings else line)
    start = text.index("previews = ["), text.index("]", text.index("previews = [")) + 1
    path = folder / "small.toml"
    path.write_text("\n".join(lines).replace(text[slice(*start)], "previews = []"), "utf-8")
    return path


def test_a_run_writes_a_model_that_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(short(tmp_path)), "--folder", str(tmp_path / "run")]) == 0
    assert "stable_diffusion, in" in capsys.readouterr().out
    checkpoint = read_stable_diffusion(tmp_path / "run" / "model")
    assert checkpoint.architecture.prediction == "v"
    parts = {part: checkpoint.load_part(part, torch.float32) for part in ("unet", "vae", "text_encoder")}
    network = StableDiffusion(checkpoint.architecture, parts)
    assert checkpoint.tokenizer is not None
    [drawn] = draw_pictures(network, checkpoint.tokenizer.open(), "a red mug", [0], 32, steps=2)
    assert drawn.shape == (32, 32, 3)

    recipe = read_recipe(short(tmp_path))
    assert isinstance(recipe, StableDiffusionRecipe)
    fresh, _ = start_network(recipe)
    for name, weight in fresh.vae.state_dict().items():
        torch.testing.assert_close(parts["vae"].state_dict()[name], weight, rtol=1e-3, atol=1e-3)
    learned = parts["unet"].state_dict()["conv_in.weight"]
    assert not torch.allclose(learned, fresh.unet.state_dict()["conv_in.weight"], atol=1e-4)


def test_several_pictures_at_once_are_those_one_by_one(tmp_path: Path) -> None:
    recipe = read_recipe(short(tmp_path))
    assert isinstance(recipe, StableDiffusionRecipe)
    network, files = start_network(recipe)
    how = (files.open(), "a red mug", range(3), 32, 2, 3.0)
    one, several = (list(draw_pictures(network, *how, batch)) for batch in (1, 2))
    for picture, other in zip(one, several, strict=True):
        assert np.abs(picture.astype(int) - other).max() <= 1


def test_the_loss_is_the_error_of_v(tmp_path: Path) -> None:
    path, run = short(tmp_path), tmp_path / "run"
    assert main([str(path), "--folder", str(run), "--stage", "encode"]) == 0
    recipe = read_recipe(path)
    assert isinstance(recipe, StableDiffusionRecipe)
    network, _ = start_network(recipe)
    samples = StoredSamples(run / "samples", seed=0, rows=6)
    assert samples[0]["ids"].dtype == torch.int64
    task = PromptTask(network, samples)
    batch = {name: torch.as_tensor(value)[None] for name, value in samples[0].items()}
    with torch.no_grad():
        loss = task.loss(task.module, batch)["loss"]
        latents = batch["moments"][:, 0] + batch["moments"][:, 1] * batch["posterior_noise"]
        signal, noise = network.signal_rate[batch["timestep"]], network.noise_rate[batch["timestep"]]
        noisy = signal * latents + noise * batch["noise"]
        velocity = signal * batch["noise"] - noise * latents
        tokens = network.encode_prompt(batch["ids"])
        output = network.unet(noisy, batch["timestep"], tokens).sample
    assert float(loss) == pytest.approx(float((output - velocity).square().mean()), rel=1e-4)


def test_pictures_are_shown_with_their_captions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sheet = tmp_path / "sheet.png"
    assert inspect([str(short(tmp_path)), str(sheet), "--count", "4"]) == 0
    assert Image.open(sheet).size == (4 * 64, 64)
    captions = capsys.readouterr().out.splitlines()[:4]
    assert all(caption.startswith("a ") or caption == "(no caption)" for caption in captions)


def test_the_unet_of_another_model_is_a_start(tmp_path: Path) -> None:
    """That of IMPRINT's example, without the channels that see the scene."""
    recipe = read_recipe(short(tmp_path))
    assert isinstance(recipe, StableDiffusionRecipe)
    network, _ = start_network(recipe)
    source = network_in(recipe.unet).unet.state_dict()
    own = network.unet.state_dict()
    assert len(own) == len(source)
    torch.testing.assert_close(own.pop("conv_in.weight"), source.pop("conv_in.weight")[:, :12])
    for name, weight in own.items():
        torch.testing.assert_close(weight, source[name])


def test_a_unet_of_other_sizes_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = short(tmp_path, token_width="64", text_width="64")
    assert main([str(path), "--folder", str(tmp_path / "run"), "--stage", "encode"]) == 2
    assert "has other sizes than the recipe's: change [architecture]" in capsys.readouterr().err


def test_another_autoencoder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = short(tmp_path, vae_channels="[16, 32, 64, 64]")
    assert main([str(path), "--folder", str(tmp_path / "run")]) == 2
    assert "has another autoencoder than the recipe" in capsys.readouterr().err


def test_a_model_that_inpaints_starts_from_one_that_reads_words(tmp_path: Path) -> None:
    """Its new channels change nothing: whatever the scene is, it predicts what its start predicts."""
    recipe = read_recipe(INPAINTING)
    assert isinstance(recipe, StableDiffusionRecipe)
    network, files = start_network(recipe)
    start = read_stable_diffusion(recipe.start)
    assert files == start.tokenizer
    before = StableDiffusion(
        start.architecture,
        {part: start.load_part(part, torch.float32) for part in ("unet", "vae", "text_encoder")},
    )
    ids = torch.tensor([files.open().encode("a red mug on white")])
    latent, scene, timestep = torch.randn(1, 12, 8, 8), torch.randn(1, 13, 8, 8), torch.tensor([500])
    with torch.no_grad():
        found = network.predict_noise(latent, timestep, network.encode_prompt(ids), scene)
        expected = before.predict_noise(latent, timestep, before.encode_prompt(ids))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_the_scene_is_stored_and_seen_by_the_loss(tmp_path: Path) -> None:
    path, run = short(tmp_path, INPAINTING), tmp_path / "run"
    assert main([str(path), "--folder", str(run)]) == 0
    samples = StoredSamples(run / "samples", seed=0, rows=6)
    assert samples[0]["scene"].shape == (13, 8, 8)
    written = read_stable_diffusion(run / "model")
    assert written.architecture.scene_channels == 13
    network = StableDiffusion(
        written.architecture,
        {part: written.load_part(part, torch.float32) for part in ("unet", "vae", "text_encoder")},
    )
    task = PromptTask(network, samples)
    batch = {name: torch.as_tensor(value)[None] for name, value in samples[0].items()}
    other = batch | {"scene": torch.randn_like(batch["scene"])}
    with torch.no_grad():
        # two steps have taught it to look at the scene
        assert task.loss(task.module, batch)["loss"] != task.loss(task.module, other)["loss"]


def test_a_start_of_other_sizes_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = short(tmp_path, INPAINTING, unet_channels="[64, 96, 128]")
    assert main([str(path), "--folder", str(tmp_path / "run")]) == 2
    assert "has other sizes than the recipe's: change [architecture]" in capsys.readouterr().err
