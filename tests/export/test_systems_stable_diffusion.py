"""Stable Diffusion's graphs draw what the pipelines of diffusers draw, in PyTorch and in bundles."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionInpaintPipeline
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from engines.bundle import Bundle
from engines.engine import Engine, open_engine
from engines.errors import BundleError
from engines.memory_plan import card_memory, fixed_buffers, place_name, table_name
from engines.options import EngineOptions
from engines.spec import BankSpec
from export.example_inputs import example_inputs
from export.systems.scene import blended
from export.systems.stable_diffusion import DECODE, DENOISE, graph_specs
from export.verification import relative_error
from runtime.diffusion.noise_schedule import alphas_cumprod
from runtime.sampling.running_batch import RunningBatch
from runtime.systems.tokenizer import Tokenizer, open_tokenizer
from tests.support.stable_diffusion import Version, pipeline, tiny_stable_diffusion_bundle
from tests.support.text_sampling import (
    Floats,
    blank_scene,
    finish,
    module_engine,
    parameters,
    scene_of,
    start,
    tokens_of,
)
from training.network.stable_diffusion import StableDiffusionArchitecture
from training.network.stable_diffusion_checkpoint import read_stable_diffusion

Kind = Literal["draw", "blend", "scene"]
"""From nothing; into a scene with a model that does not see it; with one that does."""

SIZE = (32, 48)
PROMPT, NEGATIVE = "a cat in the snow", "a red car"
RANDOM = np.random.default_rng(0)
LATENT = RANDOM.standard_normal((1, 4, 16, 24), dtype=np.float32)
PICTURE = RANDOM.integers(0, 256, (*SIZE, 3), np.uint8)
MASK = np.zeros(SIZE, np.uint8)
MASK[6:26, 14:40] = 255

CASES: list[tuple[Version, Kind, Any, float]] = [
    ("1.x", "draw", "epsilon", 7.5),
    ("2.x", "draw", "v_prediction", 3.0),
    ("1.x", "blend", "epsilon", 3.0),
    ("2.x", "blend", "v_prediction", 7.5),
    ("2.x", "scene", "epsilon", 7.5),
    ("1.x", "scene", "v_prediction", 3.0),
]


def pipeline_of(version: Version, kind: Kind, prediction: str) -> Any:
    """The pipeline, whose encoder gives the mean of the latent, because its standard deviation is 0."""
    pipe = pipeline(version, kind == "scene", prediction)
    if kind != "draw":
        vae = copy.deepcopy(pipe.vae)
        with torch.no_grad():
            vae.quant_conv.weight[4:], vae.quant_conv.bias[4:] = 0, -100
        parts = {**pipe.components, "vae": vae}
        pipe = StableDiffusionInpaintPipeline(**parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@cache
def expected(version: Version, kind: Kind, prediction: str, guidance_scale: float) -> tuple[Floats, Any]:
    """Latents after 10 steps, and the picture."""
    pipe = pipeline_of(version, kind, prediction)
    scene = {"image": Image.fromarray(PICTURE), "mask_image": Image.fromarray(MASK), "strength": 1.0}
    latents = pipe(
        prompt=PROMPT,
        negative_prompt=NEGATIVE,
        height=SIZE[0],
        width=SIZE[1],
        num_inference_steps=10,
        guidance_scale=guidance_scale,
        latents=torch.from_numpy(LATENT),
        output_type="latent",
        **({} if kind == "draw" else scene),
    ).images
    with torch.no_grad():
        decoded = pipe.vae.decode(latents / pipe.vae.config.scaling_factor, return_dict=False)[0]
    [picture] = pipe.image_processor.postprocess(decoded, output_type="pil")
    return latents.numpy(), np.asarray(picture)


def drawn(engine: Engine, spec: Any, tokenizer: Tokenizer, kind: Kind, guidance_scale: float) -> Floats:
    scene = blank_scene(spec)
    if kind != "draw":
        picture = (PICTURE.astype(np.float32) / 127.5 - 1).transpose(2, 0, 1)[None]
        scene = scene_of(engine, spec, picture, (MASK / 255).astype(np.float32)[None, None])
    tokens = tokens_of(engine, tokenizer, PROMPT, NEGATIVE)
    [latent] = finish(
        engine, spec, [start(engine, LATENT, tokens, scene, parameters(guidance_scale=guidance_scale))]
    )
    return latent


def assert_same(found: Floats, engine: Engine, case: tuple[Version, Kind, str, float]) -> None:
    latents, picture = expected(*case)
    assert relative_error(found, latents) < 1e-4
    image = engine.to_host(engine.run(DECODE, {"latent": found})["image"])[0]
    assert np.abs(image.astype(int) - picture).max() <= 1


@pytest.mark.parametrize("case", CASES, ids=lambda case: " ".join(map(str, case)))
def test_modules_draw_what_diffusers_draws(case: tuple[Version, Kind, str, float], tmp_path: Path) -> None:
    version, kind, prediction, guidance_scale = case
    pipe = pipeline(version, kind == "scene", prediction)
    pipe.save_pretrained(tmp_path)
    checkpoint = read_stable_diffusion(tmp_path)
    assert checkpoint.tokenizer is not None
    files = checkpoint.tokenizer
    tokenizer = Tokenizer(files.merges, files.pad, files.any_case)
    engine: Any = module_engine(checkpoint, SIZE)
    theirs = pipe.encode_prompt(PROMPT, "cpu", 1, True, NEGATIVE)
    for prompt, tokens in zip((PROMPT, NEGATIVE), theirs):
        assert relative_error(tokens_of(engine, tokenizer, prompt), tokens.detach().numpy()) < 1e-5
    found = drawn(engine, engine.specs[DENOISE], tokenizer, kind, guidance_scale)
    assert_same(found, engine, case)


# --- bundles ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    """Of 1.x. Those of 2.x draw through a compositor, in tests/runtime/systems."""
    return Bundle.open(tiny_stable_diffusion_bundle(4, version="1.x", resolution=SIZE))


@pytest.fixture(scope="module")
def engine(bundle: Bundle) -> Engine:
    return open_engine(bundle, EngineOptions("onnxruntime", "cpu", threads=1))


def test_the_bundle_says_what_it_is(bundle: Bundle, engine: Engine) -> None:
    manifest = bundle.manifest
    assert (manifest.system, manifest.picture_size, manifest.latent_shape) == (
        "stable_diffusion",
        SIZE,
        (4, 16, 24),
    )
    assert manifest.size_text == "48x32 px"
    assert list(manifest.specs) == ["denoise", "text_encoder", "encode", "decode"]
    tokenizer, theirs = open_tokenizer(bundle), pipeline("1.x").tokenizer
    assert tokenizer.encode(PROMPT) == theirs(PROMPT, padding="max_length", max_length=77)["input_ids"]
    constants = bundle.constants()
    np.testing.assert_array_equal(constants["alphas_cumprod"], alphas_cumprod())
    np.testing.assert_array_equal(constants["unconditional_tokens"], tokens_of(engine, tokenizer, ""))


@pytest.mark.parametrize("kind", ["draw", "blend"])
def test_the_bundle_draws_what_diffusers_draws(bundle: Bundle, engine: Engine, kind: Kind) -> None:
    found = drawn(engine, bundle.manifest.step, open_tokenizer(bundle), kind, 7.5)
    assert_same(found, engine, ("1.x", kind, "epsilon", 7.5))


def test_unlike_samples_that_share_their_calls_end_as_they_do_alone(bundle: Bundle, engine: Engine) -> None:
    """Other prompts, scenes, guidance, samplers and numbers of steps; the last joins two steps late."""
    spec, tokenizer = bundle.manifest.step, open_tokenizer(bundle)
    picture = (PICTURE.astype(np.float32) / 127.5 - 1).transpose(2, 0, 1)[None]
    mask = (MASK / 255).astype(np.float32)[None, None]
    scenes = [
        scene_of(engine, spec, picture, mask),
        scene_of(engine, spec, -picture, mask),
        blank_scene(spec),
    ]
    settings = [
        parameters(4, 7.5),
        parameters(3, 1.0),
        parameters(4, 3.0, sampler="dpm_solver_2m"),
        parameters(3, 2.0, eta=1.0),
    ]

    def started() -> list[Any]:
        return [
            start(
                engine,
                np.roll(LATENT, number),
                tokens_of(engine, tokenizer, prompt, NEGATIVE),
                scenes[number % 3],
                sampling,
            )
            for number, (prompt, sampling) in enumerate(zip(("a cat", "a mat", "a cat", "snow"), settings))
        ]

    alone = [finish(engine, spec, [sample])[0] for sample in started()]
    *first, last = started()
    batch = RunningBatch(engine, spec)
    batch.samples = list(first)
    batch.step()
    batch.step()
    together = finish(engine, spec, [*first, last])
    for found, wanted in zip(together, alone):
        assert relative_error(found, wanted) < 1e-5


@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=10)
def test_a_blend_of_one_changes_nothing_and_one_of_zero_gives_the_background(
    bundle: Bundle, engine: Engine, seed: int
) -> None:
    spec = bundle.manifest.step
    inputs = example_inputs(spec, bundle.manifest.typical_sizes, seed)

    def next_latent(**changed: Any) -> Floats:
        return engine.to_host(engine.run(spec.name, {**inputs, **changed}, ["next_latent"])["next_latent"])

    ones, background = np.ones_like(inputs["blend"]), inputs["background"]
    unblended = next_latent(blend=ones)
    np.testing.assert_array_equal(next_latent(blend=ones, background=1e3 * background), unblended)
    kept = next_latent(blend=0 * ones, background_coefficients=np.array([[1, 0]], np.float32))
    np.testing.assert_array_equal(kept, background)
    assert relative_error(next_latent(blend=0.5 * ones), unblended) > 0.1


@given(st.integers(0, 2**32 - 1))
def test_blending_is_exact_at_its_ends(seed: int) -> None:
    drawn, kept = torch.from_numpy(np.random.default_rng(seed).standard_normal((2, 1, 4, 3, 3), np.float32))
    ends = torch.from_numpy(np.random.default_rng(seed).integers(0, 2, (1, 1, 3, 3)).astype(np.float32))
    assert torch.equal(blended(drawn, kept, ends), torch.where(ends == 1, drawn, kept))


def test_a_tokenizer_that_is_damaged_or_not_there(bundle: Bundle, tmp_path: Path) -> None:
    merges = bundle.path / "merges.txt"
    (tmp_path / "merges.txt").write_bytes(merges.read_bytes()[::-1])
    with pytest.raises(BundleError, match=r"merges\.txt is not the file that was built"):
        open_tokenizer(Bundle(tmp_path, bundle.manifest))
    with pytest.raises(BundleError, match="has no tokenizer"):
        open_tokenizer(Bundle(tmp_path, replace(bundle.manifest, tokenizer=None)))


def test_the_memory_plan_has_places_for_scenes(bundle: Bundle) -> None:
    buffers = {buffer.name for buffer in fixed_buffers(card_memory(bundle.manifest), bundle.manifest)}
    places = {place_name(DENOISE, name) for name in ("start_noise", "background", "blend")}
    assert places | {table_name(DENOISE, "background_coefficients")} <= buffers


def test_models_without_scene_channels_have_no_input_for_them() -> None:
    blended_alone = StableDiffusionArchitecture()
    seeing = StableDiffusionArchitecture(scene_channels=5)
    for architecture, names in [
        (blended_alone, ("background", "blend")),
        (seeing, ("background", "blend", "scene")),
    ]:
        step = graph_specs(architecture, (512, 768))[DENOISE]
        assert step.banks[1] == BankSpec("scene", names, "row_scene")
    assert step.tensor("scene").shape == ("scenes", 5, 64, 96)
