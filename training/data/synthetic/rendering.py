"""Renders objects and scenes to pictures, many at once, on any device.

Bodies of one structure are drawn together, whatever picture they are in.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Sequence
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from training.data.synthetic.batches import chosen, moved, stack, take
from training.data.synthetic.bodies import Body, Pose, shade, trace
from training.data.synthetic.objects import ObjectSpec
from training.data.synthetic.rooms import Group, draw_rooms
from training.data.synthetic.scenes import Camera, Light, Scene, camera

Picture = NDArray[np.uint8]
Placed = tuple[ObjectSpec, Pose]
Size = tuple[int, int]  # width, height
_Thing = TypeVar("_Thing")

CPU = torch.device("cpu")

SAMPLES = 2
"""Rays per pixel along each axis."""

CELL = 4
"""Pixels along each axis that share one coarse ray."""

PICTURE_BYTES = 18 << 20
"""Memory that a picture of 160 x 160 pixels takes while it is drawn with others; measured."""

SHARE = 1 / 16
"""Of a card's memory, for one process that draws: several do, beside others that train."""


@torch.inference_mode()
def render_pictures(
    scenes: Sequence[Scene],
    placed: Sequence[Sequence[Placed]],
    size: Size,
    device: torch.device = CPU,
    at_once: int = 0,
) -> tuple[Tensor, list[Tensor]]:
    """Draws pictures of scenes with objects in them.

    Args:
        scenes: F of them.
        placed: of each scene, its objects and where they stand; any number.
        size: of the pictures, in pixels.
        device: where they are drawn.
        at_once: how many are drawn together; 0 for as many as suit the device.

    Returns:
        Pictures (F, H, W, 3), and for each its objects' shares of each pixel, (K, H, W), 0..255; all uint8.
    """
    pictures: list[Tensor] = []
    masks: list[Tensor] = []
    for some in slices(len(scenes), at_once or suitable(device)):
        drawn, shares = _draw(scenes[some], placed[some], size, device)
        pictures.append(developed(drawn))
        objects = [len(things) for things in placed[some]]
        masks += (shares * 255 + 0.5).to(torch.uint8).split_with_sizes(objects)
    return torch.cat(pictures), masks


@torch.inference_mode()
def render_cutouts(
    specs: Sequence[ObjectSpec],
    yaws: Sequence[float],
    elevations: Sequence[float],
    lights: Sequence[Light],
    size: int,
    device: torch.device = CPU,
    at_once: int = 0,
) -> Tensor:
    """Draws objects, each alone in a square: uint8 RGBA (N, S, S, 4), colours not multiplied with alpha.

    Args:
        specs: the objects.
        yaws: radians by which each is turned.
        elevations: radians from which each is looked down at.
        lights: on each.
        size: of the pictures, in pixels.
        device: where they are drawn.
        at_once: how many are drawn together; 0 for as many as suit the device.
    """
    pictures = []
    for some in slices(len(specs), at_once or suitable(device)):
        cameras = [
            camera(6.0, elevation, float(spec.shape.height) / 2, float(spec.shape.radius) / 5.8)
            for spec, elevation in zip(specs[some], elevations[some], strict=True)
        ]
        placed = [[(spec, Pose(yaw=yaw))] for spec, yaw in zip(specs[some], yaws[some], strict=True)]
        looking, lit = moved(stack(cameras), device), moved(stack(lights[some]), device)
        drawn = torch.empty(4, len(placed), size, size, device=device)
        for group in _groups(placed, device):
            seen = take(looking, group.pictures), take(lit, group.pictures)
            drawn[:, group.pictures] = draw_bodies(group.bodies, *seen, (size, size))
        straight = developed(drawn[:3] / drawn[3].clamp(min=1e-3))
        alpha = (drawn[3] * 255 + 0.5).to(torch.uint8)
        pictures.append(torch.cat([straight, alpha[..., None]], -1))
    return torch.cat(pictures)


def developed(light: Tensor) -> Tensor:
    """Converts linear light (3, ...) to 8-bit sRGB (..., 3)."""
    return (light.clamp(0, 1).sqrt_() * 255 + 0.5).to(torch.uint8).movedim(0, -1).contiguous()


def slices(count: int, at_once: int) -> Iterator[slice]:
    """Divides pictures into those that are drawn together."""
    return (slice(start, start + at_once) for start in range(0, count, at_once))


def suitable(device: torch.device) -> int:
    """Counts the pictures that suit a device when they are drawn together.

    On a card as many as fit: it launches as many kernels for few as for many. On a processor each is drawn
    alone: what it works on stays in its caches.
    """
    if device.type != "cuda":
        return 1
    memory = torch.cuda.get_device_properties(device).total_memory
    return max(int(SHARE * memory / PICTURE_BYTES), 1)


def _gathered(things: Sequence[_Thing], device: torch.device) -> _Thing:
    """Makes a batch in a device's memory; things that come several times are there once."""
    different = {id(thing): thing for thing in things}
    batch = moved(stack(list(different.values())), device)
    numbers = {key: number for number, key in enumerate(different)}
    which = torch.tensor([numbers[id(thing)] for thing in things], device=device)
    return take(batch, which)


def _groups(placed: Sequence[Sequence[Placed]], device: torch.device) -> list[Group]:
    """Collects what is drawn together: bodies of one structure, in all pictures."""
    kinds: dict[Hashable, list[tuple[ObjectSpec, Pose, int, int]]] = {}
    number = 0
    for picture, things in enumerate(placed):
        for spec, pose in things:
            kinds.setdefault(spec.kind, []).append((spec, pose, picture, number))
            number += 1
    return [_group(members, device) for members in kinds.values()]


def _from_front(placed: Sequence[Sequence[Placed]]) -> list[tuple[list[int], list[int]]]:
    """Ranks objects by how near they are: numbers of those in front and of their pictures, then the next.

    Of objects at one depth the last one stands in front.
    """
    ranks: list[tuple[list[int], list[int]]] = []
    first = 0
    for picture, things in enumerate(placed):
        far_first = sorted(range(len(things)), key=lambda index: things[index][1].z)
        for rank, index in enumerate(reversed(far_first)):
            if rank == len(ranks):
                ranks.append(([], []))
            ranks[rank][0].append(first + index)
            ranks[rank][1].append(picture)
        first += len(things)
    return ranks


def _group(members: Sequence[tuple[ObjectSpec, Pose, int, int]], device: torch.device) -> Group:
    specs, poses, pictures, numbers = zip(*members, strict=True)
    where = (torch.tensor(each, device=device) for each in (pictures, numbers))
    return Group(place(specs, poses, device), *where)


def place(specs: Sequence[ObjectSpec], poses: Sequence[Pose], device: torch.device = CPU) -> Body:
    """Puts objects of one structure in their places."""
    shape, paint = _gathered([spec.drawn for spec in specs], device)
    numbers = [(p.x, 0, p.z, math.sin(p.yaw), math.cos(p.yaw), p.scale) for p in poses]
    rows = torch.tensor(numbers, dtype=torch.float32).T.to(device)
    return Body(shape, paint, rows[:3], *rows[3:])


def _draw(
    scenes: Sequence[Scene], placed: Sequence[Sequence[Placed]], size: Size, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Draws the light (3, F, H, W), and the share of each pixel that each object covers, (N, H, W)."""
    batch, groups = _gathered(scenes, device), _groups(placed, device)
    width, height = size
    objects = torch.empty(4, sum(map(len, placed)), height, width, device=device)
    for group in groups:
        seen = take(batch.camera, group.pictures), take(batch.light, group.pictures)
        objects[:, group.numbers] = draw_bodies(group.bodies, *seen, size)
    light = torch.zeros(3, len(scenes), height, width, device=device)
    # the share of each pixel that nothing covers yet
    free = torch.ones(len(scenes), height, width, device=device)
    for numbers, pictures in _from_front(placed):
        which = torch.tensor(pictures, device=device)
        drawn, behind = objects[:, numbers], free[which]
        light[:, which] += drawn[:3] * behind
        free[which] = behind * (1 - drawn[3])
        objects[3, numbers] = drawn[3] * behind
    room = draw_rooms(batch, groups, size, free.flatten() > 0)
    return light.addcmul_(room.view_as(light), free), objects[3]


def draw_bodies(bodies: Body, cameras: Camera, lights: Light, size: Size) -> Tensor:
    """Draws bodies, each alone: premultiplied light and coverage, 0..1, (4, B, H, W).

    Spheres are traced twice: for cones of a cell each, then for the cells' rays from where the cone stopped.
    """
    width, height = size
    across, down = -(-width // CELL), -(-height // CELL)
    count = bodies.scale.shape[-1]
    cells = torch.arange(count * across * down, device=bodies.scale.device)
    owner, left, top = cells // (across * down), cells % across * CELL, cells // across % down * CELL
    some, seen = take(bodies, owner), take(cameras, owner)
    rays = seen.rays(left + CELL / 2, top + CELL / 2, size)
    # half the diagonal of a cell, with a little to spare for the picture's corners
    slope = 0.75 * CELL * 2 * seen.spread / min(size)
    stops = trace(some, seen.eye, rays, *some.span(seen.eye, rays, slope), slope)

    touched = chosen(stops.isfinite())
    x, y = _sample_places(cells.device)
    owner = owner[touched].repeat_interleave(len(x))
    some, seen, lit = take(bodies, owner), take(cameras, owner), take(lights, owner)
    columns, rows = (low[touched, None] + places for low, places in ((left, x), (top, y)))
    rays = seen.rays(columns.flatten(), rows.flatten(), size)
    thin = torch.zeros(1, device=cells.device)
    _, end = some.span(seen.eye, rays, thin)
    depths = trace(some, seen.eye, rays, stops[touched].repeat_interleave(len(x)), end, thin)

    hits = chosen(depths.isfinite())
    some, lit, eye = take(some, hits), take(lit, hits), take(seen.eye, hits)
    shaded = shade(some, lit, eye, rays.index_select(1, hits), depths[hits]).clamp_(max=1)
    samples = torch.zeros(4, len(depths), device=cells.device)
    samples.index_copy_(1, hits, torch.cat([shaded, torch.ones_like(shaded[:1])]))
    pixels = torch.zeros(4, len(cells), CELL**2, device=cells.device)
    pixels.index_copy_(1, touched, samples.view(4, -1, SAMPLES**2, CELL**2).mean(2))
    pictures = pixels.view(4, count, down, across, CELL, CELL).transpose(3, 4)
    return pictures.reshape(4, count, down * CELL, across * CELL)[..., :height, :width]


def _sample_places(device: torch.device) -> tuple[Tensor, Tensor]:
    """Columns and rows (64,), in pixels, of a cell's samples: the first of each pixel, the second ones."""
    sample = (torch.arange(SAMPLES, device=device)[:, None] + 0.5) / SAMPLES
    places = torch.arange(CELL, device=device) + sample  # (SAMPLES, CELL)
    rows = places[:, None, :, None].expand(SAMPLES, SAMPLES, CELL, CELL)
    return rows.transpose(0, 1).transpose(2, 3).flatten(), rows.flatten()


def render_all(scene: Scene, placed: Sequence[Placed], size: Size) -> tuple[Picture, list[Picture]]:
    """Draws a picture (H, W, 3) of a scene with objects, and for each its share of each pixel, (H, W)."""
    pictures, masks = render_pictures([scene], [placed], size)
    return pictures[0].numpy(), list(masks[0].numpy())


def render(scene: Scene, spec: ObjectSpec, pose: Pose, size: Size) -> tuple[Picture, Picture]:
    """Draws a picture (H, W, 3) of one object in a scene, and its mask (H, W): covered share times 255."""
    picture, masks = render_all(scene, [(spec, pose)], size)
    return picture, masks[0]


def render_background(scene: Scene, size: Size) -> Picture:
    """Draws the same room without any object."""
    return render_all(scene, [], size)[0]


def render_cutout(spec: ObjectSpec, yaw: float, elevation: float, light: Light, size: int) -> Picture:
    """Draws one object as `render_cutouts` does, (size, size, 4)."""
    return render_cutouts([spec], [yaw], [elevation], [light], size)[0].numpy()
