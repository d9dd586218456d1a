"""The descriptor that tells objects apart, and the gallery that they are recognised among."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from benchmarks.support.identity import PARTS, Gallery, Identity, cielab, identity_of
from benchmarks.support.similarity import Picture


def disc(colour: tuple[int, int, int], shift: int = 0, light: float = 1.0) -> Picture:
    """A striped disc before grey."""
    row, column = np.mgrid[:80, :60]
    picture = np.full((80, 60, 3), 120, np.uint8)
    inside = np.hypot(row - 40, column - 30 - shift) < 26
    picture[inside] = np.multiply(colour, light).astype(np.uint8)
    picture[inside & (row % 20 < 6)] = round(200 * light)
    return picture


RED, GREEN, BLUE = (200, 40, 40), (40, 160, 40), (40, 60, 200)


def test_cielab_is_opencv_s() -> None:
    colours = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    expected = cv2.cvtColor(colours.astype(np.float32) / 255, cv2.COLOR_RGB2LAB)
    np.testing.assert_allclose(cielab(colours), expected, atol=0.5)  # OpenCV interpolates in a table


def test_the_same_object_is_more_similar_than_another() -> None:
    query = identity_of(disc(RED))
    assert query.similarity(query) == pytest.approx(dict.fromkeys(PARTS, 1.0))
    moved_and_dimmed = query.similarity(identity_of(disc(RED, shift=3, light=0.85)))["identity"]
    for other in (GREEN, BLUE):
        assert moved_and_dimmed > query.similarity(identity_of(disc(other)))["identity"]


def test_edges_tell_directions_apart() -> None:
    stripes = np.where(np.mgrid[:64, :64][0] % 16 < 8, 200, 60).astype(np.uint8)
    lying, upright = (np.repeat(p[..., None], 3, axis=2) for p in (stripes, stripes.T))
    similarity = identity_of(lying).similarity(identity_of(upright))
    assert similarity["edges"] < 0.2
    assert similarity["colours"] > 0.9
    nothing = identity_of(np.full((9, 9, 3), 70, np.uint8))
    assert nothing.similarity(identity_of(lying))["edges"] == 0.0


def test_a_gallery_recognises_by_the_most_similar_view_and_ties_are_mistakes() -> None:
    views = {
        1: [identity_of(disc(GREEN)), identity_of(disc(RED, shift=2))],
        2: [identity_of(disc(BLUE))],
        3: [identity_of(disc(BLUE, shift=1)), identity_of(disc((90, 90, 90)))],
    }
    gallery = Gallery(views, size=3)
    assert gallery.recognised(identity_of(disc(RED)), 1)["identity"]
    assert not gallery.recognised(identity_of(disc(RED)), 2)["identity"]
    blank = Identity(np.zeros_like(views[1][0].colours), np.zeros_like(views[1][0].edges))
    assert gallery.recognised(blank, 1) == dict.fromkeys(PARTS, False)


def test_distractors_are_other_objects_and_always_the_same() -> None:
    blank = identity_of(disc(RED))
    gallery = Gallery({number: [blank] for number in range(30)}, size=20)
    distractors = gallery.distractors(7)
    assert len(set(distractors)) == 19
    assert 7 not in distractors
    assert distractors == Gallery({number: [blank] for number in range(30)}, size=20).distractors(7)
    assert distractors != gallery.distractors(8)
