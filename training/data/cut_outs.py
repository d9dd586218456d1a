"""Makes pictures of a main object with its exact mask: rendered scenes, and objects in front of a
backdrop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from runtime.imaging.boxes import smallest_box
from runtime.imaging.masks import MASK_THRESHOLD
from runtime.imaging.resize import resize_linear
from training.data.synthetic.views import View
from training.data.view_store import REFERENCES, SCENES, ViewStore
from training.ranges import check_shares

LIGHT = 0.25
"""Most by which contrast, brightness and each colour change, as a share of their range."""
NOISE = 6.0
"""Largest standard deviation of the noise that is added, in levels."""


@dataclass(frozen=True)
class CutOutRules:
    """How the pictures are made."""

    backdrops: float = 0.35
    """Share of pictures that show an object before a backdrop, as in a studio; the others show a room."""
    plain: float = 0.4
    """Share of backdrops of one colour; the others run from one to another."""
    crop: float = 0.8
    """Share of rooms of which a part is shown, and not all."""

    def __post_init__(self) -> None:
        check_shares(self, "backdrops", "plain", "crop")


@dataclass(frozen=True)
class CutOuts:
    """The endless dataset of pictures and masks."""

    store: ViewStore
    side: int
    rules: CutOutRules
    seed: int

    def __getitem__(self, number: int) -> dict[str, NDArray[Any]]:
        """Gives `picture` (3, S, S), -1..1, and `mask` (1, S, S), 0..1, both float32."""
        rng = np.random.default_rng([self.seed, number])
        row = int(rng.integers(len(self.store)))
        if rng.random() < self.rules.backdrops:
            view = before_backdrop(self.store.reference(row, int(rng.integers(REFERENCES))), self.rules, rng)
        else:
            view = self.store.scene(row, int(rng.integers(SCENES)))
            if rng.random() < self.rules.crop:
                view = _part(view, rng)
        size = (self.side, self.side)
        picture, mask = resize_linear(view.image, size), resize_linear(view.mask, size)
        if rng.random() < 0.5:
            picture, mask = picture[:, ::-1], mask[:, ::-1]
        values = in_other_light(picture, rng).transpose(2, 0, 1) / np.float32(127.5) - 1
        return {"picture": values, "mask": mask[None].astype(np.float32) / 255}


def before_backdrop(view: View, rules: CutOutRules, rng: Generator) -> View:
    """Puts an object that is alone on black before one colour, or before two that run into each other."""
    side = view.mask.shape[0]
    first, last = rng.uniform(0, 255, (2, 3))
    if rng.random() < rules.plain:
        first = last = first if rng.random() < 0.5 else np.full(3, rng.choice([0.0, 255.0]))
    along = np.linspace(0, 1, side)[:, None, None] ** rng.uniform(0.5, 2)
    backdrop = np.broadcast_to(first + (last - first) * along, (side, side, 3))
    share = view.mask[..., None] / 255
    shown = view.image * share + np.rot90(backdrop, int(rng.integers(4))) * (1 - share)
    room = int(rng.integers(side // 2))
    pad = [(int(rng.integers(room + 1)), int(rng.integers(room + 1))) for _ in range(2)]
    # the backdrop goes on
    picture = np.pad(np.rint(shown).astype(np.uint8), [*pad, (0, 0)], "edge")
    return View(picture, np.pad(view.mask, pad))


def _part(view: View, rng: Generator) -> View:
    """Cuts out a part of a picture, of any proportions, with all of the object."""
    inside = view.mask > MASK_THRESHOLD
    if not inside.any():
        return view
    box, (height, width) = smallest_box(inside), inside.shape
    left, top = (int(rng.integers(edge + 1)) for edge in (box.x0, box.y0))
    right, bottom = int(rng.integers(box.x1, width + 1)), int(rng.integers(box.y1, height + 1))
    return View(view.image[top:bottom, left:right], view.mask[top:bottom, left:right])


def in_other_light(picture: NDArray[np.uint8], rng: Generator) -> NDArray[np.float32]:
    """Changes contrast, brightness and colours of a picture, and adds noise, (H, W, 3), 0..255."""
    contrast = 1 + rng.uniform(-LIGHT, LIGHT) + rng.uniform(-LIGHT, LIGHT, 3) / 2
    brightness = 255 * rng.uniform(-LIGHT, LIGHT)
    grain = rng.standard_normal(picture.shape, np.float32) * np.float32(rng.uniform(0, NOISE))
    changed = (picture - 127.5) * contrast + 127.5 + brightness + grain
    result: NDArray[np.float32] = np.clip(changed, 0, 255).astype(np.float32)
    return result
