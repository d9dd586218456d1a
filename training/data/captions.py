"""Captions pictures of rendered objects, like "a red mug with dots on wood".

An object stands alone before a ground. How much a caption says differs, so that "a mug" is any mug on any
ground; some are empty, for classifier-free guidance.

The command draws held-out objects as subjects: a folder of pictures each, named by its number and its class.

examples:
    python -m training.data.captions build/subjects --objects 20
"""

from __future__ import annotations

import argparse
import colorsys
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image

from runtime.imaging.boxes import Box
from training.data.pairs import Picture
from training.data.subject import random_place, without_place
from training.data.synthetic.catalogue import CATALOGUE
from training.data.synthetic.objects import ObjectSpec, make_object
from training.data.synthetic.paint import MARKS, Colour
from training.data.synthetic.rendering import developed
from training.data.synthetic.scenes import Material, bricks, checks, grass, surface_picture, tiles, wood
from training.data.synthetic.views import HELD_OUT, reference_view

PLAIN: Mapping[str, int] = {"on white": 255, "on black": 0}
TEXTURED: Mapping[str, Material] = {
    "on grass": grass,
    "on wood": wood,
    "on tiles": tiles,
    "on a chessboard": checks,
    "before bricks": bricks,
}
PLACES = (*PLAIN, *TEXTURED)
"""Grounds, as captions call them."""

PATTERNS: Mapping[str, str] = {
    "bands": "bands",
    "stripes": "stripes",
    "diagonal": "slanting stripes",
    "dots": "dots",
    "checks": "checks",
    "waves": "waves",
    "halves": "two halves",
    "tartan": "tartan",
}
"""What the renderer calls a pattern -> what captions call it; a plain one is not mentioned."""

HUES = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink")
_HUE_ENDS = (0.04, 0.11, 0.19, 0.44, 0.54, 0.7, 0.81, 0.94)

_TEXTURES, _GROUND = 24, 0.5
"""Pictures of each texture, and the share of one that is seen."""

_VIEWS = 4
"""Views of an object, one after the other."""

_SMALLEST = 0.7
"""Side of an object's square, as a share of the picture's, at least."""

ANY_PLACE = 0.5
"""Share of the places to draw that do not depend on where the object is."""

DROPPED, SAID = 0.1, 0.5
"""Share of captions that are empty, and of the others that name the place."""


def colour_name(colour: Colour) -> str:
    """Names an 8-bit sRGB colour in one word."""
    hue, saturation, value = colorsys.rgb_to_hsv(*(channel / 255 for channel in colour))
    if saturation < 0.22:
        return "white" if value > 0.75 else "grey" if value > 0.25 else "black"
    return next((name for name, end in zip(HUES, _HUE_ENDS) if hue < end), HUES[0])


def describe(spec: ObjectSpec, details: int, place: str = "") -> str:
    """Says what an object is.

    Args:
        spec: the object.
        details: 0 for what it is, 1 with its colour, 2 with pattern and mark.
        place: one of `PLACES`, or empty.
    """
    words = ["a", spec.shape.name]
    if details > 0:
        words.insert(1, colour_name(spec.colours[0]))
    if details > 1:
        said = [PATTERNS[spec.pattern]] if spec.pattern in PATTERNS else []
        said += [f"a {spec.mark}"] if spec.mark else []
        words += ["with", " and ".join(said)] if said else []
    return " ".join([*words, place]).strip()


def words_of_captions() -> list[str]:
    """Lists the words that captions have, each as often as it is a choice."""
    nouns = [maker.__name__ for maker in CATALOGUE]
    colours = [*HUES, "white", "grey", "black"]
    phrases = [f"a {colour} {noun}" for colour, noun in product(colours, nouns)]
    phrases += [f"{noun} {place}" for noun, place in product(nouns, PLACES)]
    phrases += [f"with {pattern} and" for pattern in PATTERNS.values()]
    phrases += [f"with a {mark}" for mark in MARKS]
    return " ".join(phrases).split()


@lru_cache(maxsize=len(TEXTURED) * _TEXTURES)
def _texture(material: Callable[..., Any], number: int) -> Picture:
    picture = surface_picture(material, np.random.default_rng([number, 6]))
    return developed(torch.from_numpy(picture)).numpy()


def ground(place: str, side: int, rng: Generator) -> Picture:
    """Draws a ground (side, side, 3)."""
    if place in PLAIN:
        return np.full((side, side, 3), PLAIN[place], np.uint8)
    texture = _texture(TEXTURED[place], int(rng.integers(_TEXTURES)))
    seen = round(len(texture) * _GROUND)
    left, top = rng.integers(len(texture) - seen + 1, size=2).tolist()
    box = (left, top, left + seen, top + seen)
    return np.asarray(Image.fromarray(texture).resize((side, side), Image.Resampling.BOX, box))


def captioned_view(seed: int, number: int, place: str, side: int) -> Picture:
    """Draws view `number` of object `seed` before a ground, (side, side, 3)."""
    rng = np.random.default_rng([seed, 6, number])
    box = _object_box(rng, side)
    view = reference_view(seed, number, box.width)
    picture = Image.fromarray(ground(place, side, rng))
    picture.paste(Image.fromarray(view.image), (box.x0, box.y0), Image.fromarray(view.mask))
    return np.asarray(picture)


def _object_box(rng: Generator, side: int) -> Box:
    """Draws the square that an object has in its picture."""
    size = int(rng.integers(round(_SMALLEST * side), side + 1))
    left, top = rng.integers(side - size + 1, size=2).tolist()
    return Box(left, top, left + size, top + size)


def place_to_draw(seed: int, number: int, side: int, rng: Generator) -> NDArray[np.bool_]:
    """Draws a place in `captioned_view`: as often all of the object as any place.

    Returns:
        (side, side), True where an inpainting model draws.
    """
    if rng.random() < ANY_PLACE:
        return random_place(rng, side)
    place = np.zeros((side, side), np.bool_)
    place[_object_box(np.random.default_rng([seed, 6, number]), side).slices] = True
    return place


class CaptionedViews:
    """The endless dataset of objects 0..N-1 with captions; after every picture its mirror image."""

    def __init__(
        self, objects: int, side: int, encode: Callable[[str], list[int]], seed: int, inpaints: bool = False
    ) -> None:
        """Takes what is drawn.

        Args:
            objects: their number.
            side: of the pictures.
            encode: encodes a caption.
            seed: of places and captions.
            inpaints: whether the model also sees the pictures without the place that it draws.
        """
        self._objects, self._side, self._encode, self._seed = objects, side, encode, seed
        self._inpaints = inpaints

    def __getitem__(self, number: int) -> dict[str, NDArray[Any]]:
        """Gives `picture` (3, R, R) float32, -1..1, and `ids` (77,) int64; for a model that inpaints also
        `mask` and `surroundings`, see `without_place`."""
        picture, caption = self.draw(number)
        values = picture.transpose(2, 0, 1).astype(np.float32) / 127.5 - 1
        sample = {"picture": values, "ids": np.array(self._encode(caption), np.int64)}
        if self._inpaints:
            row, view, mirrored = self._find(number)
            rng = np.random.default_rng([self._seed, number, 2])
            place = place_to_draw(row, view, self._side, rng)
            sample |= without_place(picture, place[:, ::-1] if mirrored else place)
        return sample

    def _find(self, number: int) -> tuple[int, int, bool]:
        """Returns object and view of a number, and whether it is mirrored."""
        index, mirrored = divmod(number, 2)
        return index // _VIEWS % self._objects, index % _VIEWS, bool(mirrored)

    def draw(self, number: int) -> tuple[Picture, str]:
        """Gives picture (R, R, 3) and caption."""
        row, view, mirrored = self._find(number)
        # the place is the same for both, the caption is not
        place = PLACES[int(np.random.default_rng([self._seed, number // 2, 1]).integers(len(PLACES)))]
        picture = _drawn(row, view, place, self._side)
        rng = np.random.default_rng([self._seed, number])
        said = place if rng.random() < SAID else ""
        caption = describe(make_object(row), int(rng.integers(3)), said)
        if rng.random() < DROPPED:
            caption = ""
        return picture[:, ::-1] if mirrored else picture, caption


_drawn = lru_cache(maxsize=2)(captioned_view)


def draw_subjects(folder: Path, objects: int, views: int, side: int) -> None:
    """Writes views of held-out objects, each before another ground: FOLDER/NUMBER-CLASS/VIEW.png."""
    for number in range(objects):
        spec = make_object(HELD_OUT + number)
        own = folder / f"{number:02d}-{spec.shape.name}"
        own.mkdir(parents=True, exist_ok=True)
        for view in range(views):
            picture = captioned_view(spec.seed, view, PLACES[(number + view) % len(PLACES)], side)
            Image.fromarray(picture).save(own / f"{view}.png")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns 0, or 2 if the folder cannot be written."""
    parser = argparse.ArgumentParser(
        prog="python -m training.data.captions",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, help="where the pictures go")
    parser.add_argument("--objects", type=int, default=20, help="default: %(default)s")
    parser.add_argument("--views", type=int, default=5, help="of each; default: %(default)s")
    parser.add_argument("--side", type=int, default=64, help="of a picture, in pixels; default: %(default)s")
    options = parser.parse_args(arguments)
    if min(options.objects, options.views, options.side) < 1:
        parser.error("--objects, --views and --side are at least 1")
    try:
        draw_subjects(options.folder, options.objects, options.views, options.side)
    except OSError as error:
        print(f"captions: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
