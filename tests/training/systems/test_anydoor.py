"""What the UNet's output means, and hints that are taken through the hint block ahead of time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from benchmarks.seeded import TINY
from training.checkpoint import write_model
from training.data.encoded import PAIRS_DONE, EncodedPairs, encode_hints, pack_hint
from training.data.pairs import PairRules
from training.network.architecture import ArchitectureError, hidden_from_metadata, hidden_to_metadata
from training.network.modules import AnyDoor
from training.systems.anydoor import Denoising, DiffusionTask, noisy_latents

RESOLUTION, PAIRS = 64, 3


def twins() -> tuple[AnyDoor, AnyDoor]:
    """The same weights, read as a prediction of the noise and of v."""
    torch.manual_seed(0)
    epsilon, v = AnyDoor(TINY), AnyDoor(replace(TINY, prediction="v"))
    v.load_state_dict(epsilon.state_dict())
    return epsilon.eval(), v.eval()


@torch.no_grad()
def test_v_is_turned_into_the_noise() -> None:
    epsilon, v = twins()
    timestep, tokens = torch.tensor([3.0, 980.0]), torch.randn(2, 5, TINY.token_width)
    latent, hint = torch.randn(2, TINY.latent_channels, 8, 8), torch.rand(2, 4, RESOLUTION, RESOLUTION)
    output = epsilon(latent, timestep, tokens, hint)
    signal = epsilon.alphas_cumprod[timestep.long()].view(-1, 1, 1, 1)
    expected = signal.sqrt() * output + (1 - signal).sqrt() * latent
    torch.testing.assert_close(v(latent, timestep, tokens, hint), expected)


@pytest.mark.parametrize("timestep", [0, 500, 999])
def test_a_perfect_v_gives_the_perfect_noise(timestep: int) -> None:
    """sqrt(a) v + sqrt(1 - a) x_t is the noise if v = sqrt(a) noise - sqrt(1 - a) latents."""
    _, model = twins()
    latents, noise = torch.randn(2, 1, 4, 8, 8)
    signal = model.alphas_cumprod[timestep]
    wanted = signal.sqrt() * noise - (1 - signal).sqrt() * latents
    model.unet.forward = lambda *_, **__: (wanted,)
    noisy = noisy_latents(latents, noise, torch.tensor([timestep]), model.alphas_cumprod)
    torch.testing.assert_close(model.predict_noise(noisy, torch.tensor([timestep]), noise, [noise]), noise)


@torch.no_grad()
def test_the_loss_of_v_is_its_mean_squared_error() -> None:
    _, model = twins()
    task = DiffusionTask(model, EncodedPairs.__new__(EncodedPairs), Denoising())
    latents, noise = torch.randn(2, 2, TINY.latent_channels, 8, 8)
    batch = {
        "latents": latents,
        "noise": noise,
        "timestep": torch.tensor([20, 950]),
        "features": torch.randn(2, 5, TINY.dino_width),
        "hint": torch.rand(2, 4, RESOLUTION, RESOLUTION),
    }
    signal = model.alphas_cumprod[batch["timestep"]].view(-1, 1, 1, 1)
    noisy = noisy_latents(latents, noise, batch["timestep"], model.alphas_cumprod)
    tokens = model.id_encoder.projector(batch["features"])
    details = model.detail_maps(batch["hint"], batch["timestep"], tokens)
    output = model.unet(
        noisy,
        batch["timestep"],
        tokens,
        down_block_additional_residuals=details[:-1],
        mid_block_additional_residual=details[-1],
    ).sample
    v = signal.sqrt() * noise - (1 - signal).sqrt() * latents
    torch.testing.assert_close(task.loss(task.module, batch)["loss"], (output - v).square().mean())


def test_what_shapes_do_not_tell_travels_with_the_weights(tmp_path: Path) -> None:
    _, model = twins()
    write_model(tmp_path / "v.safetensors", model)
    with safe_open(tmp_path / "v.safetensors", framework="pt") as file:
        metadata = file.metadata()
    found = hidden_from_metadata(metadata)
    assert found["prediction"] == "v"
    assert hidden_to_metadata(replace(TINY, **found)).items() <= metadata.items()


@pytest.mark.parametrize("value", ["x0", ""])
def test_an_unknown_prediction_is_refused(value: str) -> None:
    with pytest.raises(ArchitectureError, match=f"predicts '{value}'"):
        hidden_from_metadata({"anydoor.prediction": value})


@pytest.fixture
def encoded_folder(tmp_path: Path) -> Path:
    rng, side = np.random.default_rng(0), RESOLUTION // 8
    hints = rng.uniform(-1, 1, (PAIRS, 4, RESOLUTION, RESOLUTION)).astype(np.float32)
    hints[:, 3] = np.rint(hints[:, 3])
    np.save(tmp_path / "hints.npy", np.stack([pack_hint(hint) for hint in hints]))
    np.save(tmp_path / "features.npy", rng.standard_normal((PAIRS, 5, TINY.dino_width), np.float32))
    np.save(tmp_path / "black.npy", np.zeros((5, TINY.dino_width), np.float32))
    np.save(tmp_path / "moments.npy", rng.random((PAIRS, 2, TINY.latent_channels, side, side), np.float32))
    np.save(tmp_path / "single.npy", np.arange(PAIRS) == 1)
    (tmp_path / PAIRS_DONE).write_text(str(PAIRS))
    return tmp_path


@torch.no_grad()
def test_hints_encoded_ahead_are_hints(encoded_folder: Path) -> None:
    """Only the half precision that they are stored in tells them from whole hints."""
    model, _ = twins()
    encode_hints(model, encoded_folder, batch=2)
    whole = EncodedPairs(encoded_folder, 0, PairRules(resolution=RESOLUTION))
    ahead = EncodedPairs(encoded_folder, 0, PairRules(resolution=RESOLUTION), hint_features=True)
    for number in range(4):
        first, second = whole[number], ahead[number]
        assert first.keys() == second.keys()
        for name in first.keys() - {"hint"}:
            np.testing.assert_array_equal(first[name], second[name])
        timestep, tokens = torch.tensor([first["timestep"]]), torch.randn(1, 5, TINY.token_width)
        maps = [
            model.control(torch.from_numpy(sample["hint"])[None], timestep, tokens)
            for sample in (first, second)
        ]
        for expected, found in zip(*maps, strict=True):
            torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3)


def test_a_hint_block_that_does_not_learn_has_a_last_layer_that_does() -> None:
    model, _ = twins()
    Denoising(hint_block=False).apply(model)
    learning = {n for n, p in model.control.controlnet_cond_embedding.named_parameters() if p.requires_grad}
    assert learning == {"conv_out.weight", "conv_out.bias"}


def test_one_picture_twice_counts_as_an_image_and_two_as_frames(encoded_folder: Path) -> None:
    """A video prefers noisy timesteps and an image clean ones: 0.85 of either under the code's rule."""
    pairs = EncodedPairs(encoded_folder, 0, PairRules(resolution=RESOLUTION, timesteps="code"), kind="video")
    means = np.load(encoded_folder / "features.npy")
    noisy: dict[bool, list[bool]] = {True: [], False: []}
    for number in range(600):
        sample = pairs[number]
        single = np.array_equal(sample["features"], means[1])
        noisy[single].append(sample["timestep"] >= 500)
    assert np.mean(noisy[False]) == pytest.approx(0.85, abs=0.07)
    assert np.mean(noisy[True]) == pytest.approx(0.15, abs=0.07)
