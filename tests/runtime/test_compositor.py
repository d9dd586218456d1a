"""The Compositor: pictures go in, a picture comes out, the same one for the same seed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from engines.backends.onnxruntime.engine import OnnxRuntimeEngine
from engines.bundle import Bundle
from engines.engine import open_engine
from engines.options import EngineOptions
from runtime import Composite, Compositor, InputError, Placement, Request, Sampling
from runtime.cache_size import default_cache_bytes
from runtime.imaging.modes import MODES
from runtime.imaging.paste_back import EDGES
from tests.support.anydoor import CONTROL, DENOISE, ID_ENCODER
from tests.support.observers import RunCounter
from tests.support.pictures import PLACEMENT, SCENE, Pixels, cutout, picture

FAST = Sampling(steps=2)
CPU = EngineOptions(backend="onnxruntime", device="cpu")


@pytest.fixture(scope="module")
def compositor(tiny_bundle: Path) -> Compositor:
    return Compositor.load(tiny_bundle, CPU)


@pytest.fixture
def counter(compositor: Compositor) -> RunCounter:
    compositor.engine.observer = counter = RunCounter()
    return counter


def pixels(image: Image.Image) -> Pixels:
    return np.asarray(image)


def request(
    placements: Placement | list[Placement] = PLACEMENT, sampling: Sampling = FAST, **others: object
) -> Request:
    return Request.of(SCENE, placements, sampling=sampling, **others)  # type: ignore[arg-type]


# --- seeds ------------------------------------------------------------------------------------------------


def test_same_seed_same_picture_bit_for_bit(compositor: Compositor) -> None:
    first, second = (compositor.composite(SCENE, PLACEMENT, seed=7, sampling=FAST) for _ in range(2))
    np.testing.assert_array_equal(pixels(first), pixels(second))


def test_other_seed_other_picture(compositor: Compositor) -> None:
    first, second = (compositor.composite(SCENE, PLACEMENT, seed=s, sampling=FAST) for s in (7, 8))
    assert (pixels(first) != pixels(second)).any()


def test_a_cpu_takes_large_samples_one_after_the_other(
    compositor: Compositor, counter: RunCounter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that they are equal to samples alone; small ones share their calls."""

    def calls_for_three() -> tuple[int, list[Pixels]]:
        counter.clear()
        drawn = compositor.composite(SCENE, PLACEMENT, seed=7, sampling=FAST, num_images=3)
        return counter.runs[DENOISE], [pixels(image) for image in drawn]

    shared, _ = calls_for_three()
    _, height, width = compositor.bundle.manifest.latent_shape
    monkeypatch.setattr("runtime.drawing._FILLS_A_CPU", height * width)
    apart, images = calls_for_three()
    assert (shared, apart) == (FAST.steps, 3 * FAST.steps)
    for i, image in enumerate(images):
        alone = compositor.composite(SCENE, PLACEMENT, seed=7 + i, sampling=FAST)
        np.testing.assert_array_equal(image, pixels(alone))


def test_picture_i_of_several_has_seed_plus_i(compositor: Compositor) -> None:
    """Samples that share a batch agree with samples alone up to the last level of rounding."""
    together = compositor.composite(SCENE, PLACEMENT, seed=7, sampling=FAST, num_images=3)
    for i, image in enumerate(together):
        alone = compositor.composite(SCENE, PLACEMENT, seed=7 + i, sampling=FAST)
        assert np.abs(pixels(image).astype(int) - pixels(alone)).max() <= 1


def test_more_pictures_than_fit_into_a_batch(compositor: Compositor) -> None:
    count = compositor.bundle.manifest.max_batch + 1
    results = compositor.run(request(seed=5, num_images=count))
    assert [result.seed for result in results] == list(range(5, 5 + count))
    assert len({result.image.tobytes() for result in results}) == count


def test_steps_are_counted_before_anything_is_decoded(compositor: Compositor) -> None:
    """Of three pictures with two objects each; timesteps below 300 have no guidance."""
    sampling = Sampling(timesteps=(101, 501, 701, 901), guidance_interval=(300, 999))
    broken = Placement(b"no picture", box=(0, 0, 9, 9))
    assert compositor.steps_of(Request(b"", [broken, broken], 7, sampling, 3)) == (18, 6)


def test_noise_of_eta_comes_from_the_seed(compositor: Compositor) -> None:
    noisy = Sampling(steps=3, eta=1.0)
    first, second = (compositor.composite(SCENE, PLACEMENT, seed=7, sampling=noisy) for _ in range(2))
    plain = compositor.composite(SCENE, PLACEMENT, seed=7, sampling=Sampling(steps=3))
    np.testing.assert_array_equal(pixels(first), pixels(second))
    assert (pixels(first) != pixels(plain)).any()


def test_initial_noise_replaces_the_seeds(compositor: Compositor) -> None:
    noise = np.random.default_rng(0).standard_normal((1, 4, 8, 8), dtype=np.float32)
    first, second = (
        compositor.composite(SCENE, PLACEMENT, seed=s, sampling=FAST, initial_noise=noise) for s in (1, 2)
    )
    np.testing.assert_array_equal(pixels(first), pixels(second))


# --- work that is not done twice --------------------------------------------------------------------------


def test_reroll_runs_neither_id_encoder_nor_control_net(compositor: Compositor, counter: RunCounter) -> None:
    compositor.composite(SCENE, PLACEMENT, seed=1, sampling=FAST)
    counter.clear()
    compositor.composite(
        SCENE, PLACEMENT, seed=2, sampling=Sampling(steps=2, guidance_scale=3.0, control_scale=0.5)
    )
    assert counter.runs[ID_ENCODER] == 0
    assert counter.runs[CONTROL] == 0
    assert counter.runs[DENOISE] == 2


def test_samples_of_one_placement_share_their_detail_maps(
    compositor: Compositor, counter: RunCounter
) -> None:
    compositor.clear()
    compositor.composite(SCENE, PLACEMENT, sampling=FAST, num_images=3)
    assert counter.runs[CONTROL] == FAST.steps


def test_what_is_kept_is_counted_and_can_be_dropped(compositor: Compositor, counter: RunCounter) -> None:
    compositor.clear()
    assert compositor.system.kept_bytes() == 0
    compositor.composite(SCENE, PLACEMENT, seed=1, sampling=FAST)
    maps = compositor.bundle.manifest.specs[CONTROL].outputs
    one_step = sum(tensor.nbytes({"maps": 2}) for tensor in maps)
    assert compositor.system.kept_bytes() == FAST.steps * one_step
    compositor.clear()
    compositor.composite(SCENE, PLACEMENT, seed=1, sampling=FAST)
    assert counter.runs[ID_ENCODER] == 2
    assert counter.runs[CONTROL] == 2 * FAST.steps


def test_control_scale_zero_is_blind_to_the_scene(compositor: Compositor) -> None:
    """With no detail maps only the ID tokens count: two scenes give the same picture inside the crop."""
    blind = Sampling(steps=2, control_scale=0.0)
    whole = Placement(cutout(), box=(0, 0, 64, 64))
    images = [compositor.composite(picture(64, 64, seed), whole, seed=3, sampling=blind) for seed in (10, 11)]
    inner = [pixels(image)[8:-8, 8:-8] for image in images]
    np.testing.assert_array_equal(*inner)


# --- steps that nobody watches ----------------------------------------------------------------------------


class LoopCountingEngine(OnnxRuntimeEngine):
    """A real engine that notes how many steps each loop has, and what it feeds back."""

    def __init__(self, bundle: Bundle) -> None:
        super().__init__(bundle)
        self.loops: list[tuple[int, set[str]]] = []

    def run_steps(self, graph, inputs, per_step, feedback, outputs=None):  # type: ignore[no-untyped-def]
        self.loops.append((len(per_step["timestep"]), set(feedback)))
        return super().run_steps(graph, inputs, per_step, feedback, outputs)


LATENT = {"latent"}
PLAIN = Sampling(steps=5)
LAST_WITHOUT_GUIDANCE = Sampling(steps=5, guidance_interval=(300, 999))  # timesteps 801, 601, 401, 201, 1


@pytest.mark.parametrize(
    ("sampling", "window", "loops"),
    [
        (PLAIN, 1, []),
        (PLAIN, 3, [(3, LATENT), (2, LATENT)]),
        (PLAIN, 4, [(4, LATENT)]),
        (replace(PLAIN, map_steps=1), 1, [(5, LATENT)]),
        (replace(PLAIN, map_steps=2), 1, [(3, LATENT), (2, LATENT)]),
        (replace(PLAIN, map_steps=1, sampler="dpm_solver_2m"), 1, [(5, {"latent", "carry"})]),
        (replace(LAST_WITHOUT_GUIDANCE, map_steps=1), 1, [(3, LATENT), (2, LATENT)]),
        (replace(LAST_WITHOUT_GUIDANCE, map_steps=1, sampler="dpm_solver_2m"), 2, [(4, {"latent", "carry"})]),
        (replace(PLAIN, map_steps=1, eta=0.5), 1, []),
    ],
)
def test_steps_that_nobody_watches_are_taken_at_once(
    tiny_bundle: Path, sampling: Sampling, window: int, loops: list[tuple[int, set[str]]]
) -> None:
    """As far as their detail maps are ready and they have the same rows; the pictures stay the same."""
    bundle = Bundle.open(tiny_bundle)
    engine = LoopCountingEngine(bundle)
    compositor = Compositor(bundle, engine, control_window=window)
    asked = request(seed=7, sampling=sampling, num_images=2)
    watched = compositor.run(asked, on_step=lambda done, total: None)
    assert engine.loops == []
    unwatched = compositor.run(asked)
    assert engine.loops == loops
    for result, expected in zip(unwatched, watched):
        np.testing.assert_array_equal(result.image, expected.image)


def test_samples_with_detail_maps_of_their_own_go_step_by_step(tiny_bundle: Path) -> None:
    """The second object meets another scene in every picture."""
    bundle = Bundle.open(tiny_bundle)
    engine = LoopCountingEngine(bundle)
    sampling = Sampling(steps=2, map_steps=1)
    placements = [PLACEMENT, Placement(cutout(seed=2), box=(20, 10, 60, 60))]
    Compositor(bundle, engine).run(request(placements, sampling, seed=7, num_images=2))
    assert engine.loops == [(2, LATENT)]


# --- results ----------------------------------------------------------------------------------------------


def outside(result: Composite) -> NDArray[np.bool_]:
    mask = np.ones(result.image.shape[:2], bool)
    for region in result.regions:
        mask[region.slices] = False
    return mask


def test_result_tells_seed_region_and_times(compositor: Compositor) -> None:
    (result,) = compositor.run(request(seed=7))
    assert result.seed == 7
    assert {"prepare", "sample", "decode", "paste"} <= result.seconds.keys()
    np.testing.assert_array_equal(result.image[outside(result)], SCENE[outside(result)])
    assert (result.image[~outside(result)] != SCENE[~outside(result)]).any()


@pytest.mark.parametrize("mode", list(MODES))
def test_a_soft_edge_changes_only_the_region_that_it_tells(compositor: Compositor, mode: str) -> None:
    asked = [replace(PLACEMENT, mode=mode, edge=edge) for edge in EDGES]
    hard, soft = (compositor.run(request(each, seed=7))[0] for each in asked)
    assert (hard.image != soft.image).any()
    assert not (soft.image != SCENE)[outside(soft)].any()


def test_progress_counts_all_steps_of_all_placements(compositor: Compositor) -> None:
    seen: list[tuple[int, int]] = []
    placements = [PLACEMENT, Placement(cutout(seed=2), box=(0, 0, 20, 20))]
    compositor.run(request(placements, num_images=2), lambda done, total: seen.append((done, total)))
    done = [step for step, _ in seen]
    assert done == sorted(set(done))
    assert {total for _, total in seen} == {done[-1]}


def test_second_object_is_placed_into_the_picture_of_the_first(compositor: Compositor) -> None:
    second = Placement(cutout(seed=2), box=(85, 60, 115, 85), mode="keep_background")
    (both,) = compositor.run(request([PLACEMENT, second], seed=7))
    (first,) = compositor.run(request(seed=7))
    region = both.regions[1]
    assert (both.image[region.slices] != first.image[region.slices]).any()
    elsewhere = np.ones(SCENE.shape[:2], bool)
    elsewhere[region.slices] = False
    np.testing.assert_array_equal(both.image[elsewhere], first.image[elsewhere])


def test_callers_arrays_are_left_alone(compositor: Compositor) -> None:
    scene, reference = SCENE.copy(), cutout()
    compositor.composite(scene, Placement(reference, box=(30, 20, 80, 70)), sampling=FAST)
    np.testing.assert_array_equal(scene, SCENE)
    np.testing.assert_array_equal(reference, cutout())


@pytest.mark.parametrize("mode", list(MODES))
def test_box_and_its_filled_mask_are_the_same_place(compositor: Compositor, mode: str) -> None:
    mask = np.zeros(SCENE.shape[:2], bool)
    mask[20:70, 30:80] = True
    images = [
        compositor.composite(SCENE, Placement(cutout(), mode=mode, **place), seed=1, sampling=FAST)
        for place in ({"box": (30, 20, 80, 70)}, {"mask": mask})  # type: ignore[arg-type]
    ]
    np.testing.assert_array_equal(pixels(images[0]), pixels(images[1]))


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_scene_box_and_ratio_gives_a_picture_unchanged_outside(
    compositor: Compositor, data: st.DataObject
) -> None:
    height, width = data.draw(st.integers(1, 150)), data.draw(st.integers(1, 150))
    x0, y0 = data.draw(st.integers(-40, width - 1)), data.draw(st.integers(-40, height - 1))
    x1 = data.draw(st.integers(max(x0, 0) + 1, width + 40))
    y1 = data.draw(st.integers(max(y0, 0) + 1, height + 40))
    reference_ratio, box_ratio, crop_ratio = (data.draw(st.floats(1, 4)) for _ in range(3))
    mode = data.draw(st.sampled_from(list(MODES)))
    scene = picture(height, width, seed=height)
    placement = Placement(
        cutout(),
        box=(x0, y0, x1, y1),
        mode=mode,
        reference_ratio=reference_ratio,
        box_ratio=box_ratio,
        crop_ratio=crop_ratio,
    )
    sampling = Sampling(steps=1, guidance_scale=1.0)
    (result,) = compositor.run(Request.of(scene, placement, seed=0, sampling=sampling))
    assert result.image.shape == scene.shape
    np.testing.assert_array_equal(result.image[outside(result)], scene[outside(result)])


# --- refusals ---------------------------------------------------------------------------------------------

MASK = np.ones((40, 40), bool)


@pytest.mark.parametrize(
    ("placement", "sentence"),
    [
        (
            Placement(picture(40, 40), box=(0, 0, 9, 9)),
            "the reference has no transparency.*give a reference mask",
        ),
        (Placement(cutout()), "a placement needs either a box or a mask"),
        (Placement(cutout(), box=(0, 0, 9, 9), mask=MASK), "a placement needs either a box or a mask"),
        (Placement(cutout(), box=(130, 0, 140, 9)), "lies outside the scene of 120 x 90 pixels"),
        (Placement(cutout(), box=(9, 0, 9, 9)), "has no area"),
        (Placement(cutout(), box=(9, 0, 3, 9)), "has no area"),
        (Placement(cutout(), box=(0, 0, 9)), "four whole numbers"),  # type: ignore[arg-type]
        (Placement(cutout(), box=(0, 0, 9, 9.5)), "four whole numbers"),  # type: ignore[arg-type]
        (
            Placement(cutout(), MASK[:20], box=(0, 0, 9, 9)),
            "the reference mask is 40 x 20 and the reference is 40 x 40",
        ),
        (Placement(cutout(), ~MASK, box=(0, 0, 9, 9)), "the reference mask is empty"),
        (Placement(cutout(), mask=MASK), "the scene mask is 40 x 40 and the scene is 120 x 90"),
        (Placement(cutout(), mask=np.zeros((90, 120), bool)), "the scene mask is empty"),
        (Placement(cutout(), box=(0, 0, 9, 9), mode="abacus"), "no mode 'abacus': choose one of crop, shape"),
    ],
)
def test_placements_that_cannot_be_used(compositor: Compositor, placement: Placement, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        compositor.run(request(placement))


@pytest.mark.parametrize(
    ("sampling", "sentence"),
    [
        (Sampling(steps=0), "steps must be a whole number from 1 to 999, not 0"),
        (Sampling(steps=1000), "steps must be"),
        (Sampling(guidance_scale=float("nan")), "guidance_scale must be a number from 0 to 100, not nan"),
        (Sampling(guidance_scale=-1), "guidance_scale must be"),
        (Sampling(control_scale=11), "control_scale must be a number from 0 to 10, not 11"),
        (Sampling(eta=2), "eta must be a number from 0 to 1, not 2"),
    ],
)
def test_sampling_that_cannot_be_used(compositor: Compositor, sampling: Sampling, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        compositor.run(request(sampling=sampling))


def test_other_requests_that_cannot_be_used(compositor: Compositor) -> None:
    with pytest.raises(InputError, match="at least one placement"):
        compositor.run(request([]))
    with pytest.raises(InputError, match="num_images must be a whole number from 1 to 64, not 65"):
        compositor.run(request(num_images=65))
    with pytest.raises(InputError, match="seed must be a whole number from 0"):
        compositor.run(request(seed=-1))
    with pytest.raises(
        InputError, match=r"initial_noise must have the shape \(1, 4, 8, 8\), not \(4, 8, 8\)"
    ):
        compositor.run(request(initial_noise=np.zeros((4, 8, 8), np.float32)))
    with pytest.raises(InputError, match="not finite"):
        compositor.run(request(initial_noise=np.full((1, 4, 8, 8), np.nan)))


def test_no_more_detail_maps_are_kept_than_there_is_room_for(tiny_bundle: Path) -> None:
    bundle = Bundle.open(tiny_bundle)
    engine = open_engine(bundle, CPU)
    default = default_cache_bytes()
    for room, wanted, expected in (
        (10, None, 10),
        (10, 20, 10),
        (10, 5, 5),
        (2 * default, None, default),
        (2 * default, 2 * default, 2 * default),
        (None, None, default),
    ):
        engine.cache_bytes = room
        assert Compositor(bundle, engine, wanted).model.cache_bytes == expected


def test_window_larger_than_the_bundle_allows(tiny_bundle: Path) -> None:
    with pytest.raises(InputError, match="control_window must be from 1 to 4"):
        Compositor.load(tiny_bundle, control_window=5)
