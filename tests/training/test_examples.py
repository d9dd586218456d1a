"""The example models that are not bundles are read as any checkpoint is, and draw what is asked for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from runtime.systems.tokenizer import Tokenizer
from training.network.stable_diffusion import StableDiffusion
from training.network.stable_diffusion_checkpoint import read_stable_diffusion
from training.systems.stable_diffusion import draw_pictures

EXAMPLE = Path(__file__).parents[2] / "examples" / "stable-diffusion-small"


@pytest.fixture(scope="module")
def words() -> tuple[StableDiffusion, Tokenizer]:
    """The small model that reads words, and its tokenizer."""
    checkpoint = read_stable_diffusion(EXAMPLE)
    parts = {part: checkpoint.load_part(part, torch.float32) for part in ("unet", "vae", "text_encoder")}
    assert checkpoint.tokenizer is not None
    return StableDiffusion(checkpoint.architecture, parts), checkpoint.tokenizer.open()


def drawn(words: tuple[StableDiffusion, Tokenizer], prompt: str) -> NDArray[np.float64]:
    """Six pictures for a prompt, (6, 64, 64, 3) in 0..1."""
    pictures = draw_pictures(*words, prompt, range(6), 64, steps=10, guidance_scale=3.0, batch=6)
    return np.stack(list(pictures)) / 255


def test_the_colour_of_an_object_is_that_of_the_prompt(words: tuple[StableDiffusion, Tokenizer]) -> None:
    red, blue = (drawn(words, f"a {colour} ball on white")[:, 16:48, 16:48] for colour in ("red", "blue"))
    redness = [(pictures[..., 0] - pictures[..., 2]).mean() for pictures in (red, blue)]
    assert redness[0] > redness[1] + 0.1


def test_the_ground_is_that_of_the_prompt(words: tuple[StableDiffusion, Tokenizer]) -> None:
    corners = {place: drawn(words, f"a ball {place}")[:, :4, :4].mean() for place in ("on white", "on black")}
    assert corners["on white"] > 0.8
    assert corners["on black"] < 0.2
