"""Trains Stable Diffusion: text encoder and UNet learn from captions; draws pictures for prompts.

The published models need no training here; `training/recipes/stable-diffusion-small.toml` trains a small one.
Source: Rombach et al., 2022.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from runtime.diffusion.ddim import ddim_schedule
from runtime.systems.tokenizer import Tokenizer
from training.data.pairs import Picture
from training.loop import Batch, NumberedDataset
from training.network.architecture import LATENT_SCALE
from training.network.stable_diffusion import StableDiffusion
from training.systems.anydoor import error_weights, noisy_latents

STEPS, GUIDANCE_SCALE = 50, 7.5
"""How pictures are drawn where nothing else is said: by DDIM."""


class Learner(nn.Module):
    """The parts that learn, as one module with one forward pass (which DDP needs)."""

    def __init__(self, network: StableDiffusion) -> None:
        super().__init__()
        self.unet, self.text_encoder = network.unet, network.text_encoder
        # plain references, so that the network is not a second owner of these weights
        self._predict, self._encode_prompt = network.predict_noise, network.encode_prompt

    def forward(self, latent: Tensor, timestep: Tensor, ids: Tensor, scene: Sequence[Tensor]) -> Tensor:
        """Estimates the noise in latents (N, C, h, w), with encoded prompts (N, 77)."""
        return self._predict(latent, timestep, self._encode_prompt(ids), *scene)


class PromptTask:
    """Mean squared error of what the UNet predicts, for pictures with captions."""

    def __init__(self, network: StableDiffusion, samples: NumberedDataset) -> None:
        """Takes a network whose UNet and text encoder learn, and samples that are `encoded`."""
        network.requires_grad_(False)
        self.module = Learner(network).requires_grad_(True)
        self.network, self._samples = network, samples

    def dataset(self) -> NumberedDataset:
        """Gives the samples."""
        return self._samples

    @torch.no_grad()
    def encoded(self, batch: Batch) -> dict[str, Tensor]:
        """Encodes pictures (N, 3, R, R): mean and spread of their scaled latents, (N, 2, C, h, w); and the
        scene that an inpainting model sees, if there is one."""
        posterior = self.network.to(batch["picture"].device).encode(batch["picture"])
        moments = torch.stack([posterior.mean, posterior.std], 1) * LATENT_SCALE
        encoded = {"moments": moments, "ids": batch["ids"]}
        if "mask" in batch:
            encoded["scene"] = encode_scene(self.network, batch["mask"], batch["surroundings"])
        return encoded

    def loss(self, module: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Computes the loss of a batch of `StoredSamples`."""
        noise, timestep = batch["noise"], batch["timestep"]
        mean, spread = batch["moments"].unbind(1)
        latents = mean + spread * batch["posterior_noise"]
        noisy = noisy_latents(latents, noise, timestep, self.network.alphas_cumprod)
        scene = [batch["scene"]] if "scene" in batch else []
        estimate = module(noisy, timestep, batch["ids"], scene)
        error = (estimate.float() - noise).square().mean((1, 2, 3))
        weighted = error_weights(self.network, timestep) * error
        return {"loss": weighted.mean(), "noise": error.detach().mean()}


@torch.no_grad()
def encode_scene(network: StableDiffusion, mask: Tensor, surroundings: Tensor) -> Tensor:
    """Computes the scene that an inpainting model sees.

    Args:
        network: its autoencoder encodes.
        mask: (N, 1, R, R), 1 where it draws.
        surroundings: pictures (N, 3, R, R), -1..1, grey there.

    Returns:
        (N, 1 + C, h, w), mask and latents; see `StableDiffusion.predict_noise`.
    """
    latents = network.vae.encode(surroundings).latent_dist.mean * LATENT_SCALE
    return torch.cat([nn.functional.interpolate(mask, latents.shape[-2:]), latents], 1)


# --- pictures for prompts ---------------------------------------------------------------------------------


@torch.no_grad()
def draw_pictures(
    network: StableDiffusion,
    tokenizer: Tokenizer,
    prompt: str,
    picture_seeds: Sequence[int],
    resolution: int,
    steps: int = STEPS,
    guidance_scale: float = GUIDANCE_SCALE,
    batch: int = 1,
) -> Iterator[Picture]:
    """Draws pictures (R, R, 3), each from its seed's noise, as the runtime does.

    The last bits of a picture depend on `batch`, how many are drawn at once. Source: classifier-free guidance
    (Ho and Salimans, 2022); DDIM without added noise.
    """
    device = next(network.unet.parameters()).device
    network.vae.to(device)  # where the UNet learns; the autoencoder is used here only
    ids = torch.tensor([tokenizer.encode(text) for text in (prompt, "")], device=device)
    tokens = network.encode_prompt(ids)
    side = resolution // 2 ** (len(network.vae.config.block_out_channels) - 1)
    shape = (1, network.vae.config.latent_channels, side, side)
    schedule = ddim_schedule(network.alphas_cumprod.cpu().numpy(), steps)
    scene = _empty_scene(network, resolution)
    for numbers in _batches(picture_seeds, batch):
        latent = torch.from_numpy(np.concatenate([_noise(seed, shape) for seed in numbers])).to(device)
        rows = 2 * len(numbers)
        conditions = tokens.repeat_interleave(len(numbers), 0)
        scenes = [part.expand(rows, -1, -1, -1) for part in scene]
        for timestep, (from_latent, from_noise, _) in zip(
            schedule.timesteps.tolist(), schedule.coefficients.tolist()
        ):
            at = torch.full((rows,), timestep, device=device)
            estimate = network.predict_noise(latent.repeat(2, 1, 1, 1), at, conditions, *scenes)
            wanted, unconditional = estimate.chunk(2)
            noise = unconditional + guidance_scale * (wanted - unconditional)
            latent = from_latent * latent + from_noise * noise
        decoded = (network.decode(latent) * 127.5 + 127.5).clamp(0, 255).round().to(torch.uint8)
        yield from decoded.permute(0, 2, 3, 1).cpu().numpy()


def _batches(numbers: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    return (numbers[start : start + size] for start in range(0, len(numbers), size))


def _noise(seed: int, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Returns the noise that the runtime starts from."""
    generator = np.random.Generator(np.random.Philox(key=np.array([seed, 0], np.uint64)))
    return generator.standard_normal(shape, np.float32)


def _empty_scene(network: StableDiffusion, resolution: int) -> list[Tensor]:
    """Returns what an inpainting model sees where it draws the whole picture; none for the others."""
    if network.unet.config.in_channels == network.vae.config.latent_channels:
        return []
    device = next(network.unet.parameters()).device
    grey = network.encode(torch.zeros(1, 3, resolution, resolution, device=device)).mean * LATENT_SCALE
    return [torch.cat([torch.ones_like(grey[:, :1]), grey], 1)]


class PromptPreview:
    """Sheets of pictures with the weights that training has reached: a row per prompt."""

    def __init__(
        self,
        network: StableDiffusion,
        tokenizer: Tokenizer,
        prompts: Sequence[str],
        pictures: int,
        resolution: int,
        guidance_scale: float = GUIDANCE_SCALE,
        steps: int = 20,
    ) -> None:
        """Says what to draw.

        Args:
            network: as it is trained; its weights are put back after each sheet.
            tokenizer: encodes the prompts.
            prompts: a row each.
            pictures: of each prompt.
            resolution: side of a picture, in pixels.
            guidance_scale: of classifier-free guidance.
            steps: of sampling.
        """
        self._network, self._tokenizer, self.prompts = network, tokenizer, prompts
        self._how = (range(pictures), resolution, steps, guidance_scale)

    def __call__(self, weights: Mapping[str, Tensor]) -> Picture:
        """Draws the sheet with weights of `Learner`."""
        learner = Learner(self._network)
        before = {name: value.clone() for name, value in learner.state_dict().items()}
        learner.load_state_dict(weights)
        try:
            drawn = [
                list(draw_pictures(self._network, self._tokenizer, prompt, *self._how))
                for prompt in self.prompts
            ]
        finally:
            learner.load_state_dict(before)
        return np.concatenate([np.concatenate(row, axis=1) for row in drawn])
