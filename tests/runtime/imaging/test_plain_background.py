"""Objects in front of plain backgrounds are cut out by a rule."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

from runtime.imaging.plain_background import cut_from_plain


def cup(background: tuple[int, int, int] = (240, 236, 230)) -> Image.Image:
    """A ring, whose hole shows the background."""
    picture = Image.new("RGB", (120, 90), background)
    ImageDraw.Draw(picture).ellipse((40, 20, 79, 59), fill=(180, 40, 30))
    ImageDraw.Draw(picture).ellipse((55, 35, 64, 44), fill=background)
    return picture


def disc() -> np.ndarray:
    mask = Image.new("1", (120, 90))
    ImageDraw.Draw(mask).ellipse((40, 20, 79, 59), fill=1)
    return np.asarray(mask)


def test_holes_belong_to_the_object() -> None:
    np.testing.assert_array_equal(cut_from_plain(np.asarray(cup())), disc())


def test_noise_and_shades_of_the_background_do_not() -> None:
    noise = np.random.default_rng(0).normal(0, 4, (90, 120, 3))
    picture = np.asarray(cup(), np.float64) + noise + np.linspace(-6, 6, 120)[None, :, None]
    found = cut_from_plain(picture.clip(0, 255).astype(np.uint8))
    assert found is not None
    assert np.mean(found != disc()) < 0.002


def test_an_object_at_the_border_is_cut_out_too() -> None:
    picture = np.full((60, 60, 3), 250, np.uint8)
    picture[30:, 20:30] = 10
    assert cut_from_plain(picture) is None  # a sixth of the lower border is the object
    picture = np.full((600, 600, 3), 250, np.uint8)
    picture[300:, 299:300] = 230
    picture[300:500, 280:320] = 10
    found = cut_from_plain(picture)
    assert found is not None
    np.testing.assert_array_equal(found, (picture == 10).all(axis=2))


def test_other_backgrounds_are_left_alone() -> None:
    scene = np.random.default_rng(0).integers(0, 256, (60, 60, 3), np.uint8)
    assert cut_from_plain(scene) is None


def test_an_empty_picture_has_no_object() -> None:
    found = cut_from_plain(np.full((40, 40, 3), 128, np.uint8))
    assert found is not None
    assert not found.any()
