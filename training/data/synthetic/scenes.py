"""Places to stand an object in: a floor, a wall behind it, a light and a camera."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.random import Generator
from numpy.typing import NDArray
from torch import Tensor

from training.data.synthetic.paint import Texture, linear, palette, texture
from training.data.synthetic.shapes import length, number, vector

Array = NDArray[np.float32]

TILE = 256  # pixels of a surface picture, which repeats


@dataclass(frozen=True)
class Surface:
    """A picture that repeats over a plane."""

    picture: Texture  # (TILE, TILE)
    size: Tensor  # (B,), length of one repeat in the units of the scene

    def read(self, across: Tensor, along: Tensor) -> Tensor:
        """Reads colours (3, N) at positions (N,) in the units of the scene."""
        return self.picture.read(across / self.size, along / self.size)


@dataclass(frozen=True)
class Camera:
    """A pinhole camera above the z axis that looks along -z, and down."""

    eye: Tensor  # (3, B)
    sine: Tensor  # (B,), as are the others: of the angle by which it looks down
    cosine: Tensor
    spread: Tensor  # half the picture's shorter side at distance 1: the tangent of half the angle of view

    def rays(self, columns: Tensor, rows: Tensor, size: tuple[int, int]) -> Tensor:
        """Computes directions (3, N), of length 1, of rays through pixels of a picture (width, height)."""
        scale = 2 * self.spread / min(size)
        x, y = (columns - size[0] / 2) * scale, (size[1] / 2 - rows) * scale
        rays = torch.stack([x, y * self.cosine - self.sine, -y * self.sine - self.cosine])
        return rays.div_(length(rays))


def camera(distance: float, elevation: float, aim: float, spread: float) -> Camera:
    """Makes a camera that looks at (0, aim, 0) from a distance, `elevation` radians above the horizon."""
    sine, cosine = math.sin(elevation), math.cos(elevation)
    eye = vector(0, aim + distance * sine, distance * cosine)
    return Camera(eye, number(sine), number(cosine), number(spread))


@dataclass(frozen=True)
class Light:
    """One far light and what comes from all sides."""

    direction: Tensor  # (3, B), unit, towards the light
    colour: Tensor  # (3, B)
    ambient: Tensor  # (3, B)


@dataclass(frozen=True)
class Scene:
    """Everything but the objects; a batch, see `batches`."""

    floor: Surface
    wall: Surface
    wall_distance: Tensor  # (B,), the wall stands at z = -wall_distance
    camera: Camera
    light: Light


@lru_cache(maxsize=32)
def _filter(roughness: float, stretch: float) -> Array:
    """Returns the factors for the frequencies of white noise, (TILE, TILE / 2 + 1)."""
    vertical = np.fft.fftfreq(TILE)[:, None] * TILE
    horizontal = np.fft.rfftfreq(TILE)[None, :] * TILE * stretch
    frequency = np.sqrt(vertical**2 + horizontal**2)
    frequency[0, 0] = np.inf
    result: Array = (frequency**-roughness).astype(np.float32)
    return result


def noise(rng: Generator, roughness: float = 1.5, stretch: float = 1.0) -> Array:
    """Makes tileable noise (TILE, TILE) of mean 0 and variance 1; spectrum: frequency ** -roughness."""
    spectrum = np.fft.rfft2(rng.standard_normal((TILE, TILE), dtype=np.float32))
    field = np.fft.irfft2(spectrum * _filter(roughness, stretch), s=(TILE, TILE))
    result: Array = (field / field.std()).astype(np.float32)
    return result


def mix(first: Array, second: Array, amount: Array | float) -> Array:
    """Blends two colours (3,), or pictures (3, TILE, TILE), by a field (TILE, TILE) in 0..1."""
    first, second = (c.reshape(3, *(c.shape[1:] or (1, 1))) for c in (first, second))
    result: Array = first + (second - first) * np.clip(amount, 0, 1, dtype=np.float32)
    return result


def grid(count: int, joint: float, offset: bool) -> tuple[Array, NDArray[np.intp]]:
    """Joints (1 on the joint, else 0) and tile numbers of a masonry with `count` tiles along a repeat."""
    row = np.arange(TILE) * count / TILE
    column = np.arange(TILE)[None, :] * (count / 2 if offset else count) / TILE
    column = column + (0.5 * (row.astype(int) % 2))[:, None] if offset else np.repeat(column, TILE, 0)
    width = joint * (0.5 if offset else 1)
    joints = ((row % 1 < joint)[:, None] | (column % 1 < width)).astype(np.float32)
    columns = count // 2 if offset else count
    return joints, (row.astype(int)[:, None] * columns + column.astype(int) % columns).astype(np.intp)


Colours = tuple[Array, Array, Array]  # base, other and a light grey, each (3,)


def wood(rng: Generator, _: Colours) -> Array:
    """Draws grain that runs along the repeat's rows."""
    light, dark = linear((196, 148, 96)), linear((112, 68, 36))
    light, dark = light * np.float32(rng.uniform(0.5, 1.2)), dark * np.float32(rng.uniform(0.5, 1.2))
    return mix(light, dark, 0.5 + 0.22 * noise(rng, 1.2, 0.08))


def planks(rng: Generator, colours: Colours) -> Array:
    """Boards of wood."""
    joints, number = grid(int(rng.choice([4, 6])), 0.03, True)
    tone = rng.uniform(0.75, 1.15, 64).astype(np.float32)[number]
    return wood(rng, colours) * (tone * (1 - 0.6 * joints))


def tiles(rng: Generator, colours: Colours) -> Array:
    """Draws square tiles with dark joints."""
    joints, number = grid(int(rng.choice([3, 4, 6])), 0.05, False)
    tone = rng.uniform(0.88, 1.08, 64).astype(np.float32)[number]
    return mix(colours[0] * np.float32(1.05), colours[1] * np.float32(0.5), joints) * tone


def bricks(rng: Generator, colours: Colours) -> Array:
    """Bricks with pale joints."""
    joints, number = grid(8, 0.12, True)
    tone = rng.uniform(0.7, 1.15, 64).astype(np.float32)[number] + 0.06 * noise(rng, 0.8)
    brick = linear((168, 88, 66)) if rng.random() < 0.5 else colours[1]
    return mix(brick, colours[2], joints) * tone


def checks(rng: Generator, colours: Colours) -> Array:
    """Draws a chessboard."""
    cell = np.arange(TILE) * int(rng.choice([4, 6, 8])) // TILE
    odd = ((cell[:, None] + cell) % 2).astype(np.float32)
    return mix(colours[0], colours[1] * np.float32(0.6), odd)


def marble(rng: Generator, colours: Colours) -> Array:
    """Draws dark veins in pale stone."""
    veins = np.exp(-np.abs(noise(rng, 1.6)) * 6)
    cloud = 0.7 * veins + 0.06 * noise(rng, 1.0)
    return mix(colours[0] * np.float32(1.1), colours[1] * np.float32(0.4), cloud)


def carpet(rng: Generator, colours: Colours) -> Array:
    """Draws fine grain with a few worn places."""
    picture = mix(colours[0], colours[1], 0.5 + 0.3 * noise(rng, 0.2))
    return picture * (1 + 0.1 * noise(rng, 1.5))


def grass(rng: Generator, _: Colours) -> Array:
    """Draws a lawn."""
    return mix(linear((92, 140, 52)), linear((40, 84, 30)), 0.5 + 0.3 * noise(rng, 0.7, 2.0))


def stripes(rng: Generator, colours: Colours) -> Array:
    """Draws upright stripes."""
    stripe = np.arange(TILE) * 2 * int(rng.choice([4, 8, 12])) // TILE % 2
    return mix(colours[0], colours[1], np.tile(stripe.astype(np.float32), (TILE, 1)))


def panels(_: Generator, colours: Colours) -> Array:
    """Draws upright boards with dark joints."""
    to_joint = np.abs((np.arange(TILE) * 6 / TILE) % 1 - 0.5)
    joint = np.tile((to_joint > 0.47).astype(np.float32), (TILE, 1))
    return mix(colours[0], colours[0] * np.float32(0.45), joint)


def blur(rng: Generator, colours: Colours) -> Array:
    """Draws patches of colour that are out of focus."""
    strong = [linear(c) for c in palette(rng, 2)]
    return mix(mix(strong[0], strong[1], 0.5 + 0.5 * noise(rng, 2.2)), colours[2], 0.6)


def plaster(rng: Generator, colours: Colours) -> Array:
    """Draws a rough coat of paint."""
    return mix(colours[0], colours[1], 0.3 + 0.18 * noise(rng, 1.0))


def plain(rng: Generator, colours: Colours) -> Array:
    """Draws one colour, nearly even."""
    return mix(colours[0], colours[1], 0.1 * noise(rng, 2.5))


Material = Callable[[Generator, Colours], Array]
FLOORS: tuple[Material, ...] = (wood, tiles, checks, marble, carpet, plain, planks)
OUTDOOR_FLOORS: tuple[Material, ...] = (grass, marble, carpet, planks)
WALLS: tuple[Material, ...] = (plain, plaster, bricks, stripes, tiles, panels, blur)


def surface_picture(material: Material, rng: Generator) -> Array:
    """Draws a floor or wall in colours that suit a room, (3, TILE, TILE), linear light."""
    # rooms are paler than the things in them: pull the colours to a common light grey or beige
    grey = linear((np.array([225, 215, 200]) * rng.uniform(0.55, 1.0)).astype(np.uint8))
    base, other = (grey + (linear(c) - grey) * np.float32(rng.uniform(0.05, 0.55)) for c in palette(rng, 2))
    result: Array = np.clip(material(rng, (base, other, grey)), 0.003, 1)
    return result


def surface(material: Material, size: float, rng: Generator) -> Surface:
    """Makes a floor or wall whose repeat is `size` long."""
    return Surface(texture(surface_picture(material, rng)), number(size))


def sky_picture(rng: Generator) -> Array:
    """Draws a sky with clouds over a line of hills; row 0 is its top, the last row the horizon."""
    height = np.linspace(1, 0, TILE, dtype=np.float32)[:, None].repeat(TILE, 1)
    low, high = linear((214, 228, 240)), linear((96, 152, 214))
    if rng.random() < 0.3:
        low, high = linear((250, 200, 150)), linear((110, 110, 180))
    clouds = np.clip(noise(rng, 1.7, 0.4) - 0.3, 0, 1) * height
    picture: Array = mix(low, high, height) * (1 - clouds) + clouds
    for shade, level in ((0.9, 0.13), (0.6, 0.06)):
        ridge = level + 0.025 * noise(rng, 1.8)[0]
        hill = linear((120, 150, 130)) * np.float32(shade)
        picture = mix(picture, hill, (height < ridge).astype(np.float32))
    return picture


def make_light(rng: Generator) -> Light:
    """Makes a light from above and before, warm or cold."""
    turn, lift = rng.uniform(-1.2, 1.2), rng.uniform(0.6, 1.15)
    direction = vector(math.sin(turn) * math.cos(lift), math.sin(lift), math.cos(turn) * math.cos(lift))
    warmth = rng.uniform(-0.08, 0.1)
    colour = vector(1 + warmth, 1, 1 - warmth) * rng.uniform(0.65, 0.95)
    ambient = vector(1 - warmth, 1, 1 + warmth) * rng.uniform(0.28, 0.5)
    return Light(direction, colour, ambient)


def make_scene(seed: int) -> Scene:
    """Makes the scene of a number: the same on every call."""
    rng = np.random.default_rng([seed, 2])
    if rng.random() < 0.25:
        floor = surface(OUTDOOR_FLOORS[rng.integers(len(OUTDOOR_FLOORS))], rng.uniform(1.6, 3.5), rng)
        wall, wall_distance = Surface(texture(sky_picture(rng)), number(9.0)), 6.0
    else:
        floor = surface(FLOORS[rng.integers(len(FLOORS))], rng.uniform(1.6, 3.5), rng)
        wall = surface(WALLS[rng.integers(len(WALLS))], rng.uniform(1.8, 3.6), rng)
        wall_distance = rng.uniform(1.6, 3.2)
    distance, elevation = rng.uniform(4.5, 6.0), rng.uniform(0.2, 0.55)
    seen = camera(distance, elevation, rng.uniform(0.45, 0.75), rng.uniform(0.3, 0.36))
    return Scene(floor, wall, number(wall_distance), seen, make_light(rng))
