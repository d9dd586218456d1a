"""Drawing from words, alone and into scenes: places, prompts, what is remembered, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from engines.bundle import Bundle
from engines.engine import open_engine
from engines.errors import BundleError
from runtime import Compositor, EngineOptions, InputError, Placement, Request, Sampling
from runtime.request import Blank
from runtime.systems.inpainting import ENCODE
from runtime.systems.stable_diffusion import DEFAULTS, TEXT_ENCODER
from tests.support.observers import RunCounter
from tests.support.pictures import PLACEMENT, SCENE, Pixels, cutout, picture
from tests.support.stable_diffusion import tiny_stable_diffusion_bundle

CPU = EngineOptions("onnxruntime", "cpu")
FAST = Sampling(steps=2)
CUP = Placement(prompt="a cat", box=(30, 20, 80, 70))


@pytest.fixture(scope="module", params=[4, 9])
def compositor(request: pytest.FixtureRequest) -> Compositor:
    return Compositor.load(tiny_stable_diffusion_bundle(request.param), CPU)


@pytest.fixture(scope="module")
def four() -> Compositor:
    return Compositor.load(tiny_stable_diffusion_bundle(4), CPU)


@pytest.fixture(scope="module")
def anydoor(tiny_bundle: Path) -> Compositor:
    return Compositor.load(tiny_bundle, CPU)


def drawn(compositor: Compositor, placement: Placement, scene: Any = SCENE, seed: int = 7) -> Pixels:
    return compositor.run(Request(scene, [placement], seed, FAST))[0].image


# --- from nothing -----------------------------------------------------------------------------------------


def test_a_drawing_has_the_bundles_size_and_follows_its_seed(compositor: Compositor) -> None:
    first, again, other = (
        np.asarray(compositor.draw("a cat", seed=seed, sampling=FAST)) for seed in (7, 7, 8)
    )
    assert first.shape == (64, 64, 3)
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_every_word_counts(four: Compositor) -> None:
    drawings = [
        four.draw("a cat", seed=7, sampling=FAST),
        four.draw("the castle", seed=7, sampling=FAST),
        four.draw("a cat", negative_prompt="the castle", seed=7, sampling=FAST),
    ]
    assert len({drawing.tobytes() for drawing in drawings}) == 3
    empty = four.draw("a cat", negative_prompt="", seed=7, sampling=FAST)
    assert empty.tobytes() == drawings[0].tobytes()


def test_several_drawings_have_seeds_of_their_own(four: Compositor) -> None:
    steps: list[tuple[int, int]] = []
    both = four.draw("a cat", seed=7, num_images=2, sampling=FAST, on_step=lambda *step: steps.append(step))
    assert steps[-1] == (4, 4)
    alone = np.asarray(four.draw("a cat", seed=8, sampling=FAST))
    assert np.abs(np.asarray(both[1]).astype(int) - alone).max() <= 1


def test_a_drawing_is_a_composite_into_a_blank_scene(compositor: Compositor) -> None:
    """Whatever its colour, and in every mode: no scene is left to keep."""
    expected = np.asarray(compositor.draw("a cat", seed=7, sampling=FAST))
    for scene, mode in ((picture(64, 64), "crop"), (np.zeros((64, 64, 3), np.uint8), "keep_background")):
        whole = Placement(prompt="a cat", box=(0, 0, 64, 64), mode=mode)
        np.testing.assert_array_equal(drawn(compositor, whole, scene), expected)


def test_objects_are_drawn_into_a_drawing(four: Compositor) -> None:
    placements = [Placement(prompt="the castle"), Placement(prompt="a cat", box=(20, 20, 40, 40))]
    (both,) = four.run(Request(Blank(), placements, 7, FAST))
    first = np.asarray(four.draw("the castle", seed=7, sampling=FAST))
    changed = (both.image != first).any(axis=-1)
    assert changed[22:38, 22:38].mean() > 0.9
    assert not changed[:10].any()
    assert both.regions[0] == (0, 0, 64, 64)


def test_other_sizes_are_refused_by_name(four: Compositor) -> None:
    assert four.draw("a cat", size=(64, 64), sampling=FAST).size == (64, 64)
    with pytest.raises(
        InputError, match="64 x 64 pixels and not of 96 x 64: build one with --resolution 96x64"
    ):
        four.draw("a cat", size=(96, 64))


def test_a_bundle_of_another_aspect_ratio_draws_and_places() -> None:
    wide = Compositor.load(tiny_stable_diffusion_bundle(4, version="1.x", resolution=(32, 48)), CPU)
    assert wide.draw("a cat", seed=7, sampling=FAST).size == (48, 32)
    result = drawn(wide, Placement(prompt="a cat", box=(30, 30, 60, 50)), picture(90, 120))
    changed = (result != picture(90, 120)).any(axis=-1)
    assert changed[32:48, 32:58].mean() > 0.9
    assert not changed[:20].any()


# --- into a scene -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [None, "shape", "crop"])
def test_the_place_is_drawn_and_all_else_is_the_scene(compositor: Compositor, mode: str | None) -> None:
    (result,) = compositor.run(Request(SCENE, [replace(CUP, mode=mode)], 7, FAST))
    changed = (result.image != SCENE).any(axis=-1)
    assert changed[22:68, 32:78].mean() > 0.9
    changed[result.regions[0].slices] = False
    assert not changed.any()


def test_a_mask_is_drawn_as_it_is_given(compositor: Compositor) -> None:
    mask = np.zeros(SCENE.shape[:2], bool)
    mask[20:40, 30:80] = mask[20:70, 30:45] = True
    result = drawn(compositor, Placement(prompt="a cat", mask=mask, mode="shape"))
    changed = (result != SCENE).any(axis=-1)
    assert changed[mask].mean() > 0.9
    assert not changed[55:, 62:].any()


def test_a_mask_is_made_coarser_if_that_is_asked_for(four: Compositor) -> None:
    mask = np.zeros(SCENE.shape[:2], bool)
    mask[20:40, 30:80] = mask[20:70, 30:45] = True
    placements = [Placement(prompt="a cat", mask=mask, mask_level=level) for level in ("exact", 1, "box")]
    exact, outline, box = (placed.scene.mask for placed in four.accept(Request(SCENE, placements)).placements)
    assert exact.sum() < outline.sum() < box.sum()
    assert (exact <= outline).all()
    assert (outline <= box).all()


def test_what_is_around_the_place_counts(compositor: Compositor) -> None:
    """With 4 channels because the step blends with it, with 9 because the network sees it, too."""
    other = SCENE.copy()
    other[20:70, 84:92] = 255 - other[20:70, 84:92]
    place = np.s_[20:70, 30:80]
    assert (drawn(compositor, CUP)[place] != drawn(compositor, CUP, other)[place]).any()


def test_what_is_drawn_over_does_not_count() -> None:
    nine = Compositor.load(tiny_stable_diffusion_bundle(9), CPU)
    other = SCENE.copy()
    other[20:70, 30:80] = 255 - other[20:70, 30:80]
    crop = replace(CUP, mode="crop")
    np.testing.assert_array_equal(drawn(nine, crop), drawn(nine, crop, other))


def test_previews_show_the_scene_around(four: Compositor) -> None:
    job = four.accept(Request(SCENE, [CUP], 7, FAST))
    preview = job.images[0].overlay()(picture(64, 64))
    np.testing.assert_array_equal(preview[:5], SCENE[:5])
    assert (preview[40:50, 50:60] != SCENE[40:50, 50:60]).any()


# --- work that is not done twice --------------------------------------------------------------------------


def test_prompts_and_scenes_are_encoded_once(compositor: Compositor) -> None:
    compositor.clear()
    assert compositor.system.kept_bytes() == 0
    compositor.engine.observer = counter = RunCounter()
    looks = 2 if compositor.bundle.manifest.architecture["scene_channels"] else 1
    for seed in (7, 8):
        drawn(compositor, replace(CUP, negative_prompt="the castle"), seed=seed)
        assert (counter.runs[TEXT_ENCODER], counter.runs[ENCODE]) == (2, looks)
    compositor.draw("a cat", sampling=Sampling(steps=1, guidance_scale=1.0))
    assert (counter.runs[TEXT_ENCODER], counter.runs[ENCODE]) == (2, looks + (looks == 2))
    assert compositor.system.kept_bytes() > 0
    compositor.engine.observer = None


# --- what is refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("placement", "field", "sentence"),
    [
        (PLACEMENT, "reference", "Stable Diffusion draws what a prompt says and takes no reference"),
        (Placement(cutout(), prompt="a cat", box=(1, 2, 30, 40)), "reference", "takes no reference"),
        (
            Placement(reference_mask=cutout(), prompt="a", box=(1, 2, 30, 40)),
            "reference_mask",
            "no reference mask",
        ),
        (Placement(box=(1, 2, 30, 40)), "prompt", "Stable Diffusion draws what a prompt says: give a prompt"),
        (replace(CUP, prompt=7), "prompt", "a prompt is text, not 7"),
        (replace(CUP, prompt="a \ud83d cat"), "prompt", r"character 3 is U\+D83D, half of a surrogate pair"),
        (
            replace(CUP, prompt="cat " * 76),
            "prompt",
            "longer than the 75 tokens.*it would end after 'cat cat",
        ),
        (replace(CUP, negative_prompt="cat " * 76), "negative_prompt", "longer than the 75 tokens"),
        (replace(CUP, reference_ratio=1.2), "ratios.reference", "Stable Diffusion has no reference_ratio"),
        (replace(CUP, crop_ratio=0.5), "ratios.crop", "the crop ratio is 0.5; expected 1 to 100"),
        (replace(CUP, mode="box"), "mode", "there is no mode 'box'"),
        (replace(CUP, box=None), "target", "needs either a box or a mask"),
    ],
)
def test_placements_that_it_cannot_use(
    four: Compositor, placement: Placement, field: str, sentence: str
) -> None:
    with pytest.raises(InputError, match=sentence) as caught:
        four.accept(Request(SCENE, [CUP, placement], 7))
    assert caught.value.field == f"placements[1].{field}"


@pytest.mark.parametrize(
    ("sampling", "field", "sentence"),
    [
        (Sampling(control_scale=0.5), "control_scale", "Stable Diffusion has no control_scale: leave it out"),
        (Sampling(map_steps=5), "map_steps", "Stable Diffusion has no map_steps: leave it out"),
        (Sampling("fast"), "quality", "the quality 'fast' is not offered for Stable Diffusion"),
        (Sampling("fast"), "quality", "choose exact or balanced, or set steps and sampler"),
        (Sampling("superb"), "quality", "there is no quality 'superb'"),
    ],
)
def test_sampling_that_it_cannot_use(four: Compositor, sampling: Sampling, field: str, sentence: str) -> None:
    """Before anything is decoded."""
    for request in (Request(b"no picture", [CUP], 7, sampling), Request.drawing("a cat", sampling=sampling)):
        with pytest.raises(InputError, match=sentence) as caught:
            four.steps_of(request)
        assert caught.value.field == f"sampling.{field}"


def test_values_that_change_nothing_are_taken(four: Compositor) -> None:
    """Those that ask for what it does anyway, as a client sends that knows one set of parameters."""
    placement = replace(
        CUP, strength=1, refine=0, edge="soft", reference_ratio=1, mask_level="exact", views=[]
    )
    sampling = Sampling("exact", steps=1, control_scale=1.0)
    asked = four.composite(SCENE, placement, seed=7, sampling=sampling)
    assert asked == four.composite(SCENE, CUP, seed=7, sampling=Sampling(steps=1))


def test_the_preset_that_was_measured_is_offered(four: Compositor) -> None:
    assert four.steps_of(Request.drawing("a cat", sampling=Sampling("balanced"))) == (20, 0)


def test_what_it_was_not_measured_with_can_still_be_set(four: Compositor) -> None:
    sampling = Sampling("exact", steps=3, sampler="dpm_solver_2m")
    assert four.draw("a cat", seed=7, sampling=sampling).size == (64, 64)


@pytest.mark.parametrize("prompt", ["cat " * 76, "\udc00"])
def test_fields_of_a_drawing_are_those_of_the_request(four: Compositor, prompt: str) -> None:
    for prompts, field in (((prompt, None), "prompt"), (("a cat", prompt), "negative_prompt")):
        with pytest.raises(InputError) as caught:
            four.accept(Request.drawing(*prompts))
        assert caught.value.field == field


def test_anydoor_takes_no_prompt(anydoor: Compositor) -> None:
    for name in ("prompt", "negative_prompt"):
        with pytest.raises(InputError, match="AnyDoor places what a reference shows and takes no") as caught:
            anydoor.accept(Request(SCENE, [replace(PLACEMENT, **{name: "a cat"})], 7))
        assert caught.value.field == f"placements[0].{name}"
    with pytest.raises(InputError, match="AnyDoor places what a reference shows: give a reference"):
        anydoor.accept(Request(SCENE, [Placement(box=(1, 2, 30, 40))], 7))
    with pytest.raises(InputError, match="AnyDoor puts objects from pictures into scenes") as caught:
        anydoor.draw("a cat")
    assert caught.value.field == "prompt"


@pytest.mark.parametrize("graph", [TEXT_ENCODER, ENCODE])
def test_a_graph_that_it_needs_is_missing(graph: str) -> None:
    bundle = Bundle.open(tiny_stable_diffusion_bundle(4))
    graphs = {name: record for name, record in bundle.manifest.graphs.items() if name != graph}
    changed = Bundle(bundle.path, replace(bundle.manifest, graphs=graphs))
    with pytest.raises(BundleError, match=f"has no graph '{graph}'"):
        Compositor(changed, open_engine(bundle, CPU))


def test_a_bundle_without_a_tokenizer() -> None:
    bundle = Bundle.open(tiny_stable_diffusion_bundle(4))
    changed = Bundle(bundle.path, replace(bundle.manifest, tokenizer=None))
    with pytest.raises(BundleError, match="has no tokenizer"):
        Compositor(changed, open_engine(bundle, CPU))


def test_its_defaults_are_those_of_diffusers(four: Compositor) -> None:
    ((_, only),) = four.accept(Request.drawing("a cat", seed=7)).passes
    assert (only.schedule.steps, only.sampling.guidance_scale) == (DEFAULTS["steps"], 7.5)
    assert only.sampling.control_scale is None
    assert isinstance(four.draw("a cat", sampling=FAST), Image.Image)
