"""Stills: pictures from anywhere, read as those of a request."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image

from tests.training.data.test_sources import HEIGHT, MASK, WIDTH, labels, stills
from training.data.pairs import Shot
from training.data.sources import SOURCES, SourceError


def test_several_objects_of_a_still(tmp_path: Path) -> None:
    stills(tmp_path)
    labels(tmp_path / "masks/one_2.png", ~MASK * 255)
    source = SOURCES["Stills"](tmp_path)
    masks = [source.pair(index, np.random.default_rng(0))[0].mask for index in range(len(source))]
    assert [mask.sum() for mask in masks] == [MASK.sum(), (~MASK).sum()]


def still(root: Path) -> Shot:
    return SOURCES["Stills"](root).pair(0, np.random.default_rng(0))[0]


def test_stills_are_read_as_the_pictures_of_a_request(tmp_path: Path) -> None:
    """16 bits as 8, upright by EXIF, transparent parts white; masks by their transparency, in any case."""
    (tmp_path / "images").mkdir()
    grey = np.arange(HEIGHT * WIDTH, dtype=np.uint16).reshape(HEIGHT, WIDTH) * 80
    Image.fromarray(grey).save(tmp_path / "images/one.png")
    labels(tmp_path / "masks/one.PNG", np.dstack([MASK * 0] * 3 + [MASK * 255]))
    shot = still(tmp_path)
    assert np.abs(shot.image[..., 0].astype(int) - grey / 257).max() <= 1
    assert np.array_equal(shot.mask, MASK)

    labels(tmp_path / "images/one.png", np.dstack([MASK * 0 + 9] * 3 + [MASK * 255]))
    assert np.array_equal(still(tmp_path).image[..., 0], np.where(MASK, 9, 255))

    (tmp_path / "images/one.png").unlink()
    turned, exif = Image.fromarray(np.rot90(MASK).astype(np.uint8) * 255), Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # to be turned a quarter clockwise
    turned.save(tmp_path / "images/one.jpg", exif=exif)
    shot = still(tmp_path)
    assert np.array_equal(shot.mask, MASK)
    assert np.array_equal(shot.image[..., 0] > 128, MASK)


def test_a_still_that_cannot_be_used_is_told(tmp_path: Path) -> None:
    stills(tmp_path)
    labels(tmp_path / "masks/one.png", MASK[:-1] * 255)
    with pytest.raises(SourceError, match=r"one\.png is 32 x 23 and the picture one\.jpg is 32 x 24"):
        still(tmp_path)
    (tmp_path / "images/one.jpg").write_text("hello")
    with pytest.raises(SourceError, match=r"one\.jpg"):
        still(tmp_path)
