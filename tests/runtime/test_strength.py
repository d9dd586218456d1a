"""Below full strength, sampling starts from the object pasted into its place."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.engine import open_engine
from engines.options import EngineOptions
from runtime import Compositor, InputError, Placement, Request, Sampling
from runtime.client import Client
from runtime.imaging.boxes import Box
from runtime.imaging.geometry import Geometry, Ratios, zoom_in
from runtime.imaging.pasted_object import object_pixels, paste_object, place_of
from runtime.parameters import sampling_parameters
from runtime.sampling.passes import first_pass, partial_pass
from runtime.server.wire import defaults_message
from runtime.systems.anydoor import DEFAULTS
from tests.support.anydoor import DENOISE, without_encoder
from tests.support.observers import RunCounter
from tests.support.pictures import cutout, picture
from tests.support.serving import ServerThread, held_compositor

CPU = EngineOptions(backend="onnxruntime", device="cpu")
SCENE, OBJECT = picture(120, 160), cutout(90)
PLACEMENT = Placement(OBJECT, box=(40, 30, 100, 90), mode="keep_background")
STEPS = Sampling(steps=10)
ALPHAS = np.linspace(0.999, 0.005, 1000, dtype=np.float32)


@pytest.fixture(scope="module")
def compositor(tiny_bundle: Path) -> Compositor:
    return Compositor.load(tiny_bundle, CPU)


def drawn(compositor: Compositor, *placements: Placement) -> np.ndarray:
    return compositor.run(Request(SCENE, list(placements), 7, STEPS))[0].image


# --- the pasted object ------------------------------------------------------------------------------------


def red(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """A red rectangle in a blue picture, and its mask."""
    mask = np.zeros((height + 8, width + 8), bool)
    mask[4:-4, 4:-4] = True
    return np.where(mask[..., None], [255, 0, 0], [0, 0, 255]).astype(np.uint8), mask


@given(
    size=st.tuples(st.integers(4, 60), st.integers(4, 60)),
    x0=st.integers(-30, 150),
    y0=st.integers(-30, 110),
    width=st.integers(4, 80),
    height=st.integers(4, 80),
)
def test_an_object_fits_its_place_and_stands_on_the_lower_edge(
    size: tuple[int, int], x0: int, y0: int, width: int, height: int
) -> None:
    grey = np.full((120, 160, 3), 100, np.uint8)
    place = Box(x0, y0, x0 + width, y0 + height)
    if place.intersection(Box(0, 0, 160, 120)).is_empty:
        return
    geometry = zoom_in(place, (160, 120), Ratios())
    pixels = object_pixels(*red(*size), 64)
    crop = paste_object(grey, geometry, place, pixels)
    whole = grey.copy()
    whole[geometry.crop.slices] = crop
    changed = (whole != 100).any(axis=2)
    outside = np.ones_like(changed)
    outside[place.intersection(Box(0, 0, 160, 120)).slices] = False
    assert not (changed & outside).any()
    assert (whole[..., 2] <= 100).all(), "nothing of the reference's background comes along"
    visible = place.intersection(geometry.crop)
    if visible == place:
        rows, columns = np.flatnonzero(changed.any(axis=1)), np.flatnonzero(changed.any(axis=0))
        assert rows[-1] == place.y1 - 1
        high, wide = rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1
        assert high >= place.height - 1 or wide >= place.width - 1


def test_a_large_object_is_made_smaller_with_its_own_colours() -> None:
    pixels = object_pixels(*red(300, 200), 96)
    assert pixels.shape == (96, 64, 4)
    np.testing.assert_array_equal(pixels[10:-10, 10:-10], np.broadcast_to([255, 0, 0, 255], (76, 44, 4)))


def test_a_small_object_keeps_its_pixels_and_a_thin_one_its_width() -> None:
    """The bounding box is the original's, which leaves out the last row and column."""
    assert object_pixels(*red(20, 10), 96).shape == (19, 9, 4)
    assert object_pixels(*red(1000, 3), 96).shape == (96, 1, 4)


def test_of_an_object_across_the_border_the_rest_is_seen() -> None:
    """Of one that is red on its left and green on its right, the green half; nothing is squeezed."""
    pixels = np.zeros((40, 40, 4), np.uint8)
    pixels[..., 3] = pixels[:, :20, 0] = pixels[:, 20:, 1] = 255
    scene, place = np.full((120, 160, 3), 100, np.uint8), Box(-20, 40, 20, 80)
    crop = paste_object(scene, Geometry(Box(0, 0, 160, 120), place), place, pixels)
    assert (crop[40:80, 1:20] == (0, 255, 0)).all()
    assert (crop[40:80, 20:] == 100).all()


def test_what_is_half_opaque_shows_what_is_under_it() -> None:
    """The colours are multiplied by the opacity already."""
    pixels = np.full((40, 40, 4), (100, 0, 0, 51), np.uint8)
    scene, place = np.full((60, 60, 3), 50, np.uint8), Box(10, 10, 50, 50)
    crop = paste_object(scene, Geometry(Box(0, 0, 60, 60), place), place, pixels)
    assert (crop[10:50, 10:50] == (140, 40, 40)).all()


def test_the_place_of_a_mask_is_the_box_around_it() -> None:
    mask = np.zeros((50, 60), bool)
    mask[10:20, 30:45] = True
    assert place_of(mask) == Box(30, 10, 45, 20)


# --- passes -----------------------------------------------------------------------------------------------


def test_a_strength_takes_its_share_of_the_timesteps() -> None:
    full = first_pass(ALPHAS, sampling_parameters(Sampling(steps=20), DEFAULTS))
    half = partial_pass(ALPHAS, full, 0.5)
    late = full.schedule.timesteps < 500
    np.testing.assert_array_equal(half.schedule.timesteps, full.schedule.timesteps[late])
    assert half.schedule.steps == 10
    assert partial_pass(ALPHAS, full, 1.0) is partial_pass(ALPHAS, full, None) is full


def test_a_strength_without_steps_is_refused() -> None:
    full = first_pass(ALPHAS, sampling_parameters(Sampling(steps=2), DEFAULTS))
    with pytest.raises(InputError, match=r"strength is 0.001, and the last of the 2 steps is at timestep"):
        partial_pass(ALPHAS, full, 0.001)


# --- pictures ---------------------------------------------------------------------------------------------


def test_full_strength_is_what_it_was(compositor: Compositor) -> None:
    np.testing.assert_array_equal(
        drawn(compositor, replace(PLACEMENT, strength=1.0)), drawn(compositor, PLACEMENT)
    )


def test_less_noise_leaves_more_of_the_object(compositor: Compositor) -> None:
    """The weights are noise, so what is not drawn anew is what the autoencoder leaves of the paste."""
    pictures = {of: drawn(compositor, replace(PLACEMENT, strength=of)) for of in (0.2, 0.6, 1.0)}
    again = drawn(compositor, replace(PLACEMENT, strength=0.2))
    np.testing.assert_array_equal(again, pictures[0.2])
    nothing_new = drawn(compositor, replace(PLACEMENT, strength=0.1)).astype(float)
    distances = [np.abs(pictures[of] - nothing_new).mean() for of in (0.2, 0.6, 1.0)]
    assert distances == sorted(distances)
    assert distances[0] < distances[-1]


def test_steps_and_progress_are_those_that_are_taken(tiny_bundle: Path) -> None:
    compositor = Compositor.load(tiny_bundle, CPU)
    compositor.engine.observer = counter = RunCounter()
    seen: list[tuple[int, int]] = []
    request = Request(SCENE, [replace(PLACEMENT, strength=0.5)], 7, STEPS)
    compositor.run(request, lambda *of: seen.append(of))
    assert seen == [(step, 5) for step in range(1, 6)]
    assert counter.runs[DENOISE] == 5
    assert compositor.steps_of(request) == (5, 0)


def test_steps_are_those_of_the_bundles_own_strength_unless_another_is_given(tiny_bundle: Path) -> None:
    compositor = Compositor.load(tiny_bundle, CPU)
    compositor.defaults = {**compositor.defaults, "strength": 0.5}
    for strength, steps in ((None, 5), (0.2, 2)):
        seen: list[tuple[int, int]] = []
        request = Request(SCENE, [replace(PLACEMENT, strength=strength)], 7, STEPS)
        compositor.run(request, lambda *of, seen=seen: seen.append(of))
        assert seen[-1] == (steps, steps)
        assert compositor.steps_of(request) == (steps, 0)


def test_a_second_object_is_pasted_into_the_picture_with_the_first(compositor: Compositor) -> None:
    """As by two requests, the second with the first's picture, but for the noise."""
    shape = (1, *compositor.bundle.manifest.latent_shape)
    noise = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    second = replace(PLACEMENT, box=(60, 40, 120, 100), strength=0.3)
    first = replace(PLACEMENT, strength=0.5)
    both = compositor.run(Request(SCENE, [first, second], 7, STEPS, initial_noise=noise))[0]
    one = compositor.run(Request(SCENE, [first], 7, STEPS, initial_noise=noise))[0].image
    two = compositor.run(Request(one, [second], 7, STEPS, initial_noise=noise))[0].image
    np.testing.assert_array_equal(both.image, two)
    assert len(both.regions) == 2


def test_a_server_draws_the_same(tiny_bundle: Path) -> None:
    placement = replace(PLACEMENT, strength=0.5)
    with ServerThread(tiny_bundle) as server, Client(server.address) as client:
        picture = client.composite(SCENE, placement, seed=7, sampling=STEPS)
    np.testing.assert_array_equal(np.asarray(picture), drawn(held_compositor(tiny_bundle)[0], placement))


def test_a_place_far_larger_than_the_scene_takes_no_memory_for_what_is_not_seen() -> None:
    """Its side may be any number of 32 bits; what is computed is the crop."""
    scene, far = np.zeros((40, 60, 3), np.uint8), 2**31
    place, pixels = Box(-far, -far, far - 1, far - 1), object_pixels(*red(300, 200), 96)
    geometry = zoom_in(place, (60, 40), Ratios())
    tracemalloc.start()
    try:
        pasted = paste_object(scene, geometry, place, pixels)
        assert tracemalloc.get_traced_memory()[1] < 10e6
    finally:
        tracemalloc.stop()
    assert pasted.any()


@pytest.mark.parametrize("strength", [0, -0.5, 1.01, float("nan"), float("inf"), True, "much"])
def test_what_is_no_strength(compositor: Compositor, strength: object) -> None:
    with pytest.raises(InputError, match="strength must be a number above 0, at most 1") as caught:
        drawn(compositor, replace(PLACEMENT, strength=strength))  # type: ignore[arg-type]
    assert caught.value.field == "placements[0].strength"


def test_a_bundle_without_an_encoder(tiny_bundle: Path) -> None:
    older = without_encoder(tiny_bundle)
    compositor = Compositor(older, open_engine(older, CPU))
    assert drawn(compositor, replace(PLACEMENT, strength=1.0)).shape == SCENE.shape
    assert not defaults_message(compositor.defaults).HasField("strength")
    with pytest.raises(
        InputError, match="built without the graph that encodes pictures, which strength needs"
    ):
        drawn(compositor, replace(PLACEMENT, strength=0.5))
