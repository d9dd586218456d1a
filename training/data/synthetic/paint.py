"""Draws colours and textures of objects.

A wrap picture is float32 (3, H, W), linear light 0..1; its width goes once around the object, row 0 is its
top.
"""

from __future__ import annotations

import colorsys
import string
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from training.data.synthetic.batches import Table, table

Array = NDArray[np.float32]
Colour = tuple[int, int, int]

HEIGHT = 256  # pixels of a wrap picture; a box face is as wide, a round body three times
MARKS = ("disc", "ring", "star", "heart", "bolt", "diamond", "cross", "moon", "letter", "smile")


def linear(colours: NDArray[np.uint8] | Colour) -> Array:
    """Converts 8-bit sRGB to linear light, with the square as transfer curve."""
    return np.square(np.asarray(colours, np.float32) / 255)


def palette(rng: Generator, count: int) -> list[Colour]:
    """Chooses colours that go together: hues a step from each other, light and dark in turn."""
    hue, step = rng.random(), rng.choice([0.5, 0.33, 0.42, 0.12])
    dark_first = rng.integers(2)
    colours = []
    for index in range(count):
        tone = (index + dark_first) % 2
        saturation = rng.uniform(0.55, 0.95) if rng.random() < 0.8 else rng.uniform(0.0, 0.2)
        value = rng.uniform(0.35, 0.7) if tone else rng.uniform(0.8, 1.0)
        r, g, b = colorsys.hsv_to_rgb((hue + index * step) % 1, saturation, value)
        colours.append((int(r * 255), int(g * 255), int(b * 255)))
    return colours


@dataclass(frozen=True)
class Texture:
    """A picture, linear light, that repeats along both axes."""

    texels: Table  # RGB of one row after the other
    height: int
    width: int

    def read(self, u: Tensor, v: Tensor) -> Tensor:
        """Reads colours (3, N) at positions (N,) in units of the picture's sides; bilinear."""
        x, y = u * self.width - 0.5, v * self.height - 0.5
        left, top = x.floor(), y.floor()
        (x0, x1), rows = _wrapped_pair(left, self.width), _wrapped_pair(top, self.height)
        across, read = x - left, self.texels.read
        starts = [row * self.width for row in rows]
        upper, lower = (torch.lerp(read(row + x0), read(row + x1), across) for row in starts)
        return torch.lerp(upper, lower, y - top)


def texture(picture: Array) -> Texture:
    """Makes a texture of a picture (3, H, W)."""
    columns = np.ascontiguousarray(picture.reshape(3, -1))
    return Texture(table(torch.from_numpy(columns)), *picture.shape[1:])


def _wrapped_pair(places: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Returns the index at whole places of an axis that repeats after `count`, and the one behind it."""
    index = places.int().remainder_(count)
    behind = index + 1
    return index, behind.masked_fill_(behind == count, 0)


@lru_cache(maxsize=64)
def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own font, which is the same on every machine."""
    return ImageFont.load_default(size)


@dataclass(frozen=True)
class Cloth:
    """A wrap picture in the making."""

    picture: Image.Image
    draw: ImageDraw.ImageDraw
    colours: list[Colour]
    count: int  # repeats of a pattern over the height
    around: int  # repeats around the object

    @property
    def width(self) -> int:
        """Pixels around the object."""
        return self.picture.width


def bands(cloth: Cloth, rng: Generator) -> None:
    """Draws horizontal bands of different heights."""
    edges = np.sort(rng.integers(0, HEIGHT, 2 * cloth.count)).tolist()
    for index, (top, end) in enumerate(zip(edges[::2], edges[1::2], strict=True)):
        cloth.draw.rectangle((0, top, cloth.width, end), fill=cloth.colours[1 + index % 2])


def stripes(cloth: Cloth, _: Generator) -> None:
    """Draws upright stripes."""
    pitch = cloth.width / cloth.around / 2
    for index in range(2 * cloth.around):
        left = index * pitch
        cloth.draw.rectangle((left, 0, left + pitch / 2, HEIGHT), fill=cloth.colours[1 + index % 2])


def diagonal(cloth: Cloth, _: Generator) -> None:
    """Draws slanting stripes."""
    pitch = cloth.width / cloth.around
    for index in range(-cloth.around - cloth.count, cloth.around):
        left, right = index * pitch, (index + 0.5) * pitch
        corners = [(left, HEIGHT), (right, HEIGHT), (right + HEIGHT, 0), (left + HEIGHT, 0)]
        cloth.draw.polygon(corners, fill=cloth.colours[1])


def dots(cloth: Cloth, rng: Generator) -> None:
    """Draws dots in staggered rows."""
    pitch = cloth.width / (cloth.around + cloth.around // cloth.count)
    radius = pitch * rng.uniform(0.22, 0.4)
    for row in range(int(HEIGHT / pitch) + 2):
        for column in range(2 * cloth.around + 2):
            x, y = (column + 0.5 * (row % 2)) * pitch, (row + 0.3) * pitch
            around = (x - radius, y - radius, x + radius, y + radius)
            cloth.draw.ellipse(around, fill=cloth.colours[1 + row % 2])


def checks(cloth: Cloth, _: Generator) -> None:
    """Draws a chessboard."""
    side = cloth.width / (2 * cloth.around)
    for row in range(int(HEIGHT / side) + 1):
        for column in range(row % 2, 2 * cloth.around, 2):
            corners = (column * side, row * side, (column + 1) * side, (row + 1) * side)
            cloth.draw.rectangle(corners, fill=cloth.colours[1])


def waves(cloth: Cloth, rng: Generator) -> None:
    """Draws horizontal bands that swing or zigzag."""
    thick, x = HEIGHT // (2 * cloth.count), np.arange(cloth.width + 1)
    phase = x * cloth.around / cloth.width
    swing = np.abs((phase % 1) - 0.5) * 2 if rng.random() < 0.5 else 0.5 + 0.5 * np.sin(phase * 2 * np.pi)
    for index in range(cloth.count + 1):
        y = (index * 2 + swing) * thick
        upper, lower = (list(zip(x.tolist(), (y + edge).tolist(), strict=True)) for edge in (0, thick))
        cloth.draw.polygon(upper + lower[::-1], fill=cloth.colours[1 + index % 2])


def halves(cloth: Cloth, rng: Generator) -> None:
    """Draws one colour above, another below."""
    cloth.draw.rectangle((0, HEIGHT * rng.uniform(0.35, 0.65), cloth.width, HEIGHT), fill=cloth.colours[1])


def tartan(cloth: Cloth, _: Generator) -> None:
    """Draws two see-through gratings, one over the other."""
    weave = np.asarray(cloth.picture, np.float32)
    for axis, length in ((0, HEIGHT), (1, cloth.width)):
        thread = (np.arange(length) * 2 * cloth.count // HEIGHT) % 2 == 0
        shape = (length, 1, 1) if axis == 0 else (1, length, 1)
        dyed = 0.55 * weave + 0.45 * np.array(cloth.colours[1 + axis], np.float32)
        weave = np.where(thread.reshape(shape), dyed, weave)
    cloth.picture.paste(Image.fromarray(weave.astype(np.uint8)))


def plain(_cloth: Cloth, _rng: Generator) -> None:
    """Draws nothing but the ground."""


PATTERNS = (plain, bands, stripes, diagonal, dots, checks, waves, waves, halves, tartan)


def star(
    x: float, y: float, radius: float, points: int = 5, inner: float = 0.42
) -> list[tuple[float, float]]:
    """Corners of a star around (x, y), one tip up."""
    angles = np.arange(2 * points) * np.pi / points
    lengths = np.where(np.arange(2 * points) % 2 == 0, radius, inner * radius)
    return [
        (float(x + r * np.sin(a)), float(y - r * np.cos(a))) for a, r in zip(angles, lengths, strict=True)
    ]


def mark(
    draw: ImageDraw.ImageDraw, kind: str, x: float, y: float, size: float, inks: list[Colour], text: str
) -> None:
    """Draws one logo of radius `size` around (x, y) in inks[0], its inside in inks[1]."""
    around = (x - size, y - size, x + size, y + size)
    if kind == "disc":
        draw.ellipse(around, fill=inks[0])
    elif kind == "ring":
        draw.ellipse(around, outline=inks[0], width=max(int(size * 0.35), 2))
    elif kind == "star":
        draw.polygon(star(x, y, size * 1.15), fill=inks[0])
    elif kind == "heart":
        turn = np.linspace(0, 2 * np.pi, 40)
        across = 16 * np.sin(turn) ** 3
        up = 13 * np.cos(turn) - 5 * np.cos(2 * turn) - 2 * np.cos(3 * turn) - np.cos(4 * turn)
        draw.polygon(
            [(x + a * size / 16, y - u * size / 16) for a, u in zip(across, up, strict=True)], fill=inks[0]
        )
    elif kind == "bolt":
        corners = [(0.2, -1.1), (-0.7, 0.2), (-0.1, 0.2), (-0.3, 1.1), (0.7, -0.3), (0.1, -0.3)]
        draw.polygon([(x + a * size, y + b * size) for a, b in corners], fill=inks[0])
    elif kind == "diamond":
        draw.polygon(star(x, y, size * 1.1, 2, 0.75), fill=inks[0])
    elif kind == "cross":
        arm = size * 0.35
        draw.rectangle((x - arm, y - size, x + arm, y + size), fill=inks[0])
        draw.rectangle((x - size, y - arm, x + size, y + arm), fill=inks[0])
    elif kind == "moon":
        draw.ellipse(around, fill=inks[0])
        draw.ellipse((x - size * 0.4, y - size * 1.05, x + size * 1.4, y + size * 0.75), fill=inks[1])
    elif kind == "smile":
        draw.ellipse(around, fill=inks[0])
        for side in (-0.35, 0.35):
            draw.ellipse(
                (x + (side - 0.13) * size, y - 0.45 * size, x + (side + 0.13) * size, y - 0.1 * size),
                fill=inks[1],
            )
        draw.arc(
            (x - 0.55 * size, y - 0.5 * size, x + 0.55 * size, y + 0.6 * size),
            20,
            160,
            fill=inks[1],
            width=max(int(size * 0.14), 2),
        )
    else:
        draw.text(
            (x, y),
            text,
            fill=inks[0],
            font=font(int(size * (2.6 - 0.5 * len(text)))),
            anchor="mm",
            stroke_width=max(int(size * 0.07), 1),
            stroke_fill=inks[0],
        )


@dataclass(frozen=True)
class Wrap:
    """What is printed on an object."""

    picture: Array  # (3, HEIGHT, fronts * HEIGHT), linear light
    pattern: str  # name of one of PATTERNS
    mark: str  # one of MARKS, or empty


def wrap_picture(rng: Generator, colours: list[Colour], fronts: int) -> Wrap:
    """Draws a pattern, and marks on it so that some mark faces every side.

    Args:
        rng: source of every choice.
        colours: at least four; the first is the ground.
        fronts: how many marks go around: 1 for the face of a box, 3 for a round body.
    """
    width = HEIGHT * fronts
    picture = Image.new("RGB", (width, HEIGHT), colours[0])
    draw, count = ImageDraw.Draw(picture), int(rng.integers(2, 5))
    pattern = PATTERNS[rng.integers(len(PATTERNS))]
    pattern(Cloth(picture, draw, colours, count, count * fronts), rng)
    style = rng.choice(["none", "bare", "label", "badge"], p=[0.2, 0.3, 0.25, 0.25])
    if style == "none":
        return Wrap(linear(np.asarray(picture)).transpose(2, 0, 1), pattern.__name__, "")
    kind = str(rng.choice(MARKS))
    text = "".join(rng.choice(list(string.ascii_uppercase + string.digits), int(rng.integers(1, 3))))
    ink, ground = colours[3], colours[int(rng.integers(0, 2))]
    if abs(sum(ink) - sum(ground)) < 160:
        ink = (250, 250, 245) if sum(ground) < 380 else (25, 25, 35)
    size = HEIGHT * rng.uniform(0.22, 0.3)
    y = HEIGHT * rng.uniform(0.42, 0.6)
    for front in range(fronts):
        x = width * (front + 0.5) / fronts
        if style == "label":
            wide = width / fronts * 0.38
            draw.rectangle((x - wide, y - size * 1.35, x + wide, y + size * 1.35), fill=ground)
        elif style == "badge":
            draw.ellipse((x - size * 1.5, y - size * 1.5, x + size * 1.5, y + size * 1.5), fill=ground)
        mark(draw, kind, x, y, size, [ink, ground], text)
    return Wrap(linear(np.asarray(picture)).transpose(2, 0, 1), pattern.__name__, kind)
