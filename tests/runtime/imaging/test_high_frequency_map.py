"""The high-frequency map, held against the original's output and against OpenCV's building blocks."""

from pathlib import Path

import cv2
import numpy as np
import pytest

from runtime.imaging.high_frequency_map import high_frequency_map

GOLDEN = np.load(Path(__file__).parents[2] / "data" / "geometry.npz")
CASES = sorted(
    name.removesuffix("_image") for name in GOLDEN.files if name.startswith("sobel") and "image" in name
)


@pytest.mark.parametrize("case", CASES)
def test_equals_the_original(case):
    actual = high_frequency_map(GOLDEN[f"{case}_image"], GOLDEN[f"{case}_mask_u8"])
    np.testing.assert_array_equal(actual, GOLDEN[f"{case}_out"])


def test_only_strong_edges_inside_the_eroded_mask_remain_in_their_colour():
    image = np.full((256, 256, 3), (200, 40, 0), np.uint8)
    image[:, 128:] = 0
    mask = np.zeros((256, 256), np.uint8)
    mask[:128] = 255
    edges = high_frequency_map(image, mask)
    rows, columns = np.nonzero(edges.any(axis=-1))
    assert (rows.min(), rows.max()) == (0, 123)  # two 5x5 erosions take 4 rows, none at the picture's border
    assert set(columns) == {127}  # column 128 is an edge too, but black
    assert edges[0, 127].tolist() == [100, 20, 0]


def test_a_flat_picture_has_no_edges():
    assert not high_frequency_map(np.full((50, 80, 3), 90, np.uint8), np.full((50, 80), 255, np.uint8)).any()


@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (37, 5)])
def test_tiny_pictures(shape):
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    assert high_frequency_map(image, np.full(shape, 255, np.uint8)).shape == (*shape, 3)


@pytest.mark.parametrize("seed", range(5))
def test_equals_opencv_step_by_step(seed):
    generator = np.random.default_rng(seed)
    image = generator.integers(0, 256, (256, 256, 3), dtype=np.uint8)
    mask = cv2.blur(generator.integers(0, 256, (256, 256), dtype=np.uint8), (41, 41))
    mask[128 - 40 :, :] = 255

    responses = (cv2.Sobel(image, cv2.CV_64F, x, y, ksize=3) for x, y in ((1, 0), (0, 1)))
    horizontal, vertical = (cv2.convertScaleAbs(response) for response in responses)
    strength = cv2.addWeighted(horizontal, 0.5, vertical, 0.5, 0).max(axis=-1)
    inside = cv2.erode((mask / 255 > 0.5).astype(np.uint8), np.ones((5, 5)), iterations=2)
    strength = np.where((strength >= 50) & (inside == 1), strength, 0).astype(np.float32)
    expected = (strength[..., None] / 255 * image.astype(np.float32)).astype(np.uint8)

    np.testing.assert_array_equal(high_frequency_map(image, mask), expected)
