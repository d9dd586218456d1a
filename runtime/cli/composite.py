"""Implements `anydoor composite`: puts objects into a scene, on this machine or on a server."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from runtime.cli.flags import parse_box
from runtime.cli.output import check_output
from runtime.cli.pictures import add_picture_flags, check_flags, common_arguments, make_pictures
from runtime.cli.placements import (
    add_object_flags,
    add_parameter_flags,
    check_objects,
    joined,
    parameters,
    placements_of,
)
from runtime.cli.standard_streams import read_standard_input
from runtime.errors import InputError
from runtime.request import Request

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
anydoor composite --reference cup.png --scene desk.jpg --box 80,60,300,260 --strength 0.5 -o out.png
anydoor composite --prompt "a sks cup" --scene desk.jpg --box 80,60,300,260 --bundle build/sks -o out.png
anydoor composite --reference cup.png --scene desk.jpg --box 80,60,300,260 --server gpu:50051 -o out.png
anydoor composite --prompt "a sks cup" --scene desk.jpg --box 80,60,300,260 --server gpu:50051 --model sks \\
    -o out.png
anydoor composite --reference cup.png --scene - --box 80,60,300,260 -o - < desk.jpg > out.png
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's flags."""
    _add_placement_flags(parser)
    add_picture_flags(parser)


def _add_placement_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "what goes where (repeat for several objects, placed one after the other)"
    )
    add_object_flags(group, "several with one place are views of one object")
    _add_place_flags(group)


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
    add_parameter_flags(group)


def run(options: argparse.Namespace) -> int:
    """Composites, writes the pictures and prints their names.

    Raises:
        AnyDoorError: a flag, a picture, the bundle or the server cannot be used.
    """
    chosen = vars(options)
    # the pictures go straight into the request: no function below gets the options with them
    objects, places = chosen.pop("objects") or [], chosen.pop("places") or []
    masks, clicks = chosen.pop("reference_mask") or [], chosen.pop("reference_clicks") or {}
    kind = check_objects(objects, masks, clicks)
    _check_places(kind, len(objects), len(places))
    check_flags(options)
    (scene,), objects, masks, places = read_standard_input([options.scene], objects, masks, places)
    check_output(options.output, scene, options.num_images, options.grid)
    placements = placements_of(objects, masks, clicks, parameters(options))
    if len(places) < len(objects):
        placements = [joined(placements)]
    placements = [replace(each, **_place(place)) for each, place in zip(placements, places)]
    make_pictures(Request.of(scene, placements, **common_arguments(options)), options)
    return 0


def _place(place: Path | bytes | tuple[int, int, int, int]) -> dict[str, Any]:
    return {"box" if isinstance(place, tuple) else "mask": place}


def _check_places(kind: str, objects: int, places: int) -> None:
    # several references with one place are views of one object
    if places != objects and not (kind == "--reference" and places == 1):
        raise InputError(
            f"{objects} {kind} and {places} --box or --mask are given: "
            f"every {kind.removeprefix('--')} needs one place"
        )
