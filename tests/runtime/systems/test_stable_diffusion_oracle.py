"""Pictures of Compositor and server against those of diffusers, with the same small random weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from runtime import Compositor, EngineOptions, Placement, Request, Sampling
from runtime.imaging.paste_back import paste_feathered
from tests.support.pictures import Pixels, picture
from tests.support.serving import ServerThread, drawn_together, held_compositor
from tests.support.stable_diffusion import pipeline, tiny_stable_diffusion_bundle

SIDE, STEPS = 64, 10
PROMPT, NEGATIVE = "a photo of a cat in the snow", "a red car"
CPU = EngineOptions("onnxruntime", "cpu")

Channels = Literal[4, 9]


@pytest.fixture(autouse=True)
def latents_without_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers samples the latents of a scene; the standard deviation is 0 here."""
    kind = "diffusers.models.autoencoders.vae.DiagonalGaussianDistribution.sample"
    monkeypatch.setattr(kind, lambda distribution, generator=None: distribution.mean)


def start_noise(seed: int = 3) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((1, 4, SIDE // 2, SIDE // 2), np.float32)


def drawn_by_diffusers(
    pipe: Any, guidance_scale: float, noise: NDArray[np.float32], **arguments: Any
) -> Pixels:
    with torch.inference_mode():
        result = pipe(
            prompt=PROMPT,
            negative_prompt=NEGATIVE,
            height=SIDE,
            width=SIDE,
            num_inference_steps=STEPS,
            guidance_scale=guidance_scale,
            latents=torch.from_numpy(noise),
            **arguments,
        )
    return np.asarray(result.images[0])


def difference(found: Any, expected: Any) -> int:
    return int(np.abs(np.asarray(found).astype(int) - np.asarray(expected)).max())


@pytest.mark.parametrize(
    ("prediction", "guidance_scale"),
    [("epsilon", 7.5), ("epsilon", 3.0), pytest.param("v", 7.5, marks=pytest.mark.nightly)],
)
def test_a_drawing_is_that_of_diffusers(prediction: Literal["epsilon", "v"], guidance_scale: float) -> None:
    pipe = pipeline("2.x", prediction_type="v_prediction" if prediction == "v" else "epsilon")
    expected = drawn_by_diffusers(pipe, guidance_scale, start_noise())
    compositor = Compositor.load(tiny_stable_diffusion_bundle(4, prediction), CPU)
    sampling = Sampling(steps=STEPS, guidance_scale=guidance_scale)
    found = compositor.draw(
        PROMPT, negative_prompt=NEGATIVE, sampling=sampling, initial_noise=start_noise(), seed=7
    )
    assert expected.std() > 20
    assert difference(found, expected) <= 1


def scene_and_mask() -> tuple[Pixels, NDArray[np.bool_]]:
    """The mask begins and ends at cells of the latent, which are 2 pixels wide here."""
    mask = np.zeros((SIDE, SIDE), bool)
    mask[10:40, 20:44] = mask[30:50, 12:30] = True
    return picture(SIDE, SIDE, seed=2), mask


@pytest.mark.parametrize(("channels", "mode"), [(9, "crop"), (4, "shape")])
@pytest.mark.parametrize("guidance_scale", [7.5, 3.0])
def test_a_part_of_a_scene_is_drawn_as_diffusers_draws_it(
    channels: Channels, mode: str, guidance_scale: float
) -> None:
    """With 9 channels diffusers blends nothing; with 4 it blends at the hard edge of the mask."""
    scene, mask = scene_and_mask()
    pipe = inpainting_pipeline(channels)
    drawn = drawn_by_diffusers(pipe, guidance_scale, start_noise(), **inpainted(scene, mask))
    compositor = Compositor.load(tiny_stable_diffusion_bundle(channels), CPU)
    request = inpainting_request(scene, mask, mode, guidance_scale, initial_noise=start_noise())
    (found,) = compositor.run(request)
    placed: Any = compositor.accept(request).placements[0]
    expected = paste_feathered(drawn, scene, placed.scene.geometry, placed.scene.paste)
    assert (expected != scene).mean() > 0.2
    assert difference(found.image, expected) <= 1


def inpainting_pipeline(channels: Channels) -> Any:
    from diffusers import StableDiffusionInpaintPipeline

    if channels == 9:
        return pipeline("2.x", inpaint=True)
    parts = pipeline("2.x").components
    return StableDiffusionInpaintPipeline(**parts, requires_safety_checker=False)


def inpainted(scene: Pixels, mask: NDArray[np.bool_]) -> dict[str, Any]:
    """What diffusers' pipeline takes."""
    return {"image": Image.fromarray(scene), "mask_image": Image.fromarray(mask), "strength": 1.0}


def inpainting_request(
    scene: Pixels, mask: NDArray[np.bool_], mode: str, guidance_scale: float, **others: Any
) -> Request:
    """The same for ours: the crop is the scene."""
    placement = Placement(
        prompt=PROMPT, negative_prompt=NEGATIVE, mask=mask, mode=mode, crop_ratio=100.0, box_ratio=1.0
    )
    return Request(scene, [placement], 7, Sampling(steps=STEPS, guidance_scale=guidance_scale), **others)


# --- through the server -----------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[4, 9])
def server(request: pytest.FixtureRequest) -> Iterator[ServerThread]:
    """One whose samples share calls, which on a CPU those of this size do not."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("runtime.drawing._FILLS_A_CPU", SIDE * SIDE)
        with ServerThread(tiny_stable_diffusion_bundle(request.param)) as server:
            yield server


def noise_of_seed(seed: int) -> NDArray[np.float32]:
    """Of the first placement; see `runtime.job`."""
    generator = np.random.Generator(np.random.Philox(key=np.array([seed, 0], np.uint64)))
    return generator.standard_normal((1, 4, SIDE // 2, SIDE // 2), dtype=np.float32)


def test_a_server_draws_what_diffusers_draws(server: ServerThread) -> None:
    """With 9 channels into a scene, with 4 from nothing."""
    with server.client() as client:
        if server.compositor.bundle.manifest.architecture["scene_channels"]:
            scene, mask = scene_and_mask()
            (result,) = client.run(inpainting_request(scene, mask, "crop", 7.5))
            pipe, place = pipeline("2.x", inpaint=True), inpainted(scene, mask)
        else:
            request = Request.drawing(PROMPT, NEGATIVE, seed=7, sampling=Sampling(steps=STEPS))
            (result,) = client.run(request)
            pipe, place = pipeline("2.x"), {}
    assert difference(result.image, drawn_by_diffusers(pipe, 7.5, noise_of_seed(7), **place)) <= 1


def test_a_picture_of_the_server_is_the_one_alone_whoever_shares_its_batch(server: ServerThread) -> None:
    """Neighbours with other prompts, scenes, boxes, guidance and numbers of steps."""
    scene, mask = scene_and_mask()
    placements = [
        Placement(prompt=PROMPT, mask=mask, crop_ratio=1.5),
        Placement(prompt="the castle", negative_prompt=NEGATIVE, box=(40, 30, 90, 80), mode="crop"),
    ]
    requests = [
        Request(scene, [placements[0]], 7, Sampling(steps=6, guidance_scale=7.5)),
        Request(picture(90, 120), [placements[1]], 8, Sampling(steps=5, guidance_scale=3.0)),
        Request.drawing("10 cats", seed=9, sampling=Sampling(steps=4, guidance_scale=1.0)),
        Request.drawing("the mat", NEGATIVE, seed=9, sampling=Sampling(steps=3)),
    ]
    results = drawn_together(server, requests)
    assert max(len(timesteps) for timesteps in server.engine.steps) == 4
    alone, _ = held_compositor(server.compositor.bundle.path)
    for request, (found,) in zip(requests, results, strict=True):
        (expected,) = alone.run(request)
        assert (found.seed, found.regions) == (expected.seed, expected.regions)
        assert difference(found.image, expected.image) <= 1
