"""Renders several views of one object, in place of a video or a multi-view set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.random import Generator
from numpy.typing import NDArray
from torch import Tensor

from training.data.synthetic.bodies import Pose
from training.data.synthetic.objects import ObjectSpec, make_object
from training.data.synthetic.rendering import CPU, Frame, cutout_frame, frame_of, render_frames
from training.data.synthetic.scenes import make_light, make_scene

Picture = NDArray[np.uint8]

HELD_OUT = 1_000_000
"""Seeds from here on are never trained on; example pictures and the evaluation set are drawn with them."""

VIEW_SIZE = 160
"""Pixels per side of a view: enough for the crops of a model of 128 px."""

_OTHER_OBJECTS = 500_000  # added to a seed for the things that merely stand around


@dataclass(frozen=True, eq=False)
class View:
    """One picture with an object in it."""

    image: Picture  # (S, S, 3) RGB
    mask: Picture  # (S, S), the object's share of each pixel times 255


def _yaw(seed: int, rng: Generator) -> float:
    """Returns views of an object turn about a middle that is its own, so that they share most of what they
    show."""
    return float(np.random.default_rng([seed, 3]).normal(0, 0.35) + rng.normal(0, 0.22))


def _bystander(seed: int, rng: Generator) -> tuple[ObjectSpec, Pose]:
    side = rng.choice([-1, 1])
    pose = Pose(
        side * rng.uniform(1.1, 1.6), rng.uniform(-1.2, -0.2), rng.uniform(-3, 3), rng.uniform(0.5, 0.9)
    )
    return make_object(seed + _OTHER_OBJECTS), pose


def scene_frame(seed: int, number: int) -> Frame:
    """Makes the frame of view `number` of object `seed`, its first thing, in a room of its own."""
    rng = np.random.default_rng([seed, 4, number])
    scene = make_scene(int(rng.integers(2**31)))
    pose = Pose(rng.uniform(-0.5, 0.5), rng.uniform(-0.4, 0.4), _yaw(seed, rng), rng.uniform(0.95, 1.65))
    others = [_bystander(seed + number, rng)] if rng.random() < 0.25 else []
    return frame_of(scene, [(make_object(seed), pose), *others])


def reference_frame(seed: int, number: int) -> Frame:
    """Makes the frame of view `number` of object `seed` alone, as in a product picture."""
    rng = np.random.default_rng([seed, 5, number])
    return cutout_frame(make_object(seed), _yaw(seed, rng), rng.uniform(0.1, 0.5), make_light(rng))


def draw_frames(
    frames: Sequence[Frame], size: int = VIEW_SIZE, device: torch.device = CPU, at_once: int = 0
) -> Tensor:
    """Draws the views of frames.

    Args:
        frames: N of them.
        size: pixels per side.
        device: where they are drawn.
        at_once: how many are drawn together; 0 for as many as suit the device.

    Returns:
        RGB and the share of each pixel of the frame's first thing, (N, size, size, 4) uint8.
    """
    pictures, masks = render_frames(frames, (size, size), device, at_once)
    return torch.cat([pictures, torch.stack([each[0] for each in masks])[..., None]], -1)


def scene_view(seed: int, number: int, size: int = VIEW_SIZE) -> View:
    """Draws a view in a room; see `scene_frame`."""
    return as_views(draw_frames([scene_frame(seed, number)], size))[0]


def reference_view(seed: int, number: int, size: int = VIEW_SIZE) -> View:
    """Draws a view alone on black; see `reference_frame`."""
    return as_views(draw_frames([reference_frame(seed, number)], size))[0]


def as_views(drawn: Tensor) -> list[View]:
    """Gives views (N, S, S, 4), wherever they were drawn, one by one."""
    return [View(picture[..., :3], picture[..., 3]) for picture in drawn.cpu().numpy()]
