"""Draws shapes from a random generator, with one function per kind of thing."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.random import Generator

from training.data.synthetic.shapes import (
    Shape,
    box,
    carve,
    cylinder,
    ellipsoid,
    gable,
    join,
    lathe,
    part,
    petals,
    several,
    shape,
    sphere,
    torus,
)


def mug(rng: Generator) -> Shape:
    """Draws a hollow cup with a handle."""
    radius, half = rng.uniform(0.42, 0.58), rng.uniform(0.45, 0.65)
    middle = (0.0, half, 0.0)
    wall = cylinder(middle, radius, half, rounding=0.04)
    body = carve(wall, cylinder((0, half + 0.1, 0), radius - 0.06, half))
    ring = torus((radius, half, 0), half * 0.5, 0.075, axis=2)
    handle = carve(ring, cylinder(middle, radius - 0.03, 2))
    return shape(
        "mug",
        (
            part(body, centre=middle, half=(radius, half, radius)),
            part(handle, colour=int(rng.integers(1, 3))),
        ),
        2 * half,
        radius + half * 0.6 + 0.1,
    )


def bottle(rng: Generator) -> Shape:
    """Draws a bottle with a coloured cap."""
    radius, neck = rng.uniform(0.3, 0.42), rng.uniform(0.1, 0.16)
    shoulder, top = rng.uniform(0.95, 1.2), rng.uniform(1.5, 1.65)
    heights = np.array([0, 0.04, shoulder, shoulder + 0.22, top])
    body = lathe(heights, np.array([radius - 0.05, radius, radius, neck, neck]))
    cap = cylinder((0, top + 0.08, 0), neck + 0.04, 0.1, rounding=0.03)
    wrap = part(body, centre=(0, shoulder / 2, 0), half=(radius, shoulder / 2, radius))
    return shape("bottle", (wrap, part(cap, colour=1)), top + 0.18, (top + 0.2) / 2 + 0.08)


def vase(rng: Generator) -> Shape:
    """Draws a vase with a free profile."""
    heights = np.linspace(0, rng.uniform(1.2, 1.6), 6)
    radii = rng.uniform(0.22, 0.58, 6)
    radii[0] = max(radii[0], 0.3)
    body = lathe(heights, radii)
    inner = np.linspace(0.12, heights[-1] + 0.1, 12)
    inside = lathe(inner, np.maximum(np.interp(inner, heights, radii) - 0.08, 0.04))
    wrap = part(carve(body, inside), centre=(0, heights[-1] / 2, 0), half=(0.5, heights[-1] / 2, 0.5))
    return shape("vase", (wrap,), float(heights[-1]), 1.02)


def ball(rng: Generator) -> Shape:
    """Draws a ball."""
    radius = rng.uniform(0.6, 0.8)
    wrap = part(sphere((0, radius, 0), radius), centre=(0, radius, 0), half=(radius,) * 3)
    return shape("ball", (wrap,), 2 * radius, radius + 0.01)


def carton(rng: Generator) -> Shape:
    """Draws a box: parcel, book, juice carton."""
    half = (rng.uniform(0.28, 0.7), rng.uniform(0.3, 0.75), rng.uniform(0.2, 0.6))
    middle = (0.0, half[1], 0.0)
    wrap = part(box(middle, half, rng.uniform(0.01, 0.12)), wrap="box", centre=middle, half=half)
    return shape("carton", (wrap,), 2 * half[1], float(np.linalg.norm(half)))


def cone(rng: Generator) -> Shape:
    """Draws a traffic cone on its plate."""
    height, radius = rng.uniform(1.1, 1.4), rng.uniform(0.42, 0.55)
    heights = np.array([0.06, height * 0.5, height])
    body = lathe(heights, np.array([radius, radius * 0.55, 0.08]))
    plate = box((0, 0.06, 0), (radius + 0.12, 0.06, radius + 0.12), 0.03)
    wrap = part(body, centre=(0, height / 2, 0), half=(radius, height / 2, radius))
    reach = float(np.linalg.norm((radius + 0.12, height / 2, radius + 0.12)))
    return shape("cone", (wrap, part(plate, colour=1)), height, reach)


def ring(rng: Generator) -> Shape:
    """Draws a lying ring: swim ring, doughnut."""
    minor = rng.uniform(0.22, 0.32)
    major = 0.92 - minor
    wrap = part(torus((0, minor, 0), major, minor), centre=(0, minor, 0), half=(1, minor, 1))
    return shape("ring", (wrap,), 2 * minor, 0.96)


def flower(rng: Generator) -> Shape:
    """Draws an upright plate with lobes: flower, star, cog."""
    count = int(rng.choice([3, 4, 5, 6, 8]))
    outer, inner = 0.72, rng.uniform(0.4, 0.55)
    half, power = rng.uniform(0.12, 0.22), rng.uniform(0.6, 1.6)
    plate = petals(count, inner, outer, half, outer, power)
    button = cylinder((0, outer, 0), inner * rng.uniform(0.4, 0.65), half + 0.05, axis=2, rounding=0.03)
    wrap = part(plate, wrap="box", centre=(0, outer, 0), half=(outer, outer, half))
    return shape("flower", (wrap, part(button, colour=1)), 2 * outer, outer + 0.06)


def bear(rng: Generator) -> Shape:
    """Draws a toy animal: body, head, ears, snout, feet."""
    head_radius, ear = rng.uniform(0.34, 0.42), rng.uniform(0.12, 0.19)
    spread, lift = rng.uniform(0.6, 0.8), rng.uniform(0.6, 1.5)
    body = ellipsoid((0, 0.5, 0), (0.46, 0.5, 0.42))
    head = sphere((0, 1.12, 0), head_radius)
    ears = [
        ellipsoid((s * head_radius * spread, 1.12 + head_radius * 0.85, 0), (ear, ear * lift, ear * 0.7))
        for s in (-1, 1)
    ]
    snout = ellipsoid((0, 1.04, head_radius * 0.85), (0.17, 0.13, 0.14))
    eyes = [sphere((s * 0.15, 1.2, head_radius * 0.87), 0.055) for s in (-1, 1)]
    feet = [ellipsoid((s * 0.3, 0.13, 0.34), (0.17, 0.13, 0.22)) for s in (-1, 1)]
    parts = [
        part(body, centre=(0, 0.5, 0), half=(0.46, 0.5, 0.42)),
        part(join(head, join(ears[0], ears[1], 0.02), 0.08), colour=1),
        part(join(join(feet[0], feet[1], 0.02), snout, 0.02), colour=2),
        part(join(eyes[0], eyes[1], 0.01), colour=3),
    ]
    height = 1.12 + head_radius * 0.85 + ear * lift
    return shape("bear", tuple(parts), height, float(np.hypot(height / 2, 0.64)))


def car(rng: Generator) -> Shape:
    """Draws a toy car: body, cabin, four wheels, seen from its side."""
    length, height = rng.uniform(0.75, 0.9), rng.uniform(0.18, 0.26)
    wheel, wide = rng.uniform(0.16, 0.22), rng.uniform(0.3, 0.4)
    middle = (0.0, wheel + height, 0.0)
    body = box(middle, (length, height, wide), 0.1)
    where = rng.uniform(-0.2, 0.2)
    cabin_half = (length * rng.uniform(0.4, 0.6), 0.2, wide * 0.85)
    cabin = box((where, wheel + 2 * height + 0.14, 0), cabin_half, 0.12)
    parts = [
        part(body, wrap="box", centre=middle, half=(length, height, wide)),
        part(cabin, colour=1),
    ]
    places = [(end, side) for end in (-1, 1) for side in (-1, 1)]
    tyres, hubs = (
        several(
            [
                cylinder((end * length * 0.6, wheel, side * out), radius, half, axis=2, rounding=edge)
                for end, side in places
            ]
        )
        for out, radius, half, edge in ((wide, wheel, 0.07, 0.03), (wide + 0.05, wheel * 0.5, 0.05, 0.0))
    )
    parts += [part(tyres, colour=3), part(hubs, colour=2)]
    tall = wheel + 2 * height + 0.34
    return shape("car", tuple(parts), tall, float(np.linalg.norm((length, tall / 2, wide + 0.1))))


def house(rng: Generator) -> Shape:
    """Draws a toy house: walls, a gable roof, a chimney."""
    half = (rng.uniform(0.4, 0.55), rng.uniform(0.3, 0.42), rng.uniform(0.35, 0.5))
    eaves, pitch = 2 * half[1], rng.uniform(0.8, 1.2)
    middle = (0.0, half[1], 0.0)
    walls = box(middle, half, 0.01)
    over, ridge = half[0] + 0.1, eaves + pitch * (half[0] + 0.1)
    roof = gable(pitch, ridge, eaves, half[2] + 0.08)
    top = eaves + pitch * over * 0.65
    chimney = box((over * 0.5, top, half[2] * 0.3), (0.08, 0.26, 0.08), 0.01)
    parts = (
        part(walls, wrap="box", centre=middle, half=half),
        part(roof, colour=1),
        part(chimney, colour=2),
    )
    height = max(ridge, top + 0.26)
    return shape("house", parts, height, float(np.linalg.norm((over, height / 2, half[2] + 0.08))))


def teapot(rng: Generator) -> Shape:
    """Draws a pot with spout, handle, lid and knob."""
    radius, tall = rng.uniform(0.5, 0.6), rng.uniform(0.85, 1.05)
    heights = np.array([0, 0.05, tall * 0.45, tall * 0.9, tall])
    body = lathe(heights, np.array([radius * 0.7, radius * 0.8, radius, radius * 0.55, radius * 0.45]))
    handle = carve(
        torus((-radius, tall * 0.55, 0), tall * 0.3, 0.07, axis=2),
        cylinder((0, tall / 2, 0), radius * 0.85, tall),
    )
    spout = ellipsoid((radius * 1.15, tall * 0.58, 0), (0.34, 0.13, 0.12))
    lid = ellipsoid((0, tall, 0), (radius * 0.5, 0.12, radius * 0.5))
    knob = sphere((0, tall + 0.16, 0), 0.09)
    parts = (
        part(body, centre=(0, tall / 2, 0), half=(radius, tall / 2, radius)),
        part(join(handle, spout, 0.02), colour=1),
        part(lid, colour=2),
        part(knob, colour=1),
    )
    return shape("teapot", parts, tall + 0.25, radius * 1.15 + 0.36)


def tin(rng: Generator) -> Shape:
    """Draws a tin or a drum: cylinder with rims."""
    radius, half = rng.uniform(0.42, 0.62), rng.uniform(0.4, 0.7)
    middle = (0.0, half, 0.0)
    rims = join(torus((0, 0.04, 0), radius, 0.045), torus((0, 2 * half - 0.04, 0), radius, 0.045), 0.01)
    wrap = part(cylinder(middle, radius, half, rounding=0.03), centre=middle, half=(radius, half, radius))
    return shape("tin", (wrap, part(rims, colour=1)), 2 * half, float(np.hypot(radius + 0.05, half)) + 0.02)


def mushroom(rng: Generator) -> Shape:
    """Draws a stem under a cap that carries the markings; a lamp, by another name."""
    tall, wide = rng.uniform(0.7, 1.0), rng.uniform(0.6, 0.75)
    dome = rng.uniform(0.4, 0.6)
    heights = np.array([0, 0.06, tall * 0.5, tall])
    stem = lathe(heights, np.array([0.32, 0.3, 0.2, 0.2]))
    cap = carve(ellipsoid((0, tall, 0), (wide, dome, wide)), box((0, tall - 1, 0), (2, 1, 2)))
    wrap = part(cap, centre=(0, tall + dome / 2, 0), half=(wide, dome / 2, wide))
    return shape("mushroom", (wrap, part(stem, colour=1)), tall + dome, (tall + dome) / 2 + 0.25)


CATALOGUE: tuple[Callable[[Generator], Shape], ...] = (
    mug, bottle, vase, ball, carton, cone, ring, flower, bear, car, house, teapot, tin, mushroom,
)  # fmt: skip
