"""Draws the background of objects: a floor and a wall, with shadows on the floor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from training.data.synthetic.batches import chosen, take
from training.data.synthetic.bodies import Body
from training.data.synthetic.scenes import Light, Scene


@dataclass(frozen=True)
class Group:
    """Bodies of one structure; of several pictures, and perhaps some in the same."""

    bodies: Body
    pictures: Tensor  # (B,), numbers of the pictures
    numbers: Tensor  # (B,), of the bodies among all


def draw_rooms(scenes: Scene, groups: Sequence[Group], size: tuple[int, int], seen: Tensor) -> Tensor:
    """Draws rooms where they are seen.

    Args:
        scenes: F of them.
        groups: all that throws shadows.
        size: (width, height) of the pictures.
        seen: (F * H * W,) bool, the pixels to draw.

    Returns:
        The light (3, F * H * W); 0 elsewhere.
    """
    width, height = size
    pixels = width * height
    place = chosen(seen)
    within = take(scenes, place // pixels)
    columns, rows = place % width + 0.5, place % pixels // width + 0.5
    rays, eye = within.camera.rays(columns, rows, size), within.camera.eye
    to_wall = (-within.wall_distance - eye[2]) / rays[2].clamp(max=-1e-4)
    to_floor = torch.where(rays[1] < -1e-4, -eye[1] / rays[1].clamp(max=-1e-4), torch.inf)
    on_floor = to_floor < to_wall
    points = torch.addcmul(eye, rays, torch.minimum(to_floor, to_wall))
    picture = torch.zeros(3, len(seen), device=seen.device)
    floor, wall = chosen(on_floor), chosen(~on_floor)
    ground = torch.full((2, len(seen)), torch.inf, device=seen.device)
    on, behind = points.index_select(1, floor), points.index_select(1, wall)
    ground.index_copy_(1, place[floor], on[::2])
    shares = shadows(groups, scenes.light, ground.view(2, -1, pixels)).view(2, -1)
    lit = _floor(take(within, floor), on, *shares.index_select(1, place[floor]))
    picture.index_copy_(1, place[floor], lit)
    return picture.index_copy_(1, place[wall], _wall(take(within, wall), behind))


def shadows(groups: Sequence[Group], light: Light, ground: Tensor) -> Tensor:
    """Computes the shares of the direct and of the ambient light that reach the floor.

    Args:
        groups: what is in the way.
        light: F of them.
        ground: x and z (2, F, P) of points on the floor, infinite where there is none.

    Returns:
        Shares (2, F, P).
    """
    shares = torch.ones_like(ground)
    for group in groups:
        bodies, points = group.bodies, ground[:, group.pictures]
        away = points - bodies.offset[::2, :, None]
        near = away.square().sum(0) < (3.2 * bodies.radius[:, None]).square()
        places = chosen(near.flatten())
        which = places // ground.shape[2]
        which_picture = group.pictures[which]
        x, z = points.flatten(1).index_select(1, places)
        spots = torch.stack([x, torch.zeros_like(x), z])
        left = _shares(take(bodies, which), take(light, which_picture).direction, spots)
        places = (which_picture * ground.shape[2] + places % ground.shape[2]).expand(2, -1)
        # where bodies of one picture have their shadows in the same place, each takes its share
        shares.view(2, -1).scatter_reduce_(1, places, left, "prod")
    return shares


def _shares(bodies: Body, direction: Tensor, spots: Tensor) -> Tensor:
    """Computes the shares (2, N) of light at spots (3, N) of the floor, each near to one body."""
    own, way = bodies.inside(spots), bodies.turned(direction)
    own[1] += 0.02
    open_sky = (bodies.shape.distance(own) / 0.45).clamp_(0, 1)
    left, travel = torch.ones_like(own[0]), torch.full_like(own[0], 0.03)
    for _ in range(12):  # the nearest miss on the way to the light, relative to how far it is: a penumbra
        gap = bodies.shape.distance(torch.addcmul(own, way, travel))
        left = torch.minimum(left, (7 * gap / travel).clamp_(0, 1))
        travel.add_(gap.clamp_(0.05, 0.25))
    return torch.stack([left, 0.35 + 0.65 * open_sky.pow_(0.7)])


def _floor(scenes: Scene, points: Tensor, direct: Tensor, ambient: Tensor) -> Tensor:
    """Computes the light (3, N) from points (3, N) of floors, which shares (N,) of the light reach."""
    # the corner under the wall is darker, as in any room
    corner = 0.7 + 0.3 * ((points[2] + scenes.wall_distance) / 0.8).clamp_(0, 1)
    light = scenes.light
    strength = light.colour * (direct * light.direction[1]) + light.ambient * (ambient * corner)
    return scenes.floor.read(points[0], points[2]) * strength


def _wall(scenes: Scene, points: Tensor) -> Tensor:
    """Computes the light (3, N) from points (3, N) of walls."""
    fade = 0.75 + 0.25 * (points[1] / 0.8).clamp_(0, 1)
    light = scenes.light
    grazing = (light.direction[2] * 0.9 + 0.1).clamp(0.1, 1)
    return scenes.wall.read(points[0], -points[1]) * (light.colour * grazing + light.ambient * fade)
