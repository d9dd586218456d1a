"""Edits of a scene: an object is removed, moved, reshaped, swapped, or a garment is tried on.

Each is a list of known steps: find the object (`runtime.segmentation`), fill the hole that it leaves, and
place something (`runtime.compositor`). Source: AnyDoor (Chen et al., CVPR 2024), section 4.4.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from runtime.compositor import Compositor, StepCallback
from runtime.errors import InputError, MissingModelError, collecting_warnings, in_field, warn
from runtime.imaging.boxes import Box, smallest_box
from runtime.imaging.decoding import UPRIGHT
from runtime.imaging.guess_background import guess_background
from runtime.imaging.holes import fade, filled, hole_of
from runtime.imaging.masks import MaskedPicture, load_mask
from runtime.imaging.picture import Picture
from runtime.imaging.scene import load_scene
from runtime.imaging.sources import PictureLike
from runtime.imaging.target import check_box
from runtime.request import (
    Action,
    Edit,
    Fill,
    Move,
    Placement,
    Remove,
    Request,
    Reshape,
    Sampling,
    Swap,
    SwapPlaces,
    TryOn,
    Where,
)
from runtime.result import Composite, Stopwatch
from runtime.segmentation import Segmenter
from runtime.validation import LARGEST, MAX_SEED, Limits, check_seeds

GUESS = "guess"
"""What fills a hole where no network does: `runtime.imaging.guess_background`."""

_TRY_ON_CROP_RATIO = 1.3
_SAME_OBJECT = 0.5
"""Share of the smaller of two objects that both have, from which on they are the same."""


@dataclass(frozen=True, eq=False)
class Plan:
    """An edit whose objects are found."""

    edit: Edit
    seed: int
    scene: Picture
    """Upright."""
    seen: NDArray[np.uint8]
    """What networks see of it, (H, W, 3)."""
    objects: Sequence[NDArray[np.bool_]]
    """Masks (H, W) of what leaves a hole."""
    placements: Sequence[Placement]

    @cached_property
    def share(self) -> NDArray[np.float32]:
        """How much of what fills the holes is seen, (H, W), 0..1."""
        share: NDArray[np.float32] = np.max([fade(mask) for mask in self.objects], axis=0)
        return share

    @cached_property
    def hole(self) -> NDArray[np.bool_]:
        """Everything that is filled, (H, W)."""
        hole: NDArray[np.bool_] = np.logical_or.reduce([hole_of(mask) for mask in self.objects])
        return hole

    @property
    def has_hole(self) -> bool:
        """Whether anything is to be filled."""
        return bool(self.objects)

    @property
    def fill_request(self) -> Request:
        """What a model that takes prompts is asked for, to fill the holes."""
        fill, images = self.edit.fill, 1 if self.placements else self.edit.num_images
        placement = Placement(prompt=fill.prompt, mask=self.hole, mode="keep_background", keep_specks=True)
        return Request(self.scene, [placement], self.seed, fill.sampling, images)

    def place_request(self, scene: Picture) -> Request:
        """What the compositor is asked for, with the holes filled."""
        edit = self.edit
        return Request(scene, self.placements, self.seed, edit.sampling, edit.num_images)

    def fill(self, drawn: NDArray[np.uint8] | None = None) -> Picture:
        """The scene with its holes filled, and no other pixel changed.

        Args:
            drawn: the scene (H, W, 3) in sRGB with the holes drawn over; they are guessed if None.
        """
        if drawn is None:
            drawn = guess_background(self.seen, self.hole)
        return filled(self.scene, self.seen, drawn, self.share)

    @property
    def hole_boxes(self) -> tuple[Box, ...]:
        """The smallest box around each hole."""
        return tuple(smallest_box(hole_of(mask)) for mask in self.objects)


def plan_edit(edit: Edit, segmenter: Segmenter, limits: Limits, watch: Stopwatch) -> Plan:
    """Reads the scene, and finds the objects. Uses no engine but the segmenter's, and may run in any thread.

    Args:
        edit: what is asked for.
        segmenter: finds the objects.
        limits: what it may ask for.
        watch: counts the stages read and segment.

    Raises:
        InputError: something about the edit cannot be used, in one sentence.
    """
    with watch.measure("read"), in_field("scene"):
        seen, scene = load_scene(edit.scene, limits.pixels)
    with watch.measure("segment"), in_field("where"):
        mask = segmenter.find(scene, edit.where, limits.pixels, "the scene")
    found = _Found(edit, replace(scene, orientation=UPRIGHT), seen, mask)
    if isinstance(edit.action, SwapPlaces):
        with watch.measure("segment"), in_field("other"):
            other = segmenter.find(scene, edit.action.other, limits.pixels, "the scene")
            plan = found.swapped(other)
    elif isinstance(edit.action, Reshape):
        with watch.measure("read"), in_field("to"):
            of = MaskedPicture("the scene", seen.shape, scene.orientation)
            plan = found.reshaped(load_mask(edit.action.to, "the new outline", limits.pixels, of))
    else:
        plan = found.placed(edit.action)
    with in_field("where"):
        for each in plan.objects:
            hole_of(each)  # refuses one that is too large
    return plan


@dataclass(frozen=True, eq=False)
class _Found:
    """An edit whose object is found."""

    edit: Edit
    scene: Picture
    seen: NDArray[np.uint8]
    mask: NDArray[np.bool_]

    @property
    def own(self) -> Placement:
        """The object itself, without a place."""
        return Placement(self.scene, reference_mask=self.mask, mode="keep_background")

    def swapped(self, other: NDArray[np.bool_]) -> Plan:
        """The plan of `SwapPlaces`."""
        _check_different(self.mask, other)
        first, second = smallest_box(self.mask), smallest_box(other)
        placements = [
            replace(self.own, box=_instead(first, second)),
            replace(self.own, reference_mask=other, box=_instead(second, first)),
        ]
        return self._plan([self.mask, other], placements)

    def reshaped(self, shape: NDArray[np.bool_]) -> Plan:
        """The plan of `Reshape`."""
        return self._plan([self.mask], [replace(self.own, mask=shape, mode="shape")])

    def placed(self, action: Remove | Move | Swap | TryOn) -> Plan:
        """The plan of the others."""
        if isinstance(action, Remove):
            return self._plan([self.mask], [])
        if isinstance(action, Move):
            with in_field("to"):
                to = check_box(action.to, (self.seen.shape[1], self.seen.shape[0]))
            return self._plan([self.mask], [replace(self.own, box=to)])
        given = action.placement
        if isinstance(action, TryOn):
            ratio = given.crop_ratio or _TRY_ON_CROP_RATIO
            return self._plan(
                [], [replace(given, mask=self.mask, mode=given.mode or "shape", crop_ratio=ratio)]
            )
        if given.mode == "shape":
            return self._plan([self.mask], [replace(given, mask=self.mask)])
        mode = given.mode or "keep_background"
        return self._plan([self.mask], [replace(given, box=smallest_box(self.mask), mode=mode)])

    def _plan(self, objects: Sequence[NDArray[np.bool_]], placements: Sequence[Placement]) -> Plan:
        seed = secrets.randbelow(MAX_SEED >> 32) if self.edit.seed is None else self.edit.seed
        return Plan(self.edit, seed, self.scene, self.seen, objects, placements)


def check_edit(edit: Edit, compositor: Compositor, filler: Compositor | None, limits: Limits) -> None:
    """Refuses what can be refused before anything is decoded.

    Args:
        edit: what is asked for.
        compositor: places objects; its segmenter finds them.
        filler: fills holes, if there is one.
        limits: what the edit may ask for.

    Raises:
        InputError: names the field.
    """
    check_seeds(edit.seed or 0, edit.num_images, limits)
    with in_field("where"):
        compositor.segmenter.check(edit.where)
    if isinstance(edit.action, SwapPlaces):
        with in_field("other"):
            compositor.segmenter.check(edit.action.other)
    if isinstance(edit.action, Swap | TryOn):
        given = edit.action.placement
        with in_field("placement"):
            if given.box is not None or given.mask is not None:
                raise InputError("the place is where the object is: leave out box and mask")
    if not isinstance(edit.action, Remove):
        compositor.steps_of(_any_request(edit, Placement(edit.scene), edit.sampling), limits)
    elif edit.sampling != Sampling():
        with in_field("sampling"):
            raise InputError("nothing is placed when an object is removed: say how its hole is filled")
    if filler:
        with in_field("fill"):
            filler.steps_of(
                _any_request(edit, Placement(prompt=edit.fill.prompt), edit.fill.sampling), limits
            )
    elif edit.fill != Fill():
        with in_field("fill"):
            raise MissingModelError(
                "no model that fills holes is loaded: leave this out, and the background is guessed; or give "
                "the bundle of one, like Stable Diffusion for inpainting, with --filler BUNDLE"
            )


def _any_request(edit: Edit, placement: Placement, sampling: Sampling) -> Request:
    """A request whose numbers are those of an edit."""
    return Request(edit.scene, [placement], edit.seed, sampling, edit.num_images)


def _check_different(one: NDArray[np.bool_], other: NDArray[np.bool_]) -> None:
    smaller = min(np.count_nonzero(one), np.count_nonzero(other))
    if np.count_nonzero(one & other) > _SAME_OBJECT * smaller:
        raise InputError("both places show the same object, and two are needed: click on another one")


def _instead(own: Box, place: Box) -> Box:
    """Where an object goes in another's place: that one's centre and height, and its own proportions."""
    width = max(1, round(place.height * own.width / own.height))
    x0 = (place.x0 + place.x1 - width) // 2
    return Box(x0, place.y0, x0 + width, place.y1)


def require_inpainting(compositor: Compositor) -> None:
    """Refuses a model that cannot fill holes.

    Raises:
        InputError: says what can.
    """
    if not inpaints(compositor):
        raise InputError(
            f"the bundle at '{compositor.bundle.path}' cannot fill holes: a filler is a model that takes "
            "prompts and sees the scene, like Stable Diffusion for inpainting"
        )


def inpaints(compositor: Compositor) -> bool:
    """Whether a model fills holes: it takes prompts, and sees the scene."""
    channels = compositor.bundle.manifest.architecture.get("scene_channels", 0)
    return compositor.system.abilities.condition == "text" and bool(channels)


class Editor:
    """Edits scenes with a Compositor, whose segmenter finds the objects.

    editor = Editor(Compositor.load("build/engines/anydoor", segmenter=Segmenter.load("build/engines/sam")))
    image = editor.edit("desk.jpg", Where(clicks=[(120, 80)]), Move((300, 60, 420, 260)), seed=7)
    """

    def __init__(self, compositor: Compositor, filler: Compositor | None = None) -> None:
        """Keeps the models.

        Args:
            compositor: places objects.
            filler: fills the holes that they leave; the compositor itself if None and it can, else they are
                guessed.

        Raises:
            InputError: the filler cannot.
        """
        if filler is not None:
            require_inpainting(filler)
        self.compositor = compositor
        self.filler = filler or (compositor if inpaints(compositor) else None)

    def edit(
        self,
        scene: PictureLike,
        where: Where,
        action: Action,
        on_step: StepCallback | None = None,
        **others: Any,
    ) -> Image.Image:
        """The edited scene.

        Args:
            scene: as of `Compositor.composite`.
            where: the object is.
            action: what is done to it.
            on_step: called with (steps done, steps in all).
            others: fields of `Edit`.

        Raises:
            InputError: something about the edit cannot be used, in one sentence.
        """
        result = self.run(Edit(scene, where, action, **others), on_step)[0]
        for text in result.warnings:
            warn(text)
        return result.to_pillow()

    def run(self, edit: Edit, on_step: StepCallback | None = None) -> list[Composite]:
        """All pictures of an edit, with seeds, regions and times.

        Args:
            edit: what is asked for.
            on_step: called with (steps done, steps in all).

        Raises:
            InputError: something about the edit cannot be used, in one sentence.
        """
        check_edit(edit, self.compositor, self.filler, LARGEST)
        watch = Stopwatch()
        with collecting_warnings() as warnings:
            plan = plan_edit(edit, self.compositor.segmenter, LARGEST, watch)
            return self._run(plan, watch, warnings, on_step)

    def _run(
        self, plan: Plan, watch: Stopwatch, warnings: list[str], on_step: StepCallback | None
    ) -> list[Composite]:
        edit = plan.edit
        filler = self.filler if plan.has_hole else None
        fill_steps = sum(filler.steps_of(plan.fill_request)) if filler else 0
        place_steps = sum(self.compositor.steps_of(plan.place_request(plan.scene))) if plan.placements else 0
        all_steps = fill_steps + place_steps

        def following(before: int) -> StepCallback | None:
            return (lambda done, _: on_step(before + done, all_steps)) if on_step else None

        scenes = [plan.scene]
        if plan.has_hole:
            with watch.measure("fill"):
                drawn = filler.run(plan.fill_request, following(0)) if filler else []
                # of a scene with colours of its own, the model's picture is in those
                scenes = [plan.fill(load_scene(of.to_pillow())[0]) for of in drawn] or [plan.fill()]
        if plan.placements:
            results = self.compositor.run(plan.place_request(scenes[0]), following(fill_steps))
        else:
            results = [removed(plan, scenes[i % len(scenes)], plan.seed + i) for i in range(edit.num_images)]
        name = (filler.bundle.manifest.system if filler else GUESS) if plan.has_hole else ""
        return [finished(result, plan, name, watch, warnings) for result in results]


def removed(plan: Plan, scene: Picture, seed: int) -> Composite:
    """The result of an edit that places nothing."""
    return Composite(scene.pixels, seed, (), {}, scene.metadata)


def finished(
    result: Composite, plan: Plan, filler: str, watch: Stopwatch, warnings: Sequence[str]
) -> Composite:
    """A picture of an edit, with all that came before it was placed."""
    seconds = dict(result.seconds)
    for stage, time in watch.seconds.items():
        seconds[stage] = seconds.get(stage, 0.0) + time
    return replace(
        result,
        regions=(*plan.hole_boxes, *result.regions),
        seconds=seconds,
        warnings=tuple(dict.fromkeys((*warnings, *result.warnings))),
        filler=filler,
    )
