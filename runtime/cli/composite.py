"""Implements `anydoor composite`: puts objects into a scene, on this machine or on a server."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from runtime.cli.flags import given, parse_box, parse_click
from runtime.cli.output import check_output
from runtime.cli.pictures import add_picture_flags, check_flags, common_arguments, make_pictures
from runtime.cli.standard_streams import read_standard_input
from runtime.errors import InputError
from runtime.imaging.mask_levels import MASK_LEVELS, MaskLevel, check_mask_level
from runtime.imaging.modes import MODES
from runtime.imaging.paste_back import EDGES
from runtime.request import AUTOMATIC, REFINE_TIMESTEP, Placement, Request, View

NAME = "composite"
HELP = "Put one or more objects into a scene"
EXAMPLES = """
anydoor composite --reference cup.png --scene desk.jpg --box 80,60,300,260 -o out.png
anydoor composite --reference cup.jpg --reference-mask cup_mask.png --scene desk.jpg \\
    --mask place.png --mode shape --seed 7 -o out.png
anydoor composite --reference cup.png --box 80,60,300,260 --reference book.png --box 320,90,500,250 \\
    --scene desk.jpg -o both.png
anydoor composite --reference cup.png --scene desk.jpg --box 80,60,300,260 --num-images 4 --grid -o cups.png
anydoor composite --reference cup.jpg --reference-mask auto --scene desk.jpg --box 80,60,300,260 -o out.png
anydoor composite --reference shelf.jpg --reference-click 210,95 --segmenter build/engines/sam \\
    --scene desk.jpg --box 80,60,300,260 -o out.png
anydoor composite --reference cup.png --scene desk.jpg --box 80,60,300,260 --quality fast -o out.png
anydoor composite --reference cup.png --scene wall.jpg --box 600,200,3000,2600 --refine -o out.png
anydoor composite --prompt "a sks cup" --scene desk.jpg --box 80,60,300,260 --bundle build/sks -o out.png
anydoor composite --reference cup.png --scene desk.jpg --box 80,60,300,260 --server gpu:50051 -o out.png
anydoor composite --prompt "a sks cup" --scene desk.jpg --box 80,60,300,260 --server gpu:50051 --model sks \\
    -o out.png
anydoor composite --reference cup.png --scene - --box 80,60,300,260 -o - < desk.jpg > out.png
"""

_PLACEMENT = (
    "mode",
    "reference_ratio",
    "box_ratio",
    "crop_ratio",
    "negative_prompt",
    "keep_specks",
    "mask_level",
    "edge",
    "refine",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's flags."""
    _add_placement_flags(parser)
    add_picture_flags(parser)


def _add_placement_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "what goes where (repeat for several objects, placed one after the other)"
    )
    # one list for both, so that the n-th place belongs to the n-th of them
    group.add_argument(
        "--reference",
        dest="objects",
        action="append",
        type=Path,
        metavar="FILE",
        help="picture of the object; several with one place are views of one object; one of all pictures "
        "may be -, standard input",
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
        help="mask of the object in the reference; auto: found by a segmenter (default: transparency)",
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
    _add_place_flags(group)


class _AddClick(argparse.Action):
    """Adds a click to those of the reference that stands before it."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        clicks = getattr(namespace, self.dest) or {}
        clicks.setdefault(len(namespace.objects or []) - 1, []).append(values)
        setattr(namespace, self.dest, clicks)


def _add_place_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--scene", type=Path, required=True, metavar="FILE", help="picture to put the object into"
    )
    # one list for both, likewise
    group.add_argument(
        "--box",
        dest="places",
        action="append",
        type=parse_box,
        metavar="X0,Y0,X1,Y1",
        help="place of the object, in pixels of the scene; x1 and y1 are exclusive",
    )
    group.add_argument(
        "--mask", dest="places", action="append", type=Path, metavar="FILE", help="mask of the place"
    )
    group.add_argument(
        "--mode",
        choices=list(MODES),
        help="crop: redraw the surroundings; shape: fill the mask; keep_background: change nothing outside "
        "the place (default: the model's)",
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


def parse_mask_level(text: str) -> MaskLevel:
    """Returns a level by its name or its number.

    Raises:
        argparse.ArgumentTypeError: there is no such level.
    """
    try:
        return check_mask_level(int(text) if text.isdecimal() else text)
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def run(options: argparse.Namespace) -> int:
    """Composites, writes the pictures and prints their names.

    Raises:
        AnyDoorError: a flag, a picture, the bundle or the server cannot be used.
    """
    chosen = vars(options)
    # the pictures go straight into the request: no function below gets the options with them
    objects, places = chosen.pop("objects") or [], chosen.pop("places") or []
    masks, clicks = chosen.pop("reference_mask") or [], chosen.pop("reference_clicks") or {}
    _check_counts(objects, len(places), len(masks))
    if -1 in clicks:
        raise InputError("--reference-click needs a --reference before it: put that first")
    check_flags(options)
    (scene,), objects, masks, places = read_standard_input([options.scene], objects, masks, places)
    check_output(options.output, scene, options.num_images, options.grid)
    common = given(options, _PLACEMENT)
    masks = [AUTOMATIC if mask == Path(AUTOMATIC) else mask for mask in masks or [None] * len(objects)]
    placements = [
        Placement(
            **_object(what),
            reference_mask=mask,
            reference_clicks=clicks.get(index),
            **_place(place),
            **common,
        )
        for index, (what, place, mask) in enumerate(zip(objects, places, masks))
    ]
    if len(places) < len(objects):
        views = [View(objects[index], masks[index], clicks.get(index)) for index in range(1, len(objects))]
        placements = [replace(placements[0], views=views)]
    make_pictures(Request.of(scene, placements, **common_arguments(options)), options)
    return 0


def _object(what: Path | bytes | str) -> dict[str, Any]:
    return {"prompt" if isinstance(what, str) else "reference": what}


def _place(place: Path | bytes | tuple[int, int, int, int]) -> dict[str, Any]:
    return {"box" if isinstance(place, tuple) else "mask": place}


def _check_counts(objects: list[Path | str], places: int, masks: int) -> None:
    references = sum(isinstance(what, Path) for what in objects)
    kinds = "--prompt" if objects and not references else "--reference"
    if not objects:
        raise InputError("nothing to place: give a --reference or a --prompt")
    if 0 < references < len(objects):
        raise InputError("--reference and --prompt cannot be used together: give one of them")
    # several references with one place are views of one object
    if places != len(objects) and not (places == 1 < references):
        raise InputError(
            f"{len(objects)} {kinds} and {places} --box or --mask are given: "
            f"every {kinds.removeprefix('--')} needs one place"
        )
    if masks not in (0, references):
        raise InputError(
            f"{references} --reference and {masks} --reference-mask are given: give one per reference, or "
            "none"
        )
