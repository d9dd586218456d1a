"""Tiles cover every place, overlap, and leave no seam."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.imaging.boxes import Box
from runtime.imaging.geometry import Geometry
from runtime.imaging.masked_scene import feathered_box
from runtime.imaging.paste_back import feathered_region, paste_feathered
from runtime.imaging.tiles import MAX_TILES, MOST, OVERLAP, paste_tile, tiles_of

SIDE = 64


@st.composite
def places(draw: st.DrawFn) -> tuple[Box, tuple[int, int]]:
    """A region in a scene of any size."""
    width, height = draw(st.integers(8, 700)), draw(st.integers(8, 700))
    x0, y0 = draw(st.integers(0, width - 1)), draw(st.integers(0, height - 1))
    return Box(x0, y0, draw(st.integers(x0 + 1, width)), draw(st.integers(y0 + 1, height))), (width, height)


@given(places())
def test_tiles_cover_the_place_and_lie_in_the_scene(place: tuple[Box, tuple[int, int]]) -> None:
    region, (width, height) = place
    tiles = tiles_of(region, (width, height), SIDE)
    assert 1 <= len(tiles) <= MAX_TILES
    covered = np.zeros((height, width), np.bool_)
    for tile in tiles:
        assert 0 <= tile.x0 < tile.x1 <= width
        assert 0 <= tile.y0 < tile.y1 <= height
        assert (tile.width, tile.height) == (tiles[0].width, tiles[0].height)
        covered[tile.slices] = True
    assert covered[region.slices].all()


@given(places())
def test_neighbours_overlap_by_a_quarter(place: tuple[Box, tuple[int, int]]) -> None:
    region, size = place
    tiles = tiles_of(region, size, SIDE)
    columns = sorted({(tile.x0, tile.x1) for tile in tiles})
    rows = sorted({(tile.y0, tile.y1) for tile in tiles})
    for starts in (columns, rows):
        for (first, end), (second, _) in itertools.pairwise(starts):
            # one pixel is lost where the tiles cannot be spread more evenly
            assert end - second >= (end - first) * OVERLAP - 2


@pytest.mark.parametrize(
    ("region", "count", "side"),
    [
        (Box(100, 100, 140, 150), 1, 64),  # smaller than the networks' picture
        (Box(100, 100, 212, 164), 2, 64),
        (Box(0, 0, 208, 208), 16, 64),  # the largest that tiles of its size cover
        (Box(0, 0, 1000, 1000), 16, 308),  # larger ones are enlarged
    ],
)
def test_tiles_are_as_large_as_the_networks_picture(region: Box, count: int, side: int) -> None:
    tiles = tiles_of(region, (1000, 1000), SIDE)
    assert (len(tiles), tiles[0].width, tiles[0].height) == (count, side, side)
    assert MOST**2 == MAX_TILES


def test_a_low_scene_has_low_tiles() -> None:
    tiles = tiles_of(Box(0, 0, 200, 40), (200, 40), SIDE)
    assert [(tile.height, tile.y0) for tile in tiles] == [(40, 0)] * len(tiles)
    assert all(Geometry(tile, tile).padded_size == (64, 64) for tile in tiles)


def paste_all(
    scene: np.ndarray, region: Box, place: Geometry, fade: np.ndarray | None, values: list[int]
) -> np.ndarray:
    """Pastes a plain picture into each tile of a region."""
    size = (scene.shape[1], scene.shape[0])
    for index, tile in enumerate(tiles_of(region, size, SIDE)):
        picture = np.full((SIDE, SIDE, 3), values[index % len(values)], np.uint8)
        scene = paste_tile(picture, scene, Geometry(tile, place.box), region, place, fade)
    return scene


@given(places(), st.integers(0, 255))
def test_what_is_the_same_in_all_tiles_shows_no_seam(place: tuple[Box, tuple[int, int]], value: int) -> None:
    region, (width, height) = place
    scene = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    pasted = paste_all(scene, region, Geometry(region, region), None, [value])
    assert (pasted[region.slices] == value).all()
    outside = np.ones((height, width), np.bool_)
    outside[region.slices] = False
    np.testing.assert_array_equal(pasted[outside], scene[outside])


def test_tiles_that_differ_fade_into_each_other() -> None:
    """A step of 100 levels between neighbours is spread over an eighth of a tile."""
    scene = np.zeros((200, 300, 3), np.uint8)
    region = Box(20, 20, 260, 180)
    pasted = paste_all(scene, region, Geometry(region, region), None, [100, 200])[region.slices]
    steps = np.abs(np.diff(pasted[..., 0].astype(int), axis=1)).max()
    assert pasted.min() >= 100
    assert steps <= np.ceil(100 / (SIDE * OVERLAP / 2)) + 1


def test_a_soft_place_fades_as_it_did_before() -> None:
    scene = np.zeros((300, 300, 3), np.uint8)
    place = Geometry(Box(20, 20, 280, 280), Box(80, 80, 220, 220))
    fade = feathered_box(place.box, place, (SIDE, SIDE))
    region = feathered_region(place, fade)
    once = paste_feathered(np.full((SIDE, SIDE, 3), 200, np.uint8), scene, place, fade)
    tiled = paste_all(scene, region, place, fade, [200])
    inside = once == 200
    np.testing.assert_array_equal(tiled[inside], 200)
    np.testing.assert_array_equal(tiled[once == 0], 0)
    edge = ~inside & (once > 0)
    # where tiles overlap, which are four at the most, each adds its share
    assert (tiled[edge] >= once[edge]).all()
    assert (tiled[edge] <= 4 * once[edge].astype(int) + 4).all()


def test_a_tile_is_put_where_it_was_cut_out() -> None:
    scene = np.random.default_rng(1).integers(0, 256, (200, 200, 3), np.uint8)
    region, tile = Box(30, 40, 170, 180), Box(70, 60, 134, 124)
    same = paste_tile(
        scene[tile.slices], scene, Geometry(tile, region), region, Geometry(region, region), None
    )
    np.testing.assert_array_equal(same, scene)
