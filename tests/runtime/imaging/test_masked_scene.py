"""What an inpainting network gets of a scene, and how its picture is pasted back with a soft edge."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from runtime.imaging.boxes import Box
from runtime.imaging.geometry import Ratios
from runtime.imaging.mask_levels import MASK_LEVELS, MaskLevel
from runtime.imaging.masked_scene import MaskedScene, feather, mask_scene
from runtime.imaging.modes import MODES
from runtime.imaging.paste_back import feathered_region, paste_feathered
from tests.support.pictures import Pixels, picture

SIZE, LATENT = (64, 64), (8, 8)
ROOM, NO_ROOM = Ratios(), Ratios(box=1.0, crop=1.0)


def masked(
    scene: Pixels,
    target: NDArray[np.bool_] | Box,
    mode: str = "keep_background",
    ratios: Ratios = ROOM,
    size: tuple[int, int] = SIZE,
    latent: tuple[int, int] = LATENT,
    level: MaskLevel = "exact",
) -> MaskedScene:
    return mask_scene(scene, target, ratios, mode, size, latent, level)


def mask_of(box: Box, height: int, width: int) -> NDArray[np.bool_]:
    mask = np.zeros((height, width), bool)
    mask[box.slices] = True
    return mask


# --- the crop ---------------------------------------------------------------------------------------------


def test_a_scene_of_the_networks_size_is_taken_as_it_is() -> None:
    scene = picture(*SIZE)
    found = masked(scene, Box(0, 0, 64, 64), ratios=NO_ROOM)
    np.testing.assert_array_equal(found.picture, scene.transpose(2, 0, 1).astype(np.float32) / 127.5 - 1)
    assert found.mask.all()
    assert (found.blend == 1).all()
    assert (found.masked_picture == 0).all()
    assert feathered_region(found.geometry, found.paste) == Box(0, 0, 64, 64)


def test_where_the_crop_leaves_the_scene_is_grey_and_drawn() -> None:
    """A wide scene in a square picture: nothing but padding above and below."""
    found = masked(np.full((32, 64, 3), 255, np.uint8), Box(30, 10, 34, 14), ratios=Ratios(crop=100.0))
    assert found.geometry.crop == Box(0, 0, 64, 32)
    assert (found.picture[:, :16] == 0).all()
    assert (found.picture[:, 48:] == 0).all()
    assert (found.picture[:, 17:47] == 1).all()
    assert found.mask[:16].all()
    assert found.mask[48:].all()
    assert (found.blend[0, [0, 1, 6, 7]] == 1).all()
    assert (found.paste[:14] == 0).all()


@pytest.mark.parametrize("size", [(64, 96), (96, 64)])
def test_the_crop_has_the_aspect_ratio_of_the_networks_picture(size: tuple[int, int]) -> None:
    scene = picture(300, 300)
    found = masked(scene, Box(120, 120, 160, 160), size=size, latent=(size[0] // 8, size[1] // 8))
    height, width = size
    crop = found.geometry.crop
    assert abs(crop.width * height - crop.height * width) <= 2 * max(size)
    assert np.abs(np.subtract(found.geometry.padded_size, (crop.width, crop.height))).max() <= 1
    assert found.picture.shape == (3, *size)


# --- mask and blend ---------------------------------------------------------------------------------------


def test_blend_is_1_inside_and_falls_softly_outside() -> None:
    scene = picture(*SIZE)
    mask = mask_of(Box(24, 24, 40, 40), *SIZE)
    blend = masked(scene, mask, ratios=Ratios(crop=100.0)).blend[0]
    assert (blend[3:5, 3:5] == 1).all()
    row = blend[3, 4:]
    assert row[0] == 1
    assert (np.diff(row) < 0).all()
    # one cell is grown, then the Gaussian reaches half-way between that cell and the next
    assert row[1] > 0.5 > row[2] > 0


def test_a_shape_ends_at_the_cells_it_touches() -> None:
    mask = mask_of(Box(24, 24, 41, 40), *SIZE)
    found = masked(picture(*SIZE), mask, "shape", Ratios(crop=100.0))
    np.testing.assert_array_equal(found.blend[0], mask_of(Box(3, 3, 6, 5), *LATENT))
    np.testing.assert_array_equal(found.latent_mask[0], mask_of(Box(3, 3, 6, 5), *LATENT))


def test_networks_get_the_nearest_neighbour_of_the_mask() -> None:
    """As diffusers and PyTorch shrink it."""
    torch = pytest.importorskip("torch")
    mask = np.random.default_rng(0).random(SIZE) < 0.5
    found = masked(picture(*SIZE), mask, ratios=Ratios(crop=100.0))
    expected = torch.nn.functional.interpolate(torch.from_numpy(mask)[None, None].float(), LATENT)[0]
    np.testing.assert_array_equal(found.latent_mask, expected.numpy())


def test_no_part_of_a_mask_is_lost_when_the_crop_shrinks() -> None:
    mask = np.zeros((640, 640), bool)
    mask[[5, 300, 633], [7, 301, 633]] = True
    mask[100, 100:120] = True
    found = masked(picture(640, 640), mask)
    assert found.mask[[0, 30, 63], [0, 30, 63]].all()
    assert found.mask[10, 10:12].all()
    assert found.mask.sum() == 5


@given(mask=arrays(np.bool_, (8, 12)), mode=st.sampled_from(sorted(MODES)), data=st.data())
def test_a_coarser_level_draws_and_pastes_all_that_a_finer_one_does(
    mask: NDArray[np.bool_], mode: str, data: st.DataObject
) -> None:
    """The crop is the same at every level, and none goes beyond the mask and the target box."""
    target = np.zeros((60, 80), bool)
    y, x = data.draw(st.integers(0, 28)), data.draw(st.integers(0, 32))
    target[y : y + 32, x : x + 48] = np.kron(mask, np.ones((4, 4), bool))
    assume(mask.any())
    made = [masked(picture(60, 80), target, mode, level=level) for level in MASK_LEVELS]
    for finer, coarser in pairwise(made):
        assert finer.geometry == coarser.geometry
        for name in ("mask", "blend", "paste"):
            assert (getattr(finer, name) <= getattr(coarser, name)).all()
    boxed = masked(picture(60, 80), made[0].geometry.box, "shape", Ratios(box=1.0, crop=100.0))
    exact, whole = (
        masked(picture(60, 80), target, "shape", Ratios(crop=100.0), level=level).mask
        for level in ("exact", "box")
    )
    np.testing.assert_array_equal(whole, exact | boxed.mask)


@pytest.mark.parametrize("mode", MODES)
def test_a_box_is_drawn_whole(mode: str) -> None:
    """Also its last row and column, which the original's crop loses at ratios of 1."""
    scene, box = np.zeros((50, 70, 3), np.uint8), Box(9, 11, 40, 33)
    found = masked(scene, box, mode, NO_ROOM)
    result = paste_feathered(np.full((*SIZE, 3), 200, np.uint8), scene, found.geometry, found.paste)
    assert result[12:32, 12:37].min() > 0
    assert feathered_region(found.geometry, found.paste).union(box) == feathered_region(
        found.geometry, found.paste
    )


# --- pasting back -----------------------------------------------------------------------------------------


@given(
    mask=arrays(np.bool_, (24, 40)),
    distance=st.sampled_from([(64, 1, 3), (512, 8, 16)]),
)
def test_the_feather_is_1_near_the_mask_and_0_far_from_it(
    mask: NDArray[np.bool_], distance: tuple[int, int, int]
) -> None:
    side, near, far = distance
    full = np.zeros((side, side), bool)
    full[10:34, 10:50] = mask
    weights = feather(full)
    ys, xs = np.nonzero(full)
    for y, x in zip(ys[::7], xs[::7]):
        assert (weights[max(y - near, 0) : y + near + 1, max(x - near, 0) : x + near + 1] == 1).all()
    reached = np.zeros_like(full)
    for y, x in zip(ys, xs):
        reached[max(y - far, 0) : y + far + 1, max(x - far, 0) : x + far + 1] = True
    assert (weights[~reached] == 0).all()


scenes = st.tuples(st.integers(20, 90), st.integers(20, 90))


@given(data=st.data(), shape=scenes, mode=st.sampled_from(sorted(MODES)), side=st.sampled_from([32, 64]))
def test_pixels_beyond_the_feather_never_change(
    data: st.DataObject, shape: tuple[int, int], mode: str, side: int
) -> None:
    """Wherever the place is, also across the scene's border; and the scene itself stays as it is."""
    height, width = shape
    x0, y0 = data.draw(st.integers(-5, width - 4)), data.draw(st.integers(-5, height - 4))
    box = Box(x0, y0, x0 + data.draw(st.integers(6, 60)), y0 + data.draw(st.integers(6, 60)))
    by_mask = data.draw(st.booleans())
    target = mask_of(box.clip((width, height)), height, width) if by_mask else box
    ratios = Ratios(box=data.draw(st.floats(1, 2)), crop=data.draw(st.floats(1, 4)))
    level = data.draw(st.sampled_from(MASK_LEVELS))
    scene = picture(height, width)
    before = scene.copy()
    found = masked(scene, target, mode, ratios, (side, side), (side // 8, side // 8), level)
    result = paste_feathered(picture(side, side, seed=1), scene, found.geometry, found.paste)
    np.testing.assert_array_equal(scene, before)
    changed = (result != scene).any(axis=-1)
    region = feathered_region(found.geometry, found.paste)
    assert region == region.intersection(found.geometry.crop)
    changed[region.slices] = False
    assert not changed.any()
    if mode != "crop":
        # the feather's two widths, and one cell of the networks' picture for its rounding, in pixels here
        place = box.clip((width, height))
        if level != "exact" if by_mask else mode != "shape":
            place = place.union(found.geometry.box)
        scale = found.geometry.padded_size[0] / side
        margin = int(np.ceil((2 * max(1, side / 64) + 2) * scale)) + 1
        far = np.ones(shape, bool)
        far[place.shrink(-margin).clip((width, height)).slices] = False
        assert not (result != scene).any(axis=-1)[far].any()


def test_the_picture_fades_towards_a_crop_whose_scene_goes_on() -> None:
    scene = np.zeros((256, 256, 3), np.uint8)
    found = masked(scene, Box(64, 0, 192, 128), "crop", NO_ROOM)
    result = paste_feathered(np.full((*SIZE, 3), 255, np.uint8), scene, found.geometry, found.paste)[..., 0]
    crop = found.geometry.crop
    assert crop.y0 == 0
    assert result[0, 128] == 255  # the scene ends here
    assert result[60, crop.x0] < 255
    assert result[crop.y1 - 1, 128] < 255
    assert result[60, crop.x0 + 8] == 255


def test_a_picture_of_the_scenes_size_replaces_it_exactly() -> None:
    scene, drawn = picture(*SIZE), picture(*SIZE, seed=1)
    found = masked(scene, Box(0, 0, 64, 64))
    np.testing.assert_array_equal(paste_feathered(drawn, scene, found.geometry, found.paste), drawn)


def test_the_same_place_in_another_scene() -> None:
    target, other = mask_of(Box(20, 20, 40, 50), 90, 120), picture(90, 120, seed=3)
    moved, direct = masked(picture(90, 120), target).in_scene(other), masked(other, target)
    for name in ("picture", "mask", "blend", "paste"):
        np.testing.assert_array_equal(getattr(moved, name), getattr(direct, name))
    assert moved.geometry == direct.geometry
