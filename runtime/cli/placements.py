"""Turns flags into placements: which object, and how it is placed. The commands that place something share
them."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from runtime.cli.flags import flag_of, given, parse_click
from runtime.errors import InputError
from runtime.imaging.mask_levels import MASK_LEVELS, MaskLevel, check_mask_level
from runtime.imaging.modes import MODES
from runtime.imaging.paste_back import EDGES
from runtime.request import AUTOMATIC, REFINE_TIMESTEP, Placement, View

_NAMED_MASKS: Mapping[str, str | None] = {AUTOMATIC: AUTOMATIC, "none": None}

_PASSES = ("refine", "strength")
_PARAMETERS = (
    *("mode", "mask_level", "edge", *_PASSES, "keep_specks", "negative_prompt"),
    *("reference_ratio", "box_ratio", "crop_ratio"),
)

Clicks = Mapping[int, Sequence[tuple[int, int, bool]]]
"""Number of a reference -> the clicks on it."""


def add_object_flags(group: argparse._ArgumentGroup, several: str) -> None:
    """Adds the flags of objects: `objects`, a list of files and texts, `reference_mask` and
    `reference_clicks`.

    Args:
        group: gets the flags.
        several: what several references are, for the help.
    """
    # one list for both, so that the n-th place belongs to the n-th of them
    group.add_argument(
        "--reference",
        dest="objects",
        action="append",
        type=Path,
        metavar="FILE",
        help=f"picture of the object; {several}; one of all pictures may be -, standard input",
    )
    group.add_argument(
        "--prompt",
        dest="objects",
        action="append",
        metavar="TEXT",
        help="text prompt, for a model that takes prompts instead of references",
    )
    group.add_argument("--negative-prompt", metavar="TEXT", help="what not to draw, for all prompts")
    group.add_argument(
        "--reference-mask",
        action="append",
        type=Path,
        metavar="FILE",
        help="mask of the object in the reference; auto: found by a segmenter; none, the default: by its "
        "transparency",
    )
    group.add_argument(
        "--reference-click",
        dest="reference_clicks",
        action=_AddClick,
        type=parse_click,
        metavar="X,Y",
        help="a pixel of the object in the preceding --reference; !X,Y: one that is not on it; may be "
        "repeated",
    )


class _AddClick(argparse.Action):
    """Adds a click to those of the reference that stands before it."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        clicks = getattr(namespace, self.dest) or {}
        clicks.setdefault(len(namespace.objects or []) - 1, []).append(values)
        setattr(namespace, self.dest, clicks)


def add_parameter_flags(group: argparse._ArgumentGroup, mode: str = "the model's") -> None:
    """Adds the flags of how objects are placed; `parameters` returns them.

    Args:
        group: gets the flags.
        mode: the mode that is used if none is given, for the help.
    """
    group.add_argument(
        "--mode",
        choices=list(MODES),
        help="crop: redraw the surroundings; shape: fill the mask; keep_background: change nothing outside "
        f"the place (default: {mode})",
    )
    group.add_argument(
        "--mask-level",
        type=parse_mask_level,
        metavar="LEVEL",
        help="how much a mask is coarsened before the model draws into it: "
        f"{', '.join(f'{number} or {name}' for number, name in enumerate(MASK_LEVELS))} "
        "(default: the model's)",
    )
    group.add_argument(
        "--edge",
        choices=EDGES,
        help="edge of the pasted picture: hard, as in the original, or soft, blended into the scene "
        "(default: the model's)",
    )
    add_pass_flags(group)
    group.add_argument(
        "--keep-specks",
        action="store_true",
        help="keep stray pixels of masks, far from the rest, as the original does",
    )
    for name, what in (
        ("--reference-ratio", "white margin around the object"),
        ("--box-ratio", "box around the place"),
        ("--crop-ratio", "zoom-in crop around the box"),
    ):
        group.add_argument(
            name, type=float, metavar="R", help=f"{what}, a factor from 1 (default: the model's)"
        )


def add_pass_flags(group: argparse._ArgumentGroup) -> None:
    """Adds the flags of what sampling starts from, and of a second pass; `passes` returns them."""
    group.add_argument(
        "--refine",
        type=int,
        nargs="?",
        const=REFINE_TIMESTEP,
        metavar="TIMESTEP",
        help="draw a place that is larger than the model's picture a second time, in tiles, for more detail, "
        f"from noise of this timestep, 1 to 999 (without a number: {REFINE_TIMESTEP}); 0: off "
        "(default: the model's)",
    )
    group.add_argument(
        "--strength",
        type=float,
        metavar="S",
        help="share of noise to start from, above 0 to 1: below 1 the object is pasted into its place first, "
        "and keeps more of its markings and its pose (default: the model's)",
    )


def parse_mask_level(text: str) -> MaskLevel:
    """Returns a level by its name or its number.

    Raises:
        argparse.ArgumentTypeError: there is no such level.
    """
    try:
        return check_mask_level(int(text) if text.isdecimal() else text)
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def check_objects(objects: Sequence[Any], masks: Sequence[Any], clicks: Clicks) -> str:
    """Checks that the flags of objects go together; returns the flag that gives the objects.

    Raises:
        InputError: there are none, of two kinds, or with masks or clicks of others.
    """
    references = sum(not isinstance(what, str) for what in objects)
    if not objects:
        raise InputError("nothing to place: give a --reference or a --prompt")
    if 0 < references < len(objects):
        raise InputError("--reference and --prompt cannot be used together: give one of them")
    if len(masks) not in (0, references):
        raise InputError(
            f"{references} --reference and {len(masks)} --reference-mask are given: give one per reference, "
            "or none"
        )
    if -1 in clicks:
        raise InputError("--reference-click needs a --reference before it: put that first")
    return "--reference" if references else "--prompt"


def parameters(options: argparse.Namespace) -> dict[str, Any]:
    """Returns the parameters of a placement that the flags set."""
    return given(options, _PARAMETERS)


def passes(options: argparse.Namespace) -> dict[str, Any]:
    """Returns the parameters that flags of `add_pass_flags` set."""
    return given(options, _PASSES)


def placement_flags(options: argparse.Namespace) -> list[str]:
    """Returns the flags that are given of how an object with its own picture is cut out and placed."""
    names = ("reference_mask", *(name for name in _PARAMETERS if name not in _PASSES))
    found = given(options, names)
    flags = [flag_of(name) for name, value in found.items() if value is not False]
    return [*flags, "--reference-click"] if options.reference_clicks else flags


def placements_of(
    objects: Sequence[Path | bytes | str],
    masks: Sequence[Path | bytes],
    clicks: Clicks,
    common: Mapping[str, Any],
) -> list[Placement]:
    """Returns a placement for each object, without its place.

    Args:
        objects: files of references, or prompts.
        masks: one for each reference, or none.
        clicks: on references.
        common: `parameters` of all of them.
    """
    found: list[Path | bytes | str | None] = [None] * len(objects)
    if masks:
        found = [_NAMED_MASKS.get(str(mask), mask) for mask in masks]
    return [
        Placement(
            **{"prompt" if isinstance(what, str) else "reference": what},  # type: ignore[arg-type]
            reference_mask=mask,
            reference_clicks=clicks.get(index),
            **common,
        )
        for index, (what, mask) in enumerate(zip(objects, found))
    ]


def joined(placements: Sequence[Placement]) -> Placement:
    """Returns one placement for several pictures of one object: those after the first are its views."""
    views = [
        View(each.reference, each.reference_mask, each.reference_clicks)
        for each in placements[1:]
        if each.reference is not None
    ]
    return replace(placements[0], views=views or None)
