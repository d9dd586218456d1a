"""Traces objects in their places: what rays hit, by sphere tracing, and how it looks there."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from training.data.synthetic.batches import chosen, take
from training.data.synthetic.objects import Paint
from training.data.synthetic.paint import HEIGHT
from training.data.synthetic.scenes import Light
from training.data.synthetic.shapes import Part, Shape, length

STEPS = 40
"""Sphere tracing gives up after so many steps; grazing rays are the slow ones."""

NEAR = 0.004
"""A ray this near to a surface, in units of the scene, has hit it."""

SORTED = (2, 4, 6, 9, 13, 20, STEPS)
"""Steps after which the rays that have stopped are left out: most of them are fast."""


@dataclass(frozen=True)
class Pose:
    """Where an object stands on the floor, and how."""

    x: float = 0.0
    z: float = 0.0
    yaw: float = 0.0  # radians about the upright axis
    scale: float = 1.0


@dataclass(frozen=True)
class Body:
    """An object in its place, or several of one structure: a batch, see `batches`."""

    shape: Shape
    paint: Paint
    offset: Tensor  # (3, B), of its foot in the scene
    sine: Tensor  # (B,), of the yaw
    cosine: Tensor  # (B,)
    scale: Tensor  # (B,)

    @property
    def radius(self) -> Tensor:
        """The radius (B,) of a sphere around the body."""
        return self.shape.radius * self.scale

    def turned(self, v: Tensor, back: bool = False) -> Tensor:
        """Turns vectors (3, N) of the scene to the object's axes, or back."""
        (x, y, z), sine = v.unbind(), -self.sine if back else self.sine
        across, along = self.cosine * x - sine * z, sine * x + self.cosine * z
        return torch.stack([across, y.expand_as(across), along])

    def inside(self, points: Tensor) -> Tensor:
        """Converts scene coordinates (3, N) to the object's own."""
        return self.turned(points - self.offset).div_(self.scale)

    def span(self, origin: Tensor, rays: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
        """Computes where unit rays (3, N), or cones that widen by `slope`, may meet the body: start and end.

        The end is before the start where they cannot.
        """
        towards = self.offset - origin
        towards[1] += self.shape.height / 2 * self.scale
        along = dot(towards, rays)
        gap = (self.radius + slope * along).square() - (dot(towards, towards) - along * along)
        half = gap.clamp(min=0).sqrt_()
        return along - half, torch.where(gap > 0, along + half, -math.inf)


def trace(bodies: Body, origin: Tensor, rays: Tensor, start: Tensor, end: Tensor, slope: Tensor) -> Tensor:
    """Finds where rays stop, by sphere tracing.

    A ray stands for a cone whose radius grows by `slope`: it stops as soon as the cone may touch, at a
    depth where nothing in the cone has touched yet. A thin ray has slope 0.

    Args:
        bodies: N, of each ray the one that it may hit.
        origin: of the rays, (3, N), in the scene.
        rays: (3, N), of length 1.
        start, end: depths (N,) between which they may hit.
        slope: (N,).

    Returns:
        Depths (N,), infinite where nothing is hit.
    """
    many = bodies.scale.shape[-1] > 1
    fixed = bodies.shape, bodies.scale, NEAR * bodies.scale, bodies.inside(origin), slope
    numbers = torch.arange(len(start), device=start.device)
    flying = bodies.turned(rays).div_(bodies.scale), start, end, numbers
    stopped, going = torch.full_like(start, math.inf), chosen(start < end)
    for first, last in zip((0, *SORTED), SORTED):
        if not len(going):
            break
        if len(going) < len(flying[-1]):
            flying, fixed = take(flying, going), take(fixed, going) if many else fixed
        (way, depth, end, number), (shape, scale, near, eye, slope) = flying, fixed
        for _ in range(first, last):
            free = shape.distance(torch.addcmul(eye, way, depth)).mul_(scale).addcmul_(depth, slope, value=-1)
            hit = free < near
            depth = depth + free.masked_fill_(hit, 0)  # a ray that has hit stays where it is, to hit again
        flying, before = (way, depth, end, number), depth < end
        stopped.index_copy_(0, number, torch.where(hit & before, depth, math.inf))
        going = chosen(before > hit)
    return stopped


_CORNERS = torch.tensor([(1.0, -1, -1), (-1, -1, 1), (-1, 1, -1), (1, 1, 1)])[..., None]


def normals(bodies: Body, own: Tensor) -> Tensor:
    """Computes unit normals (3, N), in objects' coordinates, from four distances around each point."""
    total = torch.zeros_like(own)
    for corner in _CORNERS.to(own.device):
        total.addcmul_(corner, bodies.shape.distance(own + corner * 0.004))
    return total.div_(length(total).clamp_(min=1e-6))


def albedo(bodies: Body, own: Tensor, normals: Tensor) -> Tensor:
    """Computes the colours (3, N) of surfaces at points in objects' coordinates."""
    parts = bodies.shape.parts
    nearest, colour = parts[0].solid.distance(own), torch.zeros_like(own[0], dtype=torch.int64)
    for part in parts[1:]:
        distance = part.solid.distance(own)
        colour.masked_fill_(distance < nearest, part.colour)
        nearest = torch.minimum(nearest, distance)
    colours = bodies.paint.accents.read(colour)
    painted = chosen(colour == 0)
    some = take(bodies, painted)
    at = (v.index_select(1, painted) for v in (own, normals))
    return colours.index_copy_(1, painted, wrapped(some.shape.parts[0], some.paint, *at))


def wrapped(part: Part, paint: Paint, own: Tensor, normals: Tensor) -> Tensor:
    """Reads the wrap picture on a part: around the y axis, or on the face that the normal points to."""
    x, y, z = (own - part.centre).div_(part.half)
    v = 0.5 - 0.5 * y
    if part.wrap == "round":
        inset = 0.5 / HEIGHT
        return paint.wrap.read(torch.atan2(x, z) / (2 * math.pi) + 0.5, v.clamp_(inset, 1 - inset))
    steepest, sign = normals.abs(), normals.sign()
    at_side = (steepest[0] >= steepest[1]) & (steepest[0] >= steepest[2])
    at_top = ~at_side & (steepest[1] >= steepest[2])
    u = torch.where(at_side, -z * sign[0], torch.where(at_top, x, x * sign[2]))
    v = torch.where(at_top, 0.5 + 0.5 * z, v)
    return paint.wrap.read((0.5 + 0.5 * u).clamp_(0.002, 0.998), v.clamp_(0.002, 0.998))


def shade(bodies: Body, light: Light, origin: Tensor, rays: Tensor, depths: Tensor) -> Tensor:
    """Computes the light (3, N) from points (N,) on rays: ambient with occlusion, diffuse, a highlight.

    Bodies, light, origin (3, N) and unit rays (3, N) are those of each point.
    """
    points = torch.addcmul(origin, rays, depths)
    own = bodies.inside(points)
    own_normals = normals(bodies, own)
    colours = albedo(bodies, own, own_normals)
    upright = bodies.turned(own_normals, back=True)
    # how soon the surface comes back when we leave it along the normal: creases and the foot get dark
    reach = 0.12
    open_sky = bodies.shape.distance(own + own_normals * reach).div_(reach).clamp_(0, 1)
    foot = (points[1] / (0.25 * bodies.scale)).clamp_(0, 1)
    occlusion = (0.35 + 0.65 * open_sky) * (0.55 + 0.45 * foot)
    facing = dot(upright, light.direction).clamp_(0, 1)
    from_above = 0.65 + 0.35 * upright[1]
    half_way = light.direction - rays
    half_way.div_(length(half_way))
    gloss = bodies.paint.gloss
    shine = dot(upright, half_way).clamp_(0, 1).pow_(12 + 60 * gloss).mul_(0.12 + 0.4 * gloss)
    diffuse = light.ambient * (from_above * occlusion) + light.colour * facing
    return colours * diffuse + light.colour * (shine * (facing > 0))


def dot(first: Tensor, second: Tensor) -> Tensor:
    """Computes scalar products (N,) of vectors (3, N)."""
    x, y, z = (first * second).unbind()
    return x.add_(y).add_(z)
