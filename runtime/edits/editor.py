"""Edits scenes in one thread; the server does the same in several (`runtime.server.editing`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from PIL import Image

from runtime.compositor import Compositor, StepCallback
from runtime.edits.fillers import check_fill, fill_request, filler_name, fills_holes, require_filler
from runtime.edits.plan import Plan, in_edit, placed_field, plan_edit
from runtime.errors import InputError, collecting_warnings, in_field, warn
from runtime.imaging.picture import Picture
from runtime.imaging.scene import load_scene
from runtime.imaging.sources import PictureLike
from runtime.request import (
    Action,
    Edit,
    Placement,
    Rearrangement,
    Remove,
    Request,
    Sampling,
    Swap,
    SwapPlaces,
    TryOn,
    Where,
)
from runtime.result import Composite, Stopwatch
from runtime.validation import LARGEST, Limits, check_seeds


def check_edit(edit: Edit, compositor: Compositor, filler: Compositor | None, limits: Limits) -> None:
    """Checks what can be checked before anything is decoded.

    Args:
        edit: the request.
        compositor: places objects; its segmenter finds them.
        filler: fills holes; optional.
        limits: the largest values that are allowed.

    Raises:
        InputError: a field is invalid; the message names it.
    """
    check_seeds(0 if edit.seed is None else edit.seed, edit.num_images, limits)
    with in_field("where"):
        compositor.segmenter.check(edit.where)
    if isinstance(edit.action, SwapPlaces):
        with in_field("swap.other"):
            compositor.segmenter.check(edit.action.other)
    if isinstance(edit.action, Swap | TryOn):
        given = edit.action.placement
        with in_field(placed_field(edit.action)):
            if given.box is not None or given.mask is not None:
                raise InputError("the object stays in its place: leave out box and mask")
    if not isinstance(edit.action, Remove):
        _check_placing(edit, compositor, limits)
    elif edit.sampling != Sampling():
        with in_field("sampling"):
            raise InputError(
                "nothing is drawn when an object is removed: set the parameters of filling instead"
            )
    check_fill(edit, filler, limits)


def _check_placing(edit: Edit, compositor: Compositor, limits: Limits) -> None:
    action, abilities = edit.action, compositor.system.abilities
    if isinstance(action, Swap | TryOn):
        placement = action.placement
    elif isinstance(action, Rearrangement) and abilities.condition == "reference":
        placement = Placement(edit.scene, refine=action.refine, strength=action.strength)
    else:
        with in_field("action"):
            raise InputError(
                f"{abilities.title} draws from prompts, and cannot place an object of the scene: use a model "
                "that takes references, like AnyDoor"
            )
    request = Request(edit.scene, [placement], edit.seed, edit.sampling, edit.num_images)
    compositor.steps_of(request, limits)


class Editor:
    """Edits scenes with a Compositor, whose segmenter finds the objects.

    editor = Editor(Compositor.load("build/engines/anydoor", segmenter=Segmenter.load("build/engines/sam")))
    image = editor.edit("desk.jpg", Where(clicks=[(120, 80)]), Move((300, 60, 420, 260)), seed=7)
    """

    def __init__(self, compositor: Compositor, filler: Compositor | None = None) -> None:
        """Stores the models.

        Args:
            compositor: places objects.
            filler: fills the holes that they leave. If None, the compositor does if it can; otherwise the
                background is guessed.

        Raises:
            InputError: the filler cannot fill holes.
        """
        if filler is not None:
            require_filler(filler)
        self.compositor = compositor
        self.filler = filler or (compositor if fills_holes(compositor) else None)

    def edit(
        self,
        scene: PictureLike,
        where: Where,
        action: Action,
        on_step: StepCallback | None = None,
        **others: Any,
    ) -> Image.Image:
        """Edits a scene; returns the picture.

        Args:
            scene: see `Compositor.composite`.
            where: selects the object.
            action: what to do with it.
            on_step: called with (steps done, total steps).
            others: fields of `Edit`.

        Raises:
            InputError: the edit is invalid; the message says what to change.
        """
        result = self.run(Edit(scene, where, action, **others), on_step)[0]
        for text in result.warnings:
            warn(text)
        return result.to_pillow()

    def run(self, edit: Edit, on_step: StepCallback | None = None) -> list[Composite]:
        """Draws all pictures of an edit; returns them with seeds, regions and times.

        Args:
            edit: the request.
            on_step: called with (steps done, total steps).

        Raises:
            InputError: the edit is invalid; the message says what to change.
        """
        watch = Stopwatch()
        with collecting_warnings() as warnings, in_edit(placed_field(edit.action)):
            check_edit(edit, self.compositor, self.filler, LARGEST)
            plan = plan_edit(edit, self.compositor.segmenter, LARGEST, watch)
            return self._run(plan, watch, warnings, on_step)

    def _run(
        self, plan: Plan, watch: Stopwatch, warnings: list[str], on_step: StepCallback | None
    ) -> list[Composite]:
        edit = plan.edit
        filler = self.filler if plan.has_hole else None
        fill_steps = sum(filler.steps_of(fill_request(plan, filler))) if filler else 0
        # what cannot be placed is refused before a hole is filled
        place_steps = steps_to_place(plan, self.compositor, LARGEST, watch) if filler else 0

        def following(before: int, after: int) -> StepCallback | None:
            return (lambda done, of: on_step(before + done, before + of + after)) if on_step else None

        scenes = [plan.scene]
        if plan.has_hole:
            with watch.measure("fill"):
                drawn = []
                if filler:
                    with in_edit("fill"):
                        drawn = filler.run(fill_request(plan, filler), following(0, place_steps))
                    warnings += [text for text in drawn[0].warnings if text not in warnings]
                # of a scene with colours of its own, the model's picture is in those
                scenes = [plan.fill(load_scene(of.to_pillow())[0]) for of in drawn] or [plan.fill()]
        if plan.placements:
            results = self.compositor.run(plan.place_request(scenes[0]), following(fill_steps, 0))
        else:
            results = [removed(plan, scenes[i % len(scenes)], plan.seed + i) for i in range(edit.num_images)]
        name = filler_name(filler) if plan.has_hole else ""
        return [finished(result, plan, name, watch, warnings) for result in results]


def steps_to_place(plan: Plan, compositor: Compositor, limits: Limits, watch: Stopwatch) -> int:
    """Counts the steps of all that is placed, tiles of refined places included, by preparing it.

    Raises:
        InputError: something cannot be placed.
    """
    if not plan.placements:
        return 0
    return compositor.accept(plan.place_request(plan.scene), limits, watch).total_steps


def removed(plan: Plan, scene: Picture, seed: int) -> Composite:
    """Returns the result of an edit that places nothing."""
    return Composite(scene.pixels, seed, (), {}, scene.metadata)


def finished(
    result: Composite, plan: Plan, filler: str, watch: Stopwatch, warnings: Sequence[str]
) -> Composite:
    """Completes a picture of an edit with what happened before the placement."""
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
