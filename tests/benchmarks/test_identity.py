"""The descriptor that tells objects apart, and the lineup that they are recognised in."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from benchmarks.identity import PARTS, Identity, Lineup, cielab, identity_of
from benchmarks.similarity import Picture


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


def test_the_same_object_is_nearer_than_another() -> None:
    query = identity_of(disc(RED))
    assert query.likeness(query) == pytest.approx(dict.fromkeys(PARTS, 1.0))
    moved_and_dimmed = query.likeness(identity_of(disc(RED, shift=3, light=0.85)))["identity"]
    for other in (GREEN, BLUE):
        assert moved_and_dimmed > query.likeness(identity_of(disc(other)))["identity"]


def test_edges_tell_directions_apart() -> None:
    stripes = np.where(np.mgrid[:64, :64][0] % 16 < 8, 200, 60).astype(np.uint8)
    lying, upright = (np.repeat(p[..., None], 3, axis=2) for p in (stripes, stripes.T))
    likeness = identity_of(lying).likeness(identity_of(upright))
    assert likeness["edges"] < 0.2
    assert likeness["colours"] > 0.9
    nothing = identity_of(np.full((9, 9, 3), 70, np.uint8))
    assert nothing.likeness(identity_of(lying))["edges"] == 0.0


def test_a_lineup_recognises_by_the_nearest_view_and_ties_are_mistakes() -> None:
    views = {
        1: [identity_of(disc(GREEN)), identity_of(disc(RED, shift=2))],
        2: [identity_of(disc(BLUE))],
        3: [identity_of(disc(BLUE, shift=1)), identity_of(disc((90, 90, 90)))],
    }
    lineup = Lineup(views, size=3)
    assert lineup.recognised(identity_of(disc(RED)), 1)["identity"]
    assert not lineup.recognised(identity_of(disc(RED)), 2)["identity"]
    blank = Identity(np.zeros_like(views[1][0].colours), np.zeros_like(views[1][0].edges))
    assert lineup.recognised(blank, 1) == dict.fromkeys(PARTS, False)


def test_distractors_are_other_objects_and_always_the_same() -> None:
    blank = identity_of(disc(RED))
    lineup = Lineup({number: [blank] for number in range(30)}, size=20)
    others = lineup.others(7)
    assert len(set(others)) == 19
    assert 7 not in others
    assert others == Lineup({number: [blank] for number in range(30)}, size=20).others(7)
    assert others != lineup.others(8)
