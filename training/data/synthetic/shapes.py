"""Defines solids as signed distance functions, one or many at once.

A shape is a handful of parts; a part is a solid, a way of wrapping a picture around it, and which of the
object's colours it takes. Every shape stands on the plane y = 0 around the y axis and is about as large as a
ball of radius 1. A solid holds its numbers as tensors (..., B), see `batches`; B is 1, or the number of
points.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from training.data.synthetic.batches import Table, abreast, structure, table

Triple = tuple[float, float, float]


class Solid(Protocol):
    """Anything that knows how far it is away."""

    def distance(self, p: Tensor) -> Tensor:
        """Computes signed distances (N,), lower bounds outside, of points (3, N): x right, y up, z to the
        viewer; float32."""


def number(value: float) -> Tensor:
    """Makes a number (1,) of a batch of one, float32."""
    return torch.tensor([value], dtype=torch.float32)


def vector(x: float, y: float, z: float) -> Tensor:
    """Makes a vector (3, 1) of a batch of one, float32."""
    return torch.tensor([[x], [y], [z]], dtype=torch.float32)


def length(p: Tensor) -> Tensor:
    """Computes the length (N,) of vectors (3, N); PyTorch's own norm is slow over a short axis."""
    x, y, z = p.unbind()
    return (x * x).addcmul_(y, y).addcmul_(z, z).sqrt_()


def hypotenuse(a: Tensor, b: Tensor) -> Tensor:
    """Computes the length (N,) of vectors of two components (N,); PyTorch's own takes twice as long."""
    return (a * a).addcmul_(b, b).sqrt_()


@dataclass(frozen=True)
class Ellipsoid:
    """The distance is a lower bound: the scaled ball's times the smallest radius."""

    centre: Tensor  # (3, B)
    radii: Tensor  # (3, B)
    smallest: Tensor  # (B,)

    def distance(self, p: Tensor) -> Tensor:
        """Computes signed distances."""
        return length((p - self.centre).div_(self.radii)).mul_(self.smallest).sub_(self.smallest)


@dataclass(frozen=True)
class Sphere:
    """A ball."""

    centre: Tensor  # (3, B)
    radius: Tensor  # (B,)

    def distance(self, p: Tensor) -> Tensor:
        """Computes signed distances."""
        return length(p - self.centre).sub_(self.radius)


@dataclass(frozen=True)
class Box:
    """A box with rounded edges."""

    centre: Tensor  # (3, B)
    half: Tensor  # (3, B), without the rounding
    rounding: Tensor  # (B,)

    def distance(self, p: Tensor) -> Tensor:
        """Computes signed distances."""
        q = (p - self.centre).abs_().sub_(self.half)
        inside = q.amax(0).clamp_(max=0)
        return length(q.clamp_(min=0)).add_(inside).sub_(self.rounding)


@dataclass(frozen=True)
class Cylinder:
    """A cylinder along an axis (0 x, 1 y, 2 z) with rounded rims."""

    centre: Tensor  # (3, B)
    radius: Tensor  # (B,), without the rounding
    half: Tensor  # (B,), without the rounding
    rounding: Tensor  # (B,)
    axis: int

    def distance(self, p: Tensor) -> Tensor:
        """Computes signed distances."""
        first, second, along = _around(p - self.centre, self.axis)
        across, along = hypotenuse(first, second).sub_(self.radius), along.abs_().sub_(self.half)
        inside = torch.maximum(across, along).clamp_(max=0)
        return hypotenuse(across.clamp_(min=0), along.clamp_(min=0)).add_(inside).sub_(self.rounding)


@dataclass(frozen=True)
class Torus:
    """A ring about an axis."""

    centre: Tensor  # (3, B)
    major: Tensor  # (B,)
    minor: Tensor  # (B,)
    axis: int

    def distance(self, p: Tensor) -> Tensor:
        """Computes signed distances."""
        first, second, along = _around(p - self.centre, self.axis)
        return hypotenuse(hypotenuse(first, second).sub_(self.major), along).sub_(self.minor)


@dataclass(frozen=True)
class Lathe:
    """A solid of revolution about y."""

    profile: Table  # per sample of height: the radius, how much it grows to the next, and the slack
    low: Tensor  # (B,), where the samples begin
    high: Tensor  # (B,), and end
    density: Tensor  # (B,), samples per unit
    samples: int

    def distance(self, p: Tensor) -> Tensor:
        """Computes signed distances."""
        x, y, z = p.unbind()
        place = (y - self.low).mul_(self.density).clamp_(0, self.samples - 1.001)
        radius, growth, slack = self.profile.read(place.int())
        side = hypotenuse(x, z).sub_(radius.addcmul_(growth, place.frac_())).mul_(slack)
        return torch.maximum(side, torch.maximum(self.low - y, y - self.high))


@dataclass(frozen=True)
class Petals:
    """An upright plate like a flower, a star or a cog: its radius swings from inner to outer."""

    count: Tensor  # (B,), as are the others
    inner: Tensor
    swing: Tensor
    half: Tensor
    middle: Tensor
    power: Tensor
    slack: Tensor

    def distance(self, p: Tensor) -> Tensor:
        """Computes signed distances."""
        x, y, z = p[0], p[1] - self.middle, p[2]
        wave = torch.atan2(x, y).mul_(self.count).cos_().mul_(0.5).add_(0.5)
        radius = wave.pow_(self.power).mul_(self.swing).add_(self.inner)
        return torch.maximum(hypotenuse(x, y).sub_(radius).mul_(self.slack), z.abs() - self.half)


@dataclass(frozen=True)
class Gable:
    """A roof whose ridge runs along z."""

    pitch: Tensor  # (B,), as are the others
    ridge: Tensor
    eaves: Tensor
    half: Tensor  # along z
    slack: Tensor

    def distance(self, p: Tensor) -> Tensor:
        """Computes signed distances."""
        slope = (p[1] + self.pitch * p[0].abs() - self.ridge) * self.slack
        return torch.maximum(torch.maximum(slope, self.eaves - p[1]), p[2].abs() - self.half)


@dataclass(frozen=True)
class Join:
    """A union of two solids whose seam is rounded."""

    first: Solid
    second: Solid
    seam: Tensor  # (2, B): its width, and a quarter of the inverse

    def distance(self, p: Tensor) -> Tensor:
        """Computes signed distances."""
        return _blended(self.first.distance(p), self.second.distance(p), self.seam)


@dataclass(frozen=True)
class JoinTwins:
    """The same of two solids that differ in their numbers alone."""

    both: Solid  # its numbers: (..., 2, B)
    seam: Tensor  # (2, B)

    def distance(self, p: Tensor) -> Tensor:
        """Computes signed distances."""
        first, second = self.both.distance(p[:, None])
        return _blended(first, second, self.seam)


def _blended(a: Tensor, b: Tensor, seam: Tensor) -> Tensor:
    width, quarter = seam
    overlap = (width - (a - b).abs_()).clamp_(min=0)
    return torch.minimum(a, b).sub_(overlap.mul_(overlap).mul_(quarter))


@dataclass(frozen=True)
class Several:
    """Solids that differ in their numbers alone."""

    solids: Solid  # their numbers: (..., K, B)

    def distance(self, p: Tensor) -> Tensor:
        """Computes signed distances."""
        return self.solids.distance(p[:, None]).amin(0)


@dataclass(frozen=True)
class Carve:
    """A solid without another one."""

    solid: Solid
    hollow: Solid

    def distance(self, p: Tensor) -> Tensor:
        """Computes signed distances."""
        return torch.maximum(self.solid.distance(p), -self.hollow.distance(p))


def _around(q: Tensor, axis: int) -> tuple[Tensor, Tensor, Tensor]:
    """Gives two components of vectors (3, N) across an axis, and the one along it."""
    first, second = (other for other in range(3) if other != axis)
    components = q.unbind()
    return components[first], components[second], components[axis]


def sphere(centre: Triple, radius: float) -> Solid:
    """Makes a ball."""
    return Sphere(vector(*centre), number(radius))


def ellipsoid(centre: Triple, radii: Triple) -> Solid:
    """Makes an ellipsoid."""
    return Ellipsoid(vector(*centre), vector(*radii), number(min(radii)))


def box(centre: Triple, half: Triple, rounding: float = 0.0) -> Solid:
    """Makes a box."""
    return Box(vector(*centre), vector(*half) - rounding, number(rounding))


def cylinder(centre: Triple, radius: float, half: float, axis: int = 1, rounding: float = 0.0) -> Solid:
    """Makes a cylinder."""
    inner = number(radius - rounding), number(half - rounding)
    return Cylinder(vector(*centre), *inner, number(rounding), axis)


def torus(centre: Triple, major: float, minor: float, axis: int = 1) -> Solid:
    """Makes a ring."""
    return Torus(vector(*centre), number(major), number(minor), axis)


def lathe(heights: NDArray[np.float64], radii: NDArray[np.float64], samples: int = 256) -> Solid:
    """Makes a solid of revolution with `radii` at `heights` (increasing), smooth between them.

    `rho - R(y)` is no distance where the profile is steep, so it is divided by the steepest slope nearby.
    """
    grid = np.linspace(heights[0], heights[-1], samples)
    # a short average over the polyline rounds its corners as a potter would
    kernel = np.hanning(samples // 12 + 2)[1:-1]
    padded = np.pad(np.interp(grid, heights, radii), len(kernel) // 2, mode="edge")
    profile = np.convolve(padded, kernel / kernel.sum(), mode="valid")[:samples]
    slope = np.abs(np.gradient(profile, grid))
    steepest = np.maximum.reduce([np.roll(slope, shift) for shift in range(-12, 13, 3)])
    growth = np.append(np.diff(profile), 0)
    rows = np.stack([profile, growth, 1 / np.sqrt(1 + steepest**2)]).astype(np.float32)
    density = number((samples - 1) / (grid[-1] - grid[0]))
    return Lathe(table(torch.from_numpy(rows)), number(grid[0]), number(grid[-1]), density, samples)


def petals(count: int, inner: float, outer: float, half: float, middle: float, power: float) -> Solid:
    """Makes a flower whose middle is at the height `middle`."""
    slack = 1 / np.sqrt(1 + (0.5 * count * (outer - inner) / max(inner, 0.2)) ** 2)
    return Petals(*map(number, (count, inner, outer - inner, half, middle, power, slack)))


def gable(pitch: float, ridge: float, eaves: float, half: float) -> Solid:
    """Makes a roof that rises by `pitch` per unit from the height `eaves` to `ridge`."""
    return Gable(*map(number, (pitch, ridge, eaves, half, 1 / np.hypot(1, pitch))))


def join(first: Solid, second: Solid, blend: float) -> Solid:
    """Makes a union whose seam is rounded over the width `blend`."""
    seam = torch.tensor([[blend], [0.25 / blend]], dtype=torch.float32)
    if structure(first) == structure(second):
        return JoinTwins(abreast([first, second]), seam)
    return Join(first, second, seam)


def several(solids: Sequence[Solid]) -> Solid:
    """Makes a union of solids that differ in their numbers alone."""
    return Several(abreast(solids))


def carve(solid: Solid, hollow: Solid) -> Solid:
    """Makes `solid` without `hollow`."""
    return Carve(solid, hollow)


@dataclass(frozen=True)
class Part:
    """One solid of a shape."""

    solid: Solid
    wrap: Literal["round", "box"]  # how a picture goes around it: about the y axis, or onto six faces
    colour: int  # 0: the object's wrap picture; 1, 2, 3: its plain accent colours
    centre: Tensor  # (3, B), middle of the part, origin of the wrap
    half: Tensor  # (3, B), half extents, scale of the wrap


def part(
    solid: Solid,
    wrap: Literal["round", "box"] = "round",
    colour: int = 0,
    centre: Triple = (0.0, 0.0, 0.0),
    half: Triple = (1.0, 1.0, 1.0),
) -> Part:
    """Makes a part; see `Part`."""
    return Part(solid, wrap, colour, vector(*centre), vector(*half))


@dataclass(frozen=True)
class Shape:
    """A named union of parts; the first one carries the wrap picture."""

    name: str
    parts: tuple[Part, ...]
    height: Tensor  # (B,), extent along y
    radius: Tensor  # (B,), of a sphere around its middle

    def distance(self, p: Tensor) -> Tensor:
        """Computes signed distances (N,) of points (3, N)."""
        return reduce(torch.minimum, [part.solid.distance(p) for part in self.parts])


def shape(name: str, parts: tuple[Part, ...], height: float, radius: float) -> Shape:
    """Makes a shape; see `Shape`."""
    return Shape(name, parts, number(height), number(radius))
