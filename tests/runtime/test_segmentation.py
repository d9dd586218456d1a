"""Objects are found: by networks, by clicks and boxes, and in front of plain backgrounds without either."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from engines.errors import BundleError
from engines.options import EngineOptions
from runtime.compositor import Compositor
from runtime.errors import InputError, MissingModelError
from runtime.imaging.clicks import check_clicks, require_inside
from runtime.request import Placement, Sampling
from runtime.segmentation import Segmenter, _View
from tests.support.segmenters import GREY, WHITE, bright_things

CPU = EngineOptions(backend="onnxruntime", device="cpu", threads=1)
BOX = (10, 8, 60, 50)
SCENE = np.random.default_rng(0).integers(0, 256, (64, 80, 3), np.uint8)


@pytest.fixture(scope="module")
def segmenter(segmenter_bundles: tuple[Path, Path]) -> Segmenter:
    return Segmenter.load(*segmenter_bundles, options=CPU)


def rectangle(place: tuple[slice, slice]) -> np.ndarray:
    mask = np.zeros((48, 96), bool)
    mask[place] = True
    return mask


def overlap(found: np.ndarray, place: tuple[slice, slice]) -> float:
    """Intersection over union."""
    expected = rectangle(place)
    return float((found & expected).sum() / (found | expected).sum())


def test_the_main_object_is_one_piece(segmenter: Segmenter) -> None:
    picture = bright_things()
    picture[2:5, 90:93] = 255
    picture[GREY] = 0
    assert overlap(segmenter.mask(picture), WHITE) > 0.85


@pytest.mark.parametrize(
    ("clicks", "place"),
    [
        ([(20, 20)], WHITE),
        ([(70, 30, True)], GREY),
        ([(20, 20), (30, 30), (70, 30, False)], WHITE),
    ],
)
def test_what_is_clicked_on(
    segmenter: Segmenter, clicks: Sequence[Sequence[int]], place: tuple[slice, slice]
) -> None:
    found = segmenter.mask(bright_things(), clicks)
    assert found.shape == (48, 96)
    assert overlap(found, place) > 0.8


def test_what_is_in_a_box(segmenter: Segmenter) -> None:
    assert overlap(segmenter.mask(bright_things(), box=(56, 14, 88, 40)), GREY) > 0.8


def test_a_tall_picture_keeps_its_proportions(segmenter: Segmenter) -> None:
    found = segmenter.mask(bright_things().transpose(1, 0, 2), [(20, 20)])
    assert overlap(found.T, WHITE) > 0.8


def test_without_networks_plain_backgrounds_are_enough() -> None:
    picture = np.full((60, 80, 3), 230, np.uint8)
    picture[20:40, 30:50] = (20, 90, 200)
    found = Segmenter().mask(Image.fromarray(picture))
    np.testing.assert_array_equal(found, (picture != 230).all(axis=2))


@pytest.mark.parametrize(
    ("clicks", "refusal"),
    [
        ([(96, 0)], "the click 96,0 lies outside the picture, which has 96 x 48 pixels"),
        ([(0, 48)], "the click 0,48 lies outside"),
        ([(3, -1)], "the click 3,-1 lies outside"),
        ([(3, 3, False)], "no click is on the object"),
        ([], "no click is on the object"),
        ([(0.5, 3)], "a click must be"),
        ([(3, 3, 1)], "a click must be"),
        ([(3, 3)] * 31, "31 clicks are given; at most 30 are used"),
        ([(20, 20), (22, 22, False)], "no object was found there"),
    ],
)
def test_clicks_that_find_nothing(
    segmenter: Segmenter, clicks: Sequence[Sequence[int]], refusal: str
) -> None:
    with pytest.raises(InputError, match=refusal):
        segmenter.mask(bright_things(), clicks)


def test_thirty_clicks_may_be_given_up_to_the_corners_of_the_picture() -> None:
    clicks = check_clicks([(0, 0), (95, 47, False), *28 * [[3, 3]]])
    assert clicks[:3] == [(0, 0, True), (95, 47, False), (3, 3, True)]
    require_inside(clicks, (96, 48), "the picture")


def test_what_is_missing_is_named() -> None:
    with pytest.raises(
        MissingModelError, match=r"not plain.*give a mask, transparency, or --segmenter BUNDLE"
    ):
        Segmenter().mask(SCENE)
    with pytest.raises(
        MissingModelError, match=r"no segmenter for clicks and boxes is loaded.*--segmenter BUNDLE"
    ):
        Segmenter().mask(SCENE, [(3, 3)])
    with pytest.raises(InputError, match="no object was found in the picture"):
        Segmenter().mask(np.full((40, 40, 3), 128, np.uint8))


def test_bundles_of_the_wrong_kind(segmenter_bundles: tuple[Path, Path], example_bundle: Path) -> None:
    with pytest.raises(BundleError, match="is not a segmenter"):
        Segmenter.load(example_bundle, options=CPU)
    with pytest.raises(BundleError, match="both find the main object: give only one of them"):
        Segmenter.load(segmenter_bundles[0], segmenter_bundles[0], options=CPU)
    with pytest.raises(BundleError, match="is a segmenter: give it with --segmenter"):
        Compositor.load(segmenter_bundles[0], CPU)


def test_a_reference_is_cut_out(segmenter: Segmenter, example_bundle: Path) -> None:
    compositor = Compositor.load(example_bundle, CPU, segmenter=segmenter)

    def drawn(**how: object) -> bytes:
        placement = Placement(bright_things(), box=BOX, **how)  # type: ignore[arg-type]
        return compositor.composite(SCENE, placement, seed=3, sampling=Sampling(steps=1)).tobytes()

    clicks = [(20, 20)]
    assert drawn(reference_clicks=clicks) == drawn(reference_mask=segmenter.mask(bright_things(), clicks))
    assert drawn(reference_mask="auto") == drawn(reference_mask=segmenter.mask(bright_things()))
    with pytest.raises(InputError, match="either a mask or clicks") as caught:
        drawn(reference_mask="auto", reference_clicks=clicks)
    assert caught.value.field == "placements[0].reference_clicks"
    with pytest.raises(InputError, match="lies outside the reference") as caught:
        drawn(reference_clicks=[(300, 2)])
    assert caught.value.field == "placements[0].reference_clicks"


def test_a_turned_reference_is_cut_out_upright(
    segmenter: Segmenter, example_bundle: Path, tmp_path: Path
) -> None:
    stored = Image.fromarray(np.rot90(bright_things()))
    exif = Image.Exif()
    exif[0x0112] = 6  # shown a quarter turn to the right
    stored.save(tmp_path / "turned.png", exif=exif)
    compositor = Compositor.load(example_bundle, CPU, segmenter=segmenter)
    drawn = [
        compositor.composite(
            SCENE,
            Placement(reference, box=BOX, reference_clicks=[(20, 20)]),
            seed=3,
            sampling=Sampling(steps=1),
        ).tobytes()
        for reference in (tmp_path / "turned.png", bright_things())
    ]
    assert drawn[0] == drawn[1]


def test_networks_and_compositor_share_the_memory(segmenter: Segmenter) -> None:
    assert segmenter.nbytes > 1000
    assert (
        segmenter.beside(EngineOptions(memory_budget=1 << 30)).memory_budget == (1 << 30) - segmenter.nbytes
    )
    assert segmenter.beside(CPU) == CPU


def test_the_segmenter_of_the_repository_finds_what_the_rule_refuses(example_bundle: Path) -> None:
    """Held-out rendered objects in rooms; then one of them is composited."""
    from training.data.synthetic.views import HELD_OUT, scene_view

    segmenter = Segmenter.load(example_bundle.with_name("segmenter-small"), options=CPU)
    overlaps = []
    for seed in range(HELD_OUT, HELD_OUT + 6):
        view = scene_view(seed, 0)
        with pytest.raises(MissingModelError, match="is not plain"):
            Segmenter().mask(view.image)
        mask, truth = segmenter.mask(view.image), view.mask > 127
        overlaps.append(np.count_nonzero(mask & truth) / np.count_nonzero(mask | truth))
    assert np.mean(overlaps) > 0.85

    compositor = Compositor.load(example_bundle, CPU, segmenter=segmenter)
    masks: tuple[object, object] = ("auto", mask)
    found, given = (
        compositor.composite(SCENE, Placement(view.image, each, box=BOX), seed=3, sampling=Sampling(steps=1))
        for each in masks
    )
    np.testing.assert_array_equal(np.asarray(found), np.asarray(given))


@pytest.mark.parametrize("has_networks", [False, True])
def test_the_main_object_of_a_cut_out_is_what_is_opaque(segmenter: Segmenter, has_networks: bool) -> None:
    """Even where it is as white as what transparency is seen on."""
    rgba = np.zeros((60, 80, 4), np.uint8)
    rgba[10:50, 20:60] = (250, 250, 248, 255)
    rgba[30:50, 20:60, :3] = (30, 60, 200)
    found = (segmenter if has_networks else Segmenter()).mask(Image.fromarray(rgba))
    np.testing.assert_array_equal(found, rgba[..., 3] == 255)


def test_a_picture_with_transparent_corners_is_no_cut_out() -> None:
    """A screenshot of a window: its main object is in it."""
    rgba = np.full((60, 80, 4), 255, np.uint8)
    rgba[20:40, 30:50, :3] = (30, 60, 200)
    for rows in (slice(0, 4), slice(-4, None)):
        for columns in (slice(0, 4), slice(-4, None)):
            rgba[rows, columns, 3] = 0
    mask = Segmenter().mask(Image.fromarray(rgba))
    expected = np.zeros((60, 80), bool)
    expected[20:40, 30:50] = True
    assert (mask != expected).mean() < 0.02


def test_a_picture_that_shows_no_object_by_its_opacity_is_seen_on_white() -> None:
    """As the networks see it, whatever colours its transparent parts hide."""
    rgba = np.zeros((60, 80, 4), np.uint8)
    rgba[10:50, 20:60] = (10, 10, 10, 120)
    mask = Segmenter().mask(Image.fromarray(rgba))
    expected = np.zeros((60, 80), bool)
    expected[10:50, 20:60] = True
    assert (mask != expected).mean() < 0.02


@settings(deadline=None)
@given(st.integers(50, 900), st.integers(50, 900), st.floats(0.5, 0.95))
@example(900, 30, 0.9)
def test_an_edge_is_where_the_network_has_it(width: int, height: int, share: float) -> None:
    """Of masks with cells of four pixels, which need not fit into the picture."""
    view = _View(np.zeros((height, width, 3), np.uint8), 256, keeps_proportions=True)
    edge = int(height * share)
    rows = view.inputs["inside"][0, 0].any(axis=1).sum()
    centres = 4 * np.arange(64) + 2
    distances = np.repeat(edge * rows / height - centres[:, None], 64, axis=1)
    assert abs(np.count_nonzero(view.to_picture(distances)[:, 0] > 0) - edge) <= 1
