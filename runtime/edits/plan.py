"""Plans an edit: finds its objects, and determines what is placed instead."""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from runtime.errors import InputError, in_field
from runtime.imaging.boxes import Box, smallest_box
from runtime.imaging.decoding import UPRIGHT
from runtime.imaging.guess_background import guess_background
from runtime.imaging.holes import check_hole, fade, filled, hole_box
from runtime.imaging.masks import MaskedPicture, load_mask
from runtime.imaging.picture import Picture
from runtime.imaging.scene import load_scene
from runtime.imaging.specks import without_specks
from runtime.imaging.target import check_box
from runtime.request import (
    Action,
    Edit,
    Move,
    Placement,
    Rearrangement,
    Remove,
    Request,
    Reshape,
    Swap,
    SwapPlaces,
    TryOn,
)
from runtime.result import Stopwatch
from runtime.segmentation import Segmenter, cut_out
from runtime.validation import MAX_SEED, Limits

_TRY_ON_CROP_RATIO = 1.3
_SAME_OBJECT = 0.5
"""Two objects are the same if they share at least this part of the smaller one."""


@dataclass(frozen=True, eq=False)
class Plan:
    """An edit whose objects are found."""

    edit: Edit
    seed: int
    scene: Picture
    """Upright."""
    seen: NDArray[np.uint8]
    """The scene as networks see it, (H, W, 3)."""
    objects: Sequence[NDArray[np.bool_]]
    """Masks (H, W) of the objects that leave holes."""
    placements: Sequence[Placement]
    share: NDArray[np.float32]
    """Opacity of the fill, (H, W), 0..1."""
    hole: NDArray[np.bool_]
    """Mask (H, W) of all holes."""
    hole_boxes: tuple[Box, ...]
    """The smallest box around the hole of each object."""

    @property
    def has_hole(self) -> bool:
        """Whether there is a hole to fill."""
        return bool(self.objects)

    def place_request(self, scene: Picture) -> Request:
        """Builds the request that places objects, with the holes filled."""
        edit = self.edit
        return Request(scene, self.placements, self.seed, edit.sampling, edit.num_images)

    def fill(self, drawn: NDArray[np.uint8] | None = None) -> Picture:
        """Fills the holes of the scene, without changing other pixels.

        Args:
            drawn: the scene (H, W, 3) in sRGB with the holes drawn over; they are guessed if None.
        """
        if drawn is None:
            alpha = self.scene.alpha
            behind = self.seen if alpha is None else np.dstack([self.seen, alpha])
            drawn = guess_background(behind, self.hole)
        return filled(self.scene, self.seen, drawn, self.share)


def placed_field(action: Action) -> str:
    """Returns the wire name of the edit's field that says what is placed, and how."""
    names = {Move: "move", Reshape: "reshape", Swap: "swap.placement", SwapPlaces: "swap", TryOn: "try_on"}
    return names.get(type(action), "where")


@contextmanager
def in_edit(placed: str) -> Iterator[None]:
    """Makes errors name the field of the edit instead of that of the request made from it.

    Args:
        placed: of what is placed, see `placed_field`; "fill" where a hole is filled.
    """
    try:
        yield
    except InputError as error:
        error.field = re.sub(r"^placements\[\d+\]", placed, error.field)
        # an object of the scene itself, whose reference is the scene
        error.field = re.sub(r"^(move|reshape|swap)\.reference(_mask)?$", "where", error.field)
        error.field = re.sub(r"^(move|reshape)\.(box|mask)$", r"\1.to", error.field)
        raise


def plan_edit(edit: Edit, segmenter: Segmenter, limits: Limits, watch: Stopwatch) -> Plan:
    """Reads the scene, and finds the objects. Uses no engine but the segmenter's, and may run in any thread.

    Args:
        edit: the request.
        segmenter: finds the objects.
        limits: the largest values that are allowed.
        watch: records the time of the stages read and segment.

    Raises:
        InputError: the edit is invalid; the message says what to change.
    """
    with watch.measure("read"), in_field("scene"):
        seen, scene = load_scene(edit.scene, limits.pixels)
    with watch.measure("segment"), in_field("where"):
        mask = segmenter.find(scene, edit.where, limits.pixels, "the scene").mask
        mask = _meant(mask, "the object's mask", edit.action)
    found = _Found(edit, replace(scene, orientation=UPRIGHT), seen, mask)
    if isinstance(edit.action, SwapPlaces):
        with watch.measure("segment"), in_field("swap.other"):
            other = segmenter.find(scene, edit.action.other, limits.pixels, "the scene").mask
            plan = found.swapped(_meant(other, "the other object's mask", edit.action))
    elif isinstance(edit.action, Reshape):
        with watch.measure("read"), in_field("reshape.to"):
            of = MaskedPicture("the scene", seen.shape, scene.orientation)
            outline = load_mask(edit.action.to, "the new outline", limits.pixels, of)
            plan = found.reshaped(_meant(outline, "the new outline", edit.action))
    elif isinstance(edit.action, Swap | TryOn):
        with in_field(placed_field(edit.action)):
            given = cut_out(edit.action.placement, segmenter, limits.pixels, watch)
        plan = found.placed(replace(edit.action, placement=given))
    else:
        plan = found.placed(edit.action)
    if plan.has_hole:
        with in_field("where"):
            check_hole(plan.hole)
    return plan


def _meant(mask: NDArray[np.bool_], name: str, action: Action) -> NDArray[np.bool_]:
    """Returns the mask (H, W) of an edit without its specks, unless its placement keeps them."""
    given = action.placement if isinstance(action, Swap | TryOn) else None
    if given and given.keep_specks:
        return mask
    return without_specks(mask, name, can_be_kept=given is not None)


@dataclass(frozen=True, eq=False)
class _Found:
    """An edit whose object is found."""

    edit: Edit
    scene: Picture
    seen: NDArray[np.uint8]
    mask: NDArray[np.bool_]

    @property
    def own(self) -> Placement:
        """Returns the object itself, without a place."""
        action = self.edit.action
        assert isinstance(action, Rearrangement)
        return Placement(
            self.scene,
            reference_mask=self.mask,
            mode="keep_background",
            refine=action.refine,
            strength=action.strength,
        )

    def swapped(self, other: NDArray[np.bool_]) -> Plan:
        """Returns the plan of `SwapPlaces`."""
        _check_different(self.mask, other)
        first, second = smallest_box(self.mask), smallest_box(other)
        placements = [
            replace(self.own, box=_instead(first, second)),
            replace(self.own, reference_mask=other, box=_instead(second, first)),
        ]
        return self._plan([self.mask, other], placements)

    def reshaped(self, shape: NDArray[np.bool_]) -> Plan:
        """Returns the plan of `Reshape`."""
        return self._plan([self.mask], [replace(self.own, mask=shape, mode="shape")])

    def placed(self, action: Remove | Move | Swap | TryOn) -> Plan:
        """Returns the plan of all other actions."""
        if isinstance(action, Remove):
            return self._plan([self.mask], [])
        if isinstance(action, Move):
            with in_field("move.to"):
                to = check_box(action.to, (self.seen.shape[1], self.seen.shape[0]))
            return self._plan([self.mask], [replace(self.own, box=to)])
        given = action.placement
        if isinstance(action, TryOn):
            ratio = _TRY_ON_CROP_RATIO if given.crop_ratio is None else given.crop_ratio
            mode = "shape" if given.mode is None else given.mode
            return self._plan([], [replace(given, mask=self.mask, mode=mode, crop_ratio=ratio)])
        if given.mode == "shape":
            return self._plan([self.mask], [replace(given, mask=self.mask)])
        mode = "keep_background" if given.mode is None else given.mode
        return self._plan([self.mask], [replace(given, box=smallest_box(self.mask), mode=mode)])

    def _plan(self, objects: Sequence[NDArray[np.bool_]], placements: Sequence[Placement]) -> Plan:
        seed = secrets.randbelow(MAX_SEED >> 32) if self.edit.seed is None else self.edit.seed
        share = np.zeros(self.mask.shape, np.float32)
        for mask in objects:
            np.maximum(share, fade(mask), out=share)
        boxes = tuple(map(hole_box, objects))
        return Plan(self.edit, seed, self.scene, self.seen, objects, placements, share, share > 0, boxes)


def _check_different(one: NDArray[np.bool_], other: NDArray[np.bool_]) -> None:
    smaller = min(np.count_nonzero(one), np.count_nonzero(other))
    if np.count_nonzero(one & other) > _SAME_OBJECT * smaller:
        raise InputError("both selections are the same object: select another one")


def _instead(own: Box, place: Box) -> Box:
    """Returns where an object goes in another's place: that one's centre and height, and its own
    proportions."""
    width = max(1, round(place.height * own.width / own.height))
    x0 = (place.x0 + place.x1 - width) // 2
    return Box(x0, place.y0, x0 + width, place.y1)
