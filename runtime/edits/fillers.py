"""Fills the holes of an edit, by a network that continues the scene or by a guess."""

from __future__ import annotations

from dataclasses import replace

from runtime.compositor import Compositor
from runtime.edits.plan import Plan
from runtime.errors import InputError, MissingModelError, in_field
from runtime.request import Edit, Fill, Placement, Request, Sampling
from runtime.validation import Limits

GUESS = "guess"
"""Names the filler that is used without a network: `runtime.imaging.guess_background`."""

_UNGUIDED = 1.0
"""Guidance scale of a model without a condition: off."""


def fills_holes(compositor: Compositor) -> bool:
    """Returns whether a model fills holes: it sees the scene, and needs no object."""
    abilities = compositor.system.abilities
    sees_scene = bool(compositor.bundle.manifest.architecture.get("scene_channels", 0))
    return sees_scene and (abilities.condition == "text" or abilities.fills)


def require_filler(compositor: Compositor) -> None:
    """Checks that a model can fill holes.

    Raises:
        InputError: it cannot; the message says which models can.
    """
    if not fills_holes(compositor):
        raise InputError(
            f"the bundle at '{compositor.bundle.path}' cannot fill holes: a filler must see the scene and "
            "need no object, like Stable Diffusion for inpainting, or IMPRINT"
        )


def filler_name(filler: Compositor | None) -> str:
    """Returns the name of a filler in results: the system of a model, or `GUESS`."""
    return filler.bundle.manifest.system if filler else GUESS


def check_fill(edit: Edit, filler: Compositor | None, limits: Limits) -> None:
    """Checks, before anything is decoded, how holes are to be filled.

    Raises:
        InputError: a field is invalid; the message names it.
    """
    with in_field("fill"):
        if filler:
            placement, sampling = _asked(edit.fill, filler)
            filler.steps_of(Request(edit.scene, [placement], edit.seed, sampling, edit.num_images), limits)
        elif edit.fill != Fill():
            raise MissingModelError(
                "no model that fills holes is loaded: leave this out to have the background guessed, or "
                "give a bundle, like Stable Diffusion for inpainting, with --filler BUNDLE"
            )


def fill_request(plan: Plan, filler: Compositor) -> Request:
    """Builds the request that fills the holes of a plan."""
    placement, sampling = _asked(plan.edit.fill, filler)
    images = 1 if plan.placements else plan.edit.num_images
    return Request(plan.scene, [replace(placement, mask=plan.hole)], plan.seed, sampling, images)


def _asked(fill: Fill, filler: Compositor) -> tuple[Placement, Sampling]:
    """Returns the content of a hole and its sampling parameters."""
    placement = Placement(mode="keep_background", keep_specks=True)
    abilities = filler.system.abilities
    if abilities.condition == "text":
        return replace(placement, prompt=fill.prompt), fill.sampling
    if fill.prompt:
        with in_field("prompt"):
            raise InputError(f"{abilities.title} fills holes here, and takes no prompt: leave it out")
    if fill.sampling.guidance_scale is None:
        return placement, replace(fill.sampling, guidance_scale=_UNGUIDED)
    return placement, fill.sampling
