"""Renders objects and scenes to pictures, many at once, on any device.

Bodies of one structure are drawn together, whatever picture they are in.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Frame:
    """What a picture shows."""

    camera: Camera
    light: Light
    things: Sequence[Placed]
    scene: Scene | None = None  # the room around them; without one they are cut out


def frame_of(scene: Scene, things: Sequence[Placed]) -> Frame:
    """Makes the frame of a scene with things in it, from its own camera."""
    return Frame(scene.camera, scene.light, things, scene)


def cutout_frame(spec: ObjectSpec, yaw: float, elevation: float, light: Light) -> Frame:
    """Makes the frame of an object alone, which it fills; angles in radians, looked down at from above."""
    looking = camera(6.0, elevation, float(spec.shape.height) / 2, float(spec.shape.radius) / 5.8)
    return Frame(looking, light, [(spec, Pose(yaw=yaw))])


@torch.inference_mode()
def render_frames(
    frames: Sequence[Frame], size: Size, device: torch.device = CPU, at_once: int = 0
) -> tuple[Tensor, list[Tensor]]:
    """Draws pictures.

    Args:
        frames: F of them, with and without rooms.
        size: of the pictures, in pixels.
        device: where they are drawn.
        at_once: how many are drawn together; 0 for as many as suit the device.

    Returns:
        Pictures (F, H, W, 3), and for each its things' shares of each pixel, (K, H, W), 0..255; all uint8.
        Colours of a picture without a room are not multiplied with the shares.
    """
    pictures: list[Tensor] = []
    masks: list[Tensor] = []
    at_once = at_once or suitable(device)
    for start in range(0, len(frames), at_once):
        some = frames[start : start + at_once]
        drawn, shares = _draw(some, size, device)
        pictures.append(developed(drawn))
        masks += (shares * 255 + 0.5).to(torch.uint8).split_with_sizes([len(frame.things) for frame in some])
    return torch.cat(pictures), masks


def developed(light: Tensor) -> Tensor:
    """Converts linear light (3, ...) to 8-bit sRGB (..., 3)."""
    return (light.clamp(0, 1).sqrt_() * 255 + 0.5).to(torch.uint8).movedim(0, -1).contiguous()


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


def _draw(frames: Sequence[Frame], size: Size, device: torch.device) -> tuple[Tensor, Tensor]:
    """Draws the light (3, F, H, W), and the share of each pixel that each thing covers, (N, H, W)."""
    (width, height), placed = size, [frame.things for frame in frames]
    cameras, lights = _gathered([(frame.camera, frame.light) for frame in frames], device)
    groups = _groups(placed, device)
    things = torch.empty(4, sum(map(len, placed)), height, width, device=device)
    for group in groups:
        seen = take(cameras, group.pictures), take(lights, group.pictures)
        things.index_copy_(1, group.numbers, draw_bodies(group.bodies, *seen, size))
    light = torch.zeros(3, len(frames), height, width, device=device)
    # the share of each pixel that nothing covers yet
    free = torch.ones(len(frames), height, width, device=device)
    for ranked, pictures in _from_front(placed):
        numbers, which = torch.tensor(ranked, device=device), torch.tensor(pictures, device=device)
        drawn, behind = things.index_select(1, numbers), free.index_select(0, which)
        light.index_add_(1, which, drawn[:3] * behind)
        free.index_copy_(0, which, behind * (1 - drawn[3]))
        things[3].index_copy_(0, numbers, drawn[3] * behind)
    _put_into_rooms(frames, groups, light, free)
    return light, things[3]


def _put_into_rooms(frames: Sequence[Frame], groups: Sequence[Group], light: Tensor, free: Tensor) -> None:
    """Adds the light of rooms to pictures (3, F, H, W), where they are free (F, H, W) to be seen.

    Where there is none, what is cut out gets its own colours instead, as if it had no soft edge.
    """
    rooms = {number: frame.scene for number, frame in enumerate(frames) if frame.scene}
    if rooms:
        inside = torch.tensor(list(rooms), device=light.device)
        numbers = torch.full((len(frames),), -1, device=light.device)
        numbers[inside] = torch.arange(len(rooms), device=light.device)
        around = [_in_rooms(group, numbers) for group in groups]
        scenes, seen = _gathered(list(rooms.values()), light.device), free.index_select(0, inside)
        drawn = draw_rooms(scenes, around, (free.shape[2], free.shape[1]), seen.flatten() > 0)
        light.index_add_(1, inside, drawn.view(3, *seen.shape).mul_(seen))
    if len(rooms) < len(frames):
        alone = torch.tensor(
            [number for number in range(len(frames)) if number not in rooms], device=light.device
        )
        light[:, alone] /= (1 - free[alone]).clamp(min=1e-3)


def _in_rooms(group: Group, rooms: Tensor) -> Group:
    """Gives those of a group that are in rooms: (F,), the number of each picture's, or -1."""
    numbers = rooms[group.pictures]
    some = chosen(numbers >= 0)
    return Group(take(group.bodies, some), numbers[some], group.numbers[some])


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
    pictures, masks = render_frames([frame_of(scene, placed)], size)
    return pictures[0].numpy(), list(masks[0].numpy())


def render(scene: Scene, spec: ObjectSpec, pose: Pose, size: Size) -> tuple[Picture, Picture]:
    """Draws a picture (H, W, 3) of one object in a scene, and its mask (H, W): covered share times 255."""
    picture, masks = render_all(scene, [(spec, pose)], size)
    return picture, masks[0]


def render_background(scene: Scene, size: Size) -> Picture:
    """Draws the same room without any object."""
    return render_all(scene, [], size)[0]


def render_cutout(spec: ObjectSpec, yaw: float, elevation: float, light: Light, size: int) -> Picture:
    """Draws one object alone in a square, (size, size, 4) RGBA; see `cutout_frame`."""
    pictures, masks = render_frames([cutout_frame(spec, yaw, elevation, light)], (size, size))
    return np.dstack([pictures[0].numpy(), masks[0][0].numpy()])
