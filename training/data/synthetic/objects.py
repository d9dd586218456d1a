"""Defines objects by their number, which determines everything about them."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import torch
from torch import Tensor

from training.data.synthetic.batches import Table, structure, table
from training.data.synthetic.catalogue import CATALOGUE
from training.data.synthetic.paint import Colour, Texture, linear, palette, texture, wrap_picture
from training.data.synthetic.shapes import Shape, number

_FRONTS = {"round": 3, "box": 1}
"""How many marks go around a part."""


@dataclass(frozen=True)
class Paint:
    """How the surfaces of objects look, a batch; see `batches`."""

    wrap: Texture  # (HEIGHT, 3 HEIGHT) for round parts, (HEIGHT, HEIGHT) for the faces of a box
    accents: Table  # linear light of the colours 0 (unused), 1, 2 and 3 of the parts
    gloss: Tensor  # (B,), 0 matt .. 1 shiny


@dataclass(frozen=True)
class ObjectSpec:
    """One thing: a shape with its own paint."""

    seed: int
    shape: Shape
    paint: Paint
    colours: tuple[Colour, ...]  # of the wrap; the first is its ground
    pattern: str  # see paint.Wrap
    mark: str

    @cached_property
    def drawn(self) -> tuple[Shape, Paint]:
        """What its pictures show, a batch of one."""
        return self.shape, self.paint

    @cached_property
    def kind(self) -> Hashable:
        """Is equal for objects that can be drawn together."""
        return structure(self.drawn)


@lru_cache(maxsize=256)
def make_object(seed: int) -> ObjectSpec:
    """Makes the object of a number: the same on every call."""
    rng = np.random.default_rng([seed, 1])
    shape = CATALOGUE[int(rng.integers(len(CATALOGUE)))](rng)
    colours = palette(rng, 5)
    source = np.random.default_rng(int(rng.integers(2**32)))
    wrap = wrap_picture(source, colours, _FRONTS[shape.parts[0].wrap])
    accents = np.stack([linear(c) for c in (colours[0], colours[4], colours[2], (30, 28, 34))], 1)
    paint = Paint(texture(wrap.picture), table(torch.from_numpy(accents)), number(rng.uniform(0, 1)))
    return ObjectSpec(seed, shape, paint, tuple(colours), wrap.pattern, wrap.mark)
