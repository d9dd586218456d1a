"""Objects from references, drawn inside a mask: levels, holes, what is remembered, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engines.bundle import Bundle
from engines.engine import open_engine
from engines.errors import BundleError
from runtime import Compositor, EngineOptions, InputError, Placement, Request, Sampling
from runtime.imaging.mask_levels import MASK_LEVELS
from runtime.systems.imprint import DEFAULTS, ID_ENCODER
from runtime.systems.inpainting import ENCODE
from tests.support.imprint import object_stitch_compositor, tiny_imprint_bundle
from tests.support.observers import RunCounter
from tests.support.pictures import PLACEMENT, SCENE, Pixels, cutout, picture

CPU = EngineOptions("onnxruntime", "cpu")
FAST = Sampling(steps=2)
HOLE = Placement(box=(30, 20, 80, 70))


def ring() -> Any:
    """A mask that is no box: an ellipse with a hole."""
    y, x = np.mgrid[: SCENE.shape[0], : SCENE.shape[1]]
    radius = np.hypot((y - 45) / 25, (x - 55) / 30)
    return (radius < 1) & (radius > 0.4)


MASKED = Placement(cutout(), mask=ring())


@pytest.fixture(scope="module")
def imprint() -> Compositor:
    return Compositor.load(tiny_imprint_bundle(), CPU)


@pytest.fixture(scope="module", params=["IMPRINT", "ObjectStitch"])
def compositor(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Compositor:
    """With DINOv2; and with CLIP from a file in the layout of ObjectStitch's public code, not square."""
    if request.param == "IMPRINT":
        return Compositor.load(tiny_imprint_bundle(), CPU)
    return object_stitch_compositor(tmp_path_factory.mktemp("object-stitch"))


def drawn(
    compositor: Compositor,
    placement: Placement = PLACEMENT,
    scene: Any = SCENE,
    seed: int = 7,
    sampling: Sampling = FAST,
) -> Pixels:
    return compositor.run(Request(scene, [placement], seed, sampling))[0].image


# --- composites -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [None, "shape", "crop"])
def test_the_place_is_drawn_and_all_else_is_the_scene(compositor: Compositor, mode: str | None) -> None:
    (result,) = compositor.run(Request(SCENE, [replace(PLACEMENT, mode=mode)], 7, FAST))
    changed = (result.image != SCENE).any(axis=-1)
    assert changed[22:68, 32:78].mean() > 0.9
    changed[result.regions[0].slices] = False
    assert not changed.any()


def test_a_picture_follows_its_seed_and_its_reference(compositor: Compositor) -> None:
    first = drawn(compositor)
    np.testing.assert_array_equal(first, drawn(compositor))
    assert (first != drawn(compositor, seed=8)).any()
    assert (first != drawn(compositor, replace(PLACEMENT, reference=cutout(seed=5)))).any()


def test_what_is_around_the_place_counts_and_what_is_drawn_over_does_not(imprint: Compositor) -> None:
    around, under = SCENE.copy(), SCENE.copy()
    around[20:70, 84:92] = 255 - around[20:70, 84:92]
    under[20:70, 30:80] = 255 - under[20:70, 30:80]
    place, crop = np.s_[22:68, 32:78], replace(PLACEMENT, mode="crop")
    assert (drawn(imprint)[place] != drawn(imprint, scene=around)[place]).any()
    np.testing.assert_array_equal(drawn(imprint, crop), drawn(imprint, crop, under))


def test_objects_are_placed_one_after_the_other(imprint: Compositor) -> None:
    second = replace(PLACEMENT, reference=cutout(seed=5), box=(60, 40, 110, 85))
    (both,) = imprint.run(Request(SCENE, [PLACEMENT, second], 7, FAST))
    alone = drawn(imprint)
    changed = (both.image != alone).any(axis=-1)
    assert changed[45:80, 65:105].mean() > 0.9
    assert not changed[:30, :50].any()


def test_previews_show_the_scene_around(imprint: Compositor) -> None:
    job = imprint.accept(Request(SCENE, [PLACEMENT], 7, FAST))
    preview = job.images[0].overlay()(picture(64, 64))
    np.testing.assert_array_equal(preview[:5], SCENE[:5])
    assert (preview[40:50, 50:60] != SCENE[40:50, 50:60]).any()


# --- mask levels ------------------------------------------------------------------------------------------


def test_a_coarser_mask_draws_all_that_a_finer_one_draws(imprint: Compositor) -> None:
    masks = []
    for number, level in enumerate(MASK_LEVELS):
        job = imprint.accept(Request(SCENE, [replace(MASKED, mask_level=level)], 7, FAST))
        again = imprint.accept(Request(SCENE, [replace(MASKED, mask_level=number)], 7, FAST))
        (placed,), (same,) = job.placements, again.placements
        np.testing.assert_array_equal(placed.scene.mask, same.scene.mask)
        masks.append(placed.scene)
    for finer, coarser in pairwise(masks):
        for name in ("mask", "blend", "paste"):
            assert (getattr(finer, name) <= getattr(coarser, name)).all()
        assert finer.mask.sum() < coarser.mask.sum()


def test_a_mask_is_drawn_as_it_is_unless_a_level_is_asked_for(imprint: Compositor) -> None:
    exact = replace(MASKED, mask_level="exact")
    np.testing.assert_array_equal(drawn(imprint, MASKED), drawn(imprint, exact))
    assert (drawn(imprint, MASKED) != drawn(imprint, replace(MASKED, mask_level="box"))).any()


def test_the_coarsest_level_is_the_box_of_the_mask(imprint: Compositor) -> None:
    mask = ring()
    ys, xs = np.nonzero(mask)
    box = (int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1)
    coarsest = drawn(imprint, replace(MASKED, mask_level="box", mode="crop"))
    boxed = Placement(cutout(), box=box, mode="crop")
    np.testing.assert_array_equal(coarsest, drawn(imprint, boxed))
    np.testing.assert_array_equal(coarsest, drawn(imprint, replace(boxed, mask_level=3)))


# --- holes ------------------------------------------------------------------------------------------------


def test_a_hole_is_filled_without_a_reference(compositor: Compositor) -> None:
    filled = drawn(compositor, HOLE)
    changed = (filled != SCENE).any(axis=-1)
    assert changed[22:68, 32:78].mean() > 0.9
    assert (filled != drawn(compositor)).any()


def test_guidance_makes_no_difference_to_a_hole_and_costs_nothing(imprint: Compositor) -> None:
    imprint.engine.observer = counter = RunCounter()
    plain, guided = (
        drawn(imprint, HOLE, sampling=Sampling(steps=1, guidance_scale=scale)) for scale in (1.0, 9.0)
    )
    np.testing.assert_array_equal(plain, guided)
    drawn(imprint, sampling=Sampling(steps=1))
    assert counter.rows["denoise"] == [1, 1, 2]
    imprint.engine.observer = None


# --- work that is not done twice --------------------------------------------------------------------------


def test_references_and_scenes_are_encoded_once(compositor: Compositor) -> None:
    compositor.clear()
    assert compositor.system.kept_bytes() == 0
    compositor.engine.observer = counter = RunCounter()
    for seed in (7, 8):
        drawn(compositor, seed=seed)
        assert (counter.runs[ID_ENCODER], counter.runs[ENCODE]) == (1, 2)
    drawn(compositor, replace(PLACEMENT, box=(20, 20, 70, 70)))
    assert (counter.runs[ID_ENCODER], counter.runs[ENCODE]) == (1, 4)
    assert compositor.system.kept_bytes() > 0
    compositor.engine.observer = None


def test_object_stitch_sees_the_object_on_black_without_a_margin(tmp_path: Path) -> None:
    """As its public code trains it; all others see it on white, with room around it."""
    picture = np.full((90, 90, 3), 128, np.uint8)
    inside = np.zeros((90, 90), bool)
    inside[20:70, 30:60] = True
    placement = replace(PLACEMENT, reference=picture, reference_mask=inside)
    job = object_stitch_compositor(tmp_path).accept(Request(SCENE, [placement], 7))
    (reference,) = job.placements[0].what
    grey = reference.max(axis=2)
    assert set(np.unique(grey[:, [0, -1]])) == {0}  # narrower than high
    assert (grey[[0, -1], grey.shape[1] // 2] > 100).all()


@pytest.mark.parametrize("background", ["grey", ["white"]])
def test_a_background_that_is_unknown_is_refused(imprint: Compositor, background: Any) -> None:
    bundle = imprint.bundle
    changed = {**bundle.manifest.architecture, "reference_background": background}
    other = replace(bundle, manifest=replace(bundle.manifest, architecture=changed))
    with pytest.raises(BundleError, match="white and black are known"):
        Compositor(other, imprint.engine)


# --- what is refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("placement", "field", "sentence"),
    [
        (replace(PLACEMENT, prompt="a cup"), "prompt", "IMPRINT places what a reference shows and takes no"),
        (
            replace(PLACEMENT, negative_prompt="a"),
            "negative_prompt",
            "takes no negative prompt: leave it out",
        ),
        (replace(HOLE, reference_mask=cutout()), "reference_mask", "mask needs a reference"),
        (
            replace(MASKED, mask_level="rough"),
            "mask_level",
            r"no mask level 'rough': choose one of 0 \(exact\)",
        ),
        (replace(MASKED, mask_level=4), "mask_level", r"no mask level 4: .* 3 \(box\)"),
        (replace(MASKED, mask_level=True), "mask_level", "no mask level True"),
        (
            replace(PLACEMENT, mask_level="blob"),
            "mask_level",
            "level blob is for masks, but a box is",
        ),
        (replace(PLACEMENT, strength=0.9), "strength", "IMPRINT has no strength: leave it out"),
        (replace(PLACEMENT, strength=True), "strength", "IMPRINT has no strength: leave it out"),
        (replace(PLACEMENT, refine=200), "refine", "IMPRINT has no refine: leave it out"),
        (replace(PLACEMENT, edge="hard"), "edge", "IMPRINT has no edge: leave it out"),
        (replace(PLACEMENT, crop_ratio=0.5), "ratios.crop", "the crop ratio is 0.5; expected 1 to 100"),
        (replace(PLACEMENT, mode="box"), "mode", "there is no mode 'box'"),
        (replace(PLACEMENT, box=None), "target", "needs either a box or a mask"),
    ],
)
def test_placements_that_it_cannot_use(
    imprint: Compositor, placement: Placement, field: str, sentence: str
) -> None:
    with pytest.raises(InputError, match=sentence) as caught:
        imprint.accept(Request(SCENE, [PLACEMENT, placement], 7))
    assert caught.value.field == f"placements[1].{field}"


@pytest.mark.parametrize(
    ("sampling", "field", "sentence"),
    [
        (Sampling(control_scale=0.0), "control_scale", "IMPRINT has no control_scale: leave it out"),
        (Sampling(map_steps=5), "map_steps", "IMPRINT has no map_steps: leave it out"),
        (
            Sampling("fast"),
            "quality",
            "the quality 'fast' is not offered for IMPRINT: choose exact or balanced",
        ),
    ],
)
def test_sampling_that_it_cannot_use(
    imprint: Compositor, sampling: Sampling, field: str, sentence: str
) -> None:
    """Before anything is decoded."""
    with pytest.raises(InputError, match=sentence) as caught:
        imprint.steps_of(Request(b"no picture", [PLACEMENT], 7, sampling))
    assert caught.value.field == f"sampling.{field}"


def test_values_that_change_nothing_are_taken(imprint: Compositor) -> None:
    neutral = {"strength": 1.0, "refine": 0, "edge": "soft", "prompt": "", "negative_prompt": ""}
    for level in ("exact", 0, "box"):
        asked = replace(PLACEMENT, **neutral, mask_level=level)
        one = imprint.composite(SCENE, asked, seed=7, sampling=Sampling(steps=1, control_scale=1))
        assert one == imprint.composite(SCENE, PLACEMENT, seed=7, sampling=Sampling(steps=1))


def test_it_draws_nothing_from_a_prompt(imprint: Compositor) -> None:
    with pytest.raises(InputError, match="IMPRINT puts objects from pictures into scenes"):
        imprint.draw("a cup")


def test_anydoor_has_no_mask_level_and_fills_no_holes(tiny_bundle: Path) -> None:
    anydoor = Compositor.load(tiny_bundle, CPU)
    for placement, field, sentence in (
        (replace(PLACEMENT, mask_level="box"), "mask_level", "AnyDoor has no mask_level: leave it out"),
        (HOLE, "reference", "AnyDoor places what a reference shows: give a reference"),
    ):
        with pytest.raises(InputError, match=sentence) as caught:
            anydoor.accept(Request(SCENE, [placement], 7))
        assert caught.value.field == f"placements[0].{field}"
    for level in ("exact", 0):
        assert anydoor.accept(Request(SCENE, [replace(PLACEMENT, mask_level=level, prompt="")], 7))


def test_what_is_left_open_is_the_system_s(imprint: Compositor) -> None:
    assert imprint.defaults == DEFAULTS
    assert imprint.defaults["guidance_scale"] == 3.0


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            lambda m: replace(m, graphs={k: v for k, v in m.graphs.items() if k != ENCODE}),
            "no graph 'encode'",
        ),
        (lambda m: replace(m, graphs={k: v for k, v in m.graphs.items() if k != ID_ENCODER}), "'id_encoder'"),
    ],
)
def test_bundles_that_lack_something(change: Callable[[Any], Any], sentence: str) -> None:
    bundle = Bundle.open(tiny_imprint_bundle())
    changed = Bundle(bundle.path, change(bundle.manifest))
    with pytest.raises(BundleError, match=sentence):
        Compositor(changed, open_engine(changed, CPU))
