"""Solid shapes as signed distance functions.

A shape is a handful of parts; a part is a signed distance function over points of shape (3, N) (x right,
y up, z to the viewer; float32), a way of wrapping a picture around it, and which of the object's colours it
takes. Every shape stands on the plane y = 0 around the y axis and is about as large as a ball of radius 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
Distance = Callable[[Array], Array]


@dataclass(frozen=True)
class Part:
    """One solid of a shape."""

    distance: Distance  # points (3, N) -> signed distance (N,), a lower bound outside
    wrap: Literal["round", "box"] = (
        "round"  # how a picture goes around it: about the y axis, or onto six faces
    )
    colour: int = 0  # 0: the object's wrap picture; 1, 2: its plain accent colours
    centre: tuple[float, float, float] = (0.0, 0.0, 0.0)  # middle of the part, origin of the wrap
    half: tuple[float, float, float] = (1.0, 1.0, 1.0)  # half extents, scale of the wrap


@dataclass(frozen=True)
class Shape:
    """A named union of parts; `height` is its extent along y, `radius` that of a sphere around its middle."""

    name: str
    parts: tuple[Part, ...]
    height: float
    radius: float


def vector(x: float, y: float, z: float) -> Array:
    """Makes a column (3, 1) of float32 that broadcasts against points (3, N)."""
    return np.array([[x], [y], [z]], np.float32)


def length(p: Array) -> Array:
    """Computes the length (N,) of vectors (3, N); written out, because a sum over a short axis is slow."""
    x, y, z = p
    result: Array = np.sqrt(x * x + y * y + z * z)
    return result


def sphere(centre: tuple[float, float, float], radius: float) -> Distance:
    """Makes a ball."""
    c, r = vector(*centre), np.float32(radius)
    return lambda p: length(p - c) - r


def ellipsoid(centre: tuple[float, float, float], radii: tuple[float, float, float]) -> Distance:
    """Makes an ellipsoid; the distance is a lower bound: the scaled ball's times the smallest radius."""
    c, r = vector(*centre), vector(*radii)
    smallest = np.float32(min(radii))

    def distance(p: Array) -> Array:
        result: Array = (length((p - c) / r) - 1) * smallest
        return result

    return distance


def box(
    centre: tuple[float, float, float], half: tuple[float, float, float], rounding: float = 0.0
) -> Distance:
    """Makes a box with rounded edges."""
    c = vector(*centre)
    h = vector(*half) - np.float32(rounding)

    def distance(p: Array) -> Array:
        q = np.abs(p - c) - h
        inside = np.minimum(np.maximum(np.maximum(q[0], q[1]), q[2]), 0)
        result: Array = length(np.maximum(q, 0)) + inside - np.float32(rounding)
        return result

    return distance


def cylinder(
    centre: tuple[float, float, float], radius: float, half: float, axis: int = 1, rounding: float = 0.0
) -> Distance:
    """Makes a cylinder along `axis` (0 x, 1 y, 2 z) with rounded rims."""
    c = vector(*centre)
    first, second = [a for a in range(3) if a != axis]

    def distance(p: Array) -> Array:
        q = p - c
        across = np.sqrt(np.square(q[first]) + np.square(q[second])) - np.float32(radius - rounding)
        along = np.abs(q[axis]) - np.float32(half - rounding)
        outside = np.sqrt(np.square(np.maximum(across, 0)) + np.square(np.maximum(along, 0)))
        result: Array = outside + np.minimum(np.maximum(across, along), 0) - np.float32(rounding)
        return result

    return distance


def torus(centre: tuple[float, float, float], major: float, minor: float, axis: int = 1) -> Distance:
    """Makes a ring about `axis`."""
    c = vector(*centre)
    first, second = [a for a in range(3) if a != axis]

    def distance(p: Array) -> Array:
        q = p - c
        across = np.sqrt(np.square(q[first]) + np.square(q[second])) - np.float32(major)
        result: Array = np.sqrt(np.square(across) + np.square(q[axis])) - np.float32(minor)
        return result

    return distance


def lathe(heights: NDArray[np.float64], radii: NDArray[np.float64], samples: int = 256) -> Distance:
    """Makes a solid of revolution about y with `radii` at `heights` (increasing), smooth between them.

    `rho - R(y)` is no distance where the profile is steep, so it is divided by the steepest slope nearby.
    """
    grid = np.linspace(heights[0], heights[-1], samples)
    # a short average over the polyline rounds its corners as a potter would
    kernel = np.hanning(samples // 12 + 2)[1:-1]
    padded = np.pad(np.interp(grid, heights, radii), len(kernel) // 2, mode="edge")
    profile = np.convolve(padded, kernel / kernel.sum(), mode="valid")[:samples]
    slope = np.abs(np.gradient(profile, grid))
    steepest = np.maximum.reduce([np.roll(slope, shift) for shift in range(-12, 13, 3)])
    table = profile.astype(np.float32)
    slack = (1 / np.sqrt(1 + steepest**2)).astype(np.float32)
    low, high = np.float32(grid[0]), np.float32(grid[-1])
    per_height = np.float32((samples - 1) / (grid[-1] - grid[0]))

    def distance(p: Array) -> Array:
        x, y, z = p
        index = np.clip((y - low) * per_height, 0, samples - 1.001)
        whole = index.astype(np.intp)
        fraction = index - whole
        radius = table.take(whole) * (1 - fraction) + table[1:].take(whole) * fraction
        side = (np.sqrt(x * x + z * z) - radius) * slack.take(whole)
        result: Array = np.maximum(side, np.maximum(low - y, y - high))
        return result

    return distance


def petals(count: int, inner: float, outer: float, half: float, middle: float, power: float) -> Distance:
    """Makes an upright plate like a flower, a star or a cog: its radius swings from inner to outer."""
    turns = np.float32(count)
    slack = np.float32(1 / np.sqrt(1 + (0.5 * count * (outer - inner) / max(inner, 0.2)) ** 2))

    def distance(p: Array) -> Array:
        x, y, z = p[0], p[1] - np.float32(middle), p[2]
        wave = 0.5 + 0.5 * np.cos(np.arctan2(x, y) * turns)
        radius = inner + (outer - inner) * wave ** np.float32(power)
        result: Array = np.maximum((np.sqrt(x * x + y * y) - radius) * slack, np.abs(z) - np.float32(half))
        return result

    return distance


def join(first: Distance, second: Distance, blend: float) -> Distance:
    """Makes a union whose seam is rounded over the width `blend`."""
    width = np.float32(blend)

    def distance(p: Array) -> Array:
        a, b = first(p), second(p)
        overlap = np.maximum(width - np.abs(a - b), 0) / width
        result: Array = np.minimum(a, b) - overlap * overlap * width * np.float32(0.25)
        return result

    return distance


def carve(solid: Distance, hollow: Distance) -> Distance:
    """Makes `solid` without `hollow`."""
    return lambda p: np.maximum(solid(p), -hollow(p))
