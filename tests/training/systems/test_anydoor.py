"""The diffusion stage: what the UNet's output means, and what learns."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from benchmarks.seeded import TINY
from tests.support.tiny import RandomPairs
from training.network.architecture import ArchitectureError, settings_from_metadata, settings_to_metadata
from training.network.checkpoint import write_model
from training.network.modules import AnyDoor
from training.systems.anydoor import Denoising, DiffusionTask, noisy_latents

RESOLUTION = 64


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
    task = DiffusionTask(model, RandomPairs(), Denoising())
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
    found = settings_from_metadata(metadata)
    assert found["prediction"] == "v"
    assert settings_to_metadata(replace(TINY, **found)).items() <= metadata.items()


@pytest.mark.parametrize("value", ["x0", ""])
def test_an_unknown_prediction_is_refused(value: str) -> None:
    with pytest.raises(ArchitectureError, match=f"'{value}' of prediction"):
        settings_from_metadata({"anydoor.prediction": value})


def test_a_hint_block_that_does_not_learn_has_a_last_layer_that_does() -> None:
    model, _ = twins()
    Denoising(hint_block=False).apply(model)
    learning = {n for n, p in model.control.controlnet_cond_embedding.named_parameters() if p.requires_grad}
    assert learning == {"conv_out.weight", "conv_out.bias"}
