"""Recognises objects: a descriptor without learned weights, and retrieval among distractors.

The networks under test must not judge themselves, so the descriptor is computed from pixels: colours
(histograms in CIELAB over a pyramid of horizontal bands, because turning an object moves its markings
sideways and leaves them at their height) and directions of edges (histograms of oriented gradients). How well
it tells objects apart is measured in every run, on the true pictures.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Picture = NDArray[np.uint8]
Array = NDArray[np.float64]

SIDE = 64
BANDS = (1, 3)
COLOUR_BINS = (4, 8, 8)  # of L*, a*, b*
COLOUR_LIMITS = ((0, 100), (-60, 60), (-60, 60))
CELLS, ORIENTATIONS = 4, 8

_TO_XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
)
_D65 = np.array([0.95047, 1.0, 1.08883])
_FLAT = 5.0  # gradients weaker than this, in L* per pixel and cell, are noise


@dataclass(frozen=True, eq=False)
class Identity:
    """The descriptor of an object; each part has the norm 1, or 0 where the picture is flat."""

    colours: Array
    edges: Array

    def similarity(self, other: Identity) -> dict[str, float]:
        """Return the cosines of the parts, and their mean as "identity"."""
        colours, edges = float(self.colours @ other.colours), float(self.edges @ other.edges)
        return {"identity": (colours + edges) / 2, "colours": colours, "edges": edges}


PARTS = ("identity", "colours", "edges")


def identity_of(crop: Picture) -> Identity:
    """Compute the descriptor of an object that fills a crop (H, W, 3) uint8; the middle has more weight."""
    picture = np.asarray(Image.fromarray(crop).resize((SIDE, SIDE), Image.Resampling.BILINEAR))
    lab = cielab(picture)
    y, x = (np.mgrid[:SIDE, :SIDE] + 0.5) / SIDE * 2 - 1
    window = np.exp(-(x**2 / 0.5 + y**2))
    bands = [rows for count in BANDS for rows in np.array_split(np.arange(SIDE), count)]
    histograms = [_colours(lab[rows], window[rows]) for rows in bands]
    # each level of the pyramid has the same weight, however many bands it has
    weights = [count**-0.5 for count in BANDS for _ in range(count)]
    colours = np.concatenate([w * h for w, h in zip(weights, histograms)])
    return Identity(_unit(colours), _unit(_edges(lab[..., 0], window)))


def cielab(picture: Picture) -> Array:
    """Convert sRGB (H, W, 3) uint8 to L* 0..100, a*, b* (H, W, 3), for daylight D65."""
    values = picture / 255
    linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    xyz = linear @ _TO_XYZ.T / _D65
    f = np.where(xyz > 216 / 24389, np.cbrt(xyz), (24389 / 27 * xyz + 16) / 116)
    x, y, z = np.moveaxis(f, -1, 0)
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], -1)


def _colours(lab: Array, window: Array) -> Array:
    """Square roots of a colour histogram that sums up to 1; each pixel is shared among the 8 nearest bins."""
    places = []
    for channel, bins, (low, high) in zip(np.moveaxis(lab, -1, 0), COLOUR_BINS, COLOUR_LIMITS):
        place = np.clip((channel - low) / (high - low) * bins - 0.5, 0, bins - 1)
        below = np.minimum(place.astype(int), bins - 2)
        places.append((below, place - below))
    histogram = np.zeros(COLOUR_BINS)
    for corner in itertools.product((0, 1), repeat=3):
        weight = window
        for (_, part), above in zip(places, corner):
            weight = weight * (part if above else 1 - part)
        np.add.at(histogram, tuple(below + above for (below, _), above in zip(places, corner)), weight)
    roots: Array = np.sqrt(histogram / histogram.sum())
    return roots.ravel()


def _edges(lightness: Array, window: Array) -> Array:
    """Histograms of the gradient's directions in a grid of cells, each normalised."""
    down, across = np.gradient(lightness)
    strength = np.hypot(down, across) * window
    place = np.arctan2(down, across) % np.pi / np.pi * ORIENTATIONS
    below = place.astype(int)
    rows, columns = np.mgrid[:SIDE, :SIDE] * CELLS // SIDE
    histogram = np.zeros((CELLS, CELLS, ORIENTATIONS))
    for above in (0, 1):
        part = place - below if above else 1 - (place - below)
        np.add.at(histogram, (rows, columns, (below + above) % ORIENTATIONS), strength * part)
    evened: Array = histogram / (np.linalg.norm(histogram, axis=-1, keepdims=True) + _FLAT)
    return evened.ravel()


def _unit(vector: Array) -> Array:
    length = np.linalg.norm(vector)
    unit: Array = vector / length if length else vector
    return unit


class Gallery:
    """Several views of every object; each object is recognised among its own fixed distractors."""

    def __init__(self, views: Mapping[int, Sequence[Identity]], size: int) -> None:
        """Keep the views.

        Args:
            views: number of an object -> its views; at least `size` objects.
            size: objects that one is recognised among, itself included.
        """
        assert len(views) >= size
        self.views, self.size = views, size

    def distractors(self, number: int) -> list[int]:
        """Return the numbers of the objects that one is recognised among."""
        candidates = sorted(self.views.keys() - {number})
        chosen = np.random.default_rng(number).permutation(len(candidates))[: self.size - 1]
        return [candidates[i] for i in chosen]

    def recognised(self, query: Identity, number: int) -> dict[str, bool]:
        """Return, for each of `PARTS`, whether the object is more similar than every distractor.

        The similarity to an object is that to the most similar of its views. A tie is a mistake.
        """
        similarities = {
            each: [query.similarity(view) for view in self.views[each]]
            for each in (number, *self.distractors(number))
        }
        best = {
            part: {each: max(view[part] for view in views) for each, views in similarities.items()}
            for part in PARTS
        }
        return {
            part: all(values[number] > value for each, value in values.items() if each != number)
            for part, values in best.items()
        }
