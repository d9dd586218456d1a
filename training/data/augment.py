"""Changes an object before it is put back into its picture: IMPRINT's T and P (section 3.2).

T is a geometric change and P one of colour and light. Without them a network that sees an object and the
picture it was cut from would learn to paste it. What they are exactly is not published; their strengths are
those of ObjectStitch's public reimplementation (Rotate 20, Perspective 0.01 to 0.1, ColorJitter 0.3).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from runtime.errors import InputError
from runtime.imaging.boxes import bounding_box
from runtime.imaging.masks import MASK_THRESHOLD
from training.data.pairs import Shot
from training.ranges import check_least, check_shares

LUT_NODES = 5
"""Per axis of a colour look-up table."""

CURVE, TEMPERATURE, SATURATION, HUE = 0.15, 0.1, 0.3, 0.05
"""Most by which P moves a curve's inner knots, scales red against blue, changes the saturation, and turns the
hue (a share of the circle)."""

MOST_MOVED = 0.5
"""Sides of its box below which a corner moves: two that move as far meet."""

LUMA = np.array([0.299, 0.587, 0.114])
"""Shares of red, green and blue in grey (ITU-R BT.601)."""


@dataclass(frozen=True)
class Augmentation:
    """How much an object is changed. Its size needs none: the room around a reference is drawn anyway."""

    rotation: float = 20.0
    """Most degrees, either way."""
    perspective: float = 0.5
    """Probability that its corners move, each on its own."""
    corners: tuple[float, float] = (0.01, 0.1)
    """By how much then at most, in sides of its box: drawn between these."""
    colour: float = 1.0
    """Strength of the change of colour and light; 0 for none."""

    def __post_init__(self) -> None:
        """Refuses numbers that no change can have.

        Raises:
            InputError: names the setting.
        """
        check_least(self, 0, "rotation", "colour")
        check_shares(self, "perspective")
        low, high = self.corners
        if not 0 <= low <= high < MOST_MOVED:
            raise InputError(
                f"corners is [{low:g}, {high:g}]; expected two numbers from 0 to below {MOST_MOVED:g}, the "
                "lower first"
            )


def augment_object(shot: Shot, rules: Augmentation, rng: Generator) -> Shot:
    """Changes shape, colour and light of the object in a picture: P(T(object)).

    Returns:
        The object's box and what surrounds it, on black.
    """
    moved = transform_object(shot, rules, rng)
    if not rules.colour:
        return moved
    table = ImageFilter.Color3DLUT(LUT_NODES, random_lut(rng, rules.colour).ravel())
    return Shot(np.asarray(Image.fromarray(moved.image).filter(table)), moved.mask)


def transform_object(shot: Shot, rules: Augmentation, rng: Generator) -> Shot:
    """Rotates the object in its box, and moves the corners of the box (T)."""
    box = bounding_box(shot.mask)
    sides = np.array([box.width, box.height], float)
    corners = np.array([[0, 0], [1, 0], [1, 1], [0, 1]]) * sides
    angle = np.deg2rad(rng.uniform(-rules.rotation, rules.rotation))
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    moved = (corners - sides / 2) @ turn.T
    if rng.random() < rules.perspective:
        moved += rng.uniform(-1, 1, (4, 2)) * rng.uniform(*rules.corners) * sides
    moved -= moved.min(0)
    width, height = (int(side) for side in np.maximum(np.ceil(moved.max(0).round(6)), 1))
    where = tuple(homography(moved, corners))
    image, mask = (
        Image.fromarray(np.ascontiguousarray(plane[box.slices])).transform(
            (width, height), Image.Transform.PERSPECTIVE, where, Image.Resampling.BILINEAR
        )
        for plane in (shot.image, shot.mask.astype(np.uint8) * 255)
    )
    return Shot(np.asarray(image), np.asarray(mask) > MASK_THRESHOLD)


def homography(before: NDArray[np.float64], after: NDArray[np.float64]) -> NDArray[np.float64]:
    """Computes the projective map that takes four points to four others, (4, 2) of (x, y) each.

    Returns:
        a to h of x' = (a x + b y + c) / (g x + h y + 1), y' = (d x + e y + f) / (g x + h y + 1), as Pillow's
        `Image.transform` takes them, from the new picture's coordinates to the old one's.
    """
    rows = []
    for (x, y), (u, v) in zip(before, after, strict=True):
        rows += [[x, y, 1, 0, 0, 0, -u * x, -u * y], [0, 0, 0, x, y, 1, -v * x, -v * y]]
    solution: NDArray[np.float64] = np.linalg.solve(np.array(rows), after.ravel()).astype(np.float64)
    return solution


def random_lut(rng: Generator, strength: float = 1.0) -> NDArray[np.float64]:
    """Draws a 3-D colour look-up table (P): a curve per colour, then a mix of the three.

    Returns:
        (N, N, N, 3) in 0..1: the colour at blue, green and red node; strength 0 changes nothing.
    """
    nodes = np.linspace(0, 1, LUT_NODES)
    curves = nodes + np.zeros((3, 1))
    curves[:, 1:-1] += strength * rng.uniform(-CURVE, CURVE, (3, LUT_NODES - 2))
    curves = np.maximum.accumulate(curves.clip(0, 1), axis=1)  # brighter stays brighter
    blue, green, red = np.meshgrid(curves[2], curves[1], curves[0], indexing="ij")
    colours = np.stack([red, green, blue], axis=-1)
    warmth = strength * rng.uniform(-TEMPERATURE, TEMPERATURE)
    colours = colours * [1 + warmth, 1, 1 - warmth]
    grey = (colours @ LUMA)[..., None]
    colours = grey + (1 + strength * rng.uniform(-SATURATION, SATURATION)) * (colours - grey)
    table: NDArray[np.float64] = np.clip(colours @ _hue_turn(strength * rng.uniform(-HUE, HUE)).T, 0, 1)
    return table


def _hue_turn(share: float) -> NDArray[np.float64]:
    """Returns the rotation of colours around the grey axis by a share of the circle (Rodrigues' formula)."""
    cosine, sine = np.cos(2 * np.pi * share), np.sin(2 * np.pi * share) / np.sqrt(3)
    across = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]])
    turn: NDArray[np.float64] = cosine * np.eye(3) + (1 - cosine) / 3 + sine * across
    return turn
