"""Composites against the pipeline of diffusers and against PyTorch, with the same small random weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionInpaintPipeline
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from runtime import Compositor, EngineOptions, Placement, Request, Sampling
from runtime.imaging.paste_back import paste_feathered
from tests.support.imprint import (
    object_stitch_compositor,
    object_stitch_tensors,
    tiny_imprint,
    tiny_imprint_bundle,
)
from tests.support.pictures import Pixels, cutout, picture
from tests.support.serving import ServerThread, drawn_together
from training.data.pairs import as_reference
from training.network.architecture import LATENT_SCALE
from training.network.checkpoint import read_checkpoint
from training.network.imprint import Imprint
from training.preview_imprint import sample

SIDE, STEPS = 64, 10
CPU = EngineOptions("onnxruntime", "cpu")


def start_noise(height: int = SIDE, width: int = SIDE) -> Tensor:
    """That of `training.preview_imprint.sample`."""
    return torch.randn((1, 4, height // 8, width // 8), generator=torch.Generator().manual_seed(0))


def scene_and_mask(height: int = SIDE, width: int = SIDE) -> tuple[Pixels, NDArray[np.bool_]]:
    """The mask begins and ends at cells of the latent, which are 8 pixels wide."""
    mask = np.zeros((height, width), bool)
    mask[8:40, 24:48] = mask[32:56, 16:32] = True
    return picture(height, width, seed=2), mask


def request(
    scene: Pixels, mask: NDArray[np.bool_], mode: str, guidance_scale: float, **others: Any
) -> Request:
    """The crop is the scene."""
    placement = Placement(cutout(), mask=mask, mode=mode, crop_ratio=100.0, box_ratio=1.0)
    return Request(scene, [placement], 7, Sampling(steps=STEPS, guidance_scale=guidance_scale), **others)


def assert_same(found: Any, expected: Any) -> None:
    """But for one grey level."""
    assert np.abs(np.asarray(found).astype(int) - np.asarray(expected)).max() <= 1


def tokens_of(model: Imprint, placed: Any) -> Tensor:
    """Of the reference, and of none, (2, T, D)."""
    tokens = model.encode_reference(torch.from_numpy(as_reference(*placed.what))[None])
    return torch.cat([tokens, model.unconditional.expand_as(tokens)])


@torch.no_grad()
@pytest.mark.parametrize("guidance_scale", [3.0, 7.5])
def test_an_object_is_drawn_as_the_inpainting_pipeline_draws_it(
    guidance_scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is given tokens of a reference in the place of a prompt's. It blends nothing."""
    # it samples the latents of a scene; the standard deviation is 0 here
    kind = "diffusers.models.autoencoders.vae.DiagonalGaussianDistribution.sample"
    monkeypatch.setattr(kind, lambda distribution, generator=None: distribution.mean)
    model, compositor = tiny_imprint(), Compositor.load(tiny_imprint_bundle(), CPU)
    scene, mask = scene_and_mask()
    asked = request(scene, mask, "crop", guidance_scale, initial_noise=start_noise().numpy())
    (found,), placed = compositor.run(asked), compositor.accept(asked).placements[0]
    wanted, unconditional = tokens_of(model, placed).split(1)
    pipe = StableDiffusionInpaintPipeline(
        vae=model.vae,
        text_encoder=None,
        tokenizer=None,
        unet=model.unet,
        scheduler=DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    result = pipe(
        prompt_embeds=wanted,
        negative_prompt_embeds=unconditional,
        image=Image.fromarray(scene),
        mask_image=Image.fromarray(mask),
        strength=1.0,
        height=SIDE,
        width=SIDE,
        num_inference_steps=STEPS,
        guidance_scale=guidance_scale,
        latents=start_noise(),
    )
    drawn = np.asarray(result.images[0])
    assert drawn.std() > 5
    expected = paste_feathered(drawn, scene, placed.scene.geometry, placed.scene.paste)
    assert (expected != scene).mean() > 0.2
    assert_same(found.image, expected)


@torch.no_grad()
def test_object_stitch_composites_as_its_network_does(tmp_path: Path) -> None:
    """Loaded from its own layout; the scene comes in its own order, and the step blends."""
    compositor = object_stitch_compositor(tmp_path)
    model = Imprint(read_checkpoint(tmp_path / "ObjectStitch.pth").architecture).eval()
    assert model.architecture.scene_order == "latents_keep"
    tensors = object_stitch_tensors()
    tensors |= {f"cond_stage_model.projector.{n}": tensors[f"proj_out.{n}"] for n in ("weight", "bias")}
    model.load_official_state_dict(tensors)
    scene, mask = scene_and_mask(SIDE, 96)
    asked = request(scene, mask, "shape", 3.0, initial_noise=start_noise(SIDE, 96).numpy())
    (found,), placed = compositor.run(asked), compositor.accept(asked).placements[0]
    seen = [torch.from_numpy(each)[None] for each in (placed.scene.picture, placed.scene.masked_picture)]
    background, known = (model.encode(each).mean * LATENT_SCALE for each in seen)
    small = torch.from_numpy(mask[::8, ::8].astype(np.float32))[None, None]
    latent = sample(model, tokens_of(model, placed), torch.cat([small, known], 1), background, STEPS, 3.0)
    decoded = model.decode(latent)[0].permute(1, 2, 0) * 127.5 + 127.5
    drawn = decoded.clamp(0, 255).round().to(torch.uint8).numpy()
    expected = paste_feathered(drawn, scene, placed.scene.geometry, placed.scene.paste)
    assert (expected != scene).mean() > 0.1
    assert_same(found.image, expected)


# --- through the server -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server() -> Iterator[ServerThread]:
    """One whose samples share calls, which on a CPU those of this size do not."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("runtime.drawing._FILLS_A_CPU", SIDE * SIDE)
        with ServerThread(tiny_imprint_bundle()) as server:
            yield server


def test_a_picture_of_the_server_is_the_one_alone_whoever_shares_its_batch(server: ServerThread) -> None:
    """Neighbours with other references, scenes, levels and numbers of steps, some of them without guidance,
    and one without a reference."""
    scene, mask = scene_and_mask()
    requests = [
        Request(scene, [Placement(cutout(), mask=mask)], 7, Sampling(steps=6)),
        Request(
            picture(90, 120),
            [Placement(cutout(seed=5), box=(40, 30, 90, 80), mode="crop")],
            8,
            Sampling(steps=5, guidance_scale=1.0),
        ),
        Request(scene, [Placement(mask=mask, mask_level="blob")], 9, Sampling(steps=4, guidance_scale=7.5)),
        Request(scene, [Placement(cutout(), mask=mask, mode="shape")], 9, Sampling(steps=3), num_images=1),
    ]
    results = drawn_together(server, requests)
    assert max(len(timesteps) for timesteps in server.engine.steps) == 4
    alone = Compositor.load(server.compositor.bundle.path, CPU)
    for each, (found,) in zip(requests, results, strict=True):
        (expected,) = alone.run(each)
        assert (found.seed, found.regions) == (expected.seed, expected.regions)
        assert_same(found.image, expected.image)
