"""Implements `anydoor segment`: finds an object in a picture and writes its mask, here or on a server."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from engines.options import EngineOptions
from runtime.cli.flags import (
    add_engine_flags,
    add_segmenter_flag,
    engine_options,
    field_names,
    parse_box,
    parse_click,
)
from runtime.cli.output import check_output
from runtime.cli.output_place import save_pictures
from runtime.cli.pictures import check_flags
from runtime.cli.remote import add_server_flags, connect
from runtime.cli.standard_streams import STREAM, read_standard_input
from runtime.errors import InputError
from runtime.request import Where

if TYPE_CHECKING:
    from runtime.imaging.sources import PictureLike

NAME = "segment"
HELP = "Find an object in a picture, and write its mask"
EXAMPLES = """
anydoor segment cup.jpg -o mask.png
anydoor segment cup.jpg --segmenter build/engines/u2net -o mask.png
anydoor segment desk.jpg --click 120,80 --click '!200,90' --segmenter build/engines/sam -o mask.png
anydoor segment desk.jpg --box 80,60,300,260 --segmenter build/engines/sam -o mask.png
anydoor segment desk.jpg --click 120,80 --server gpu:50051 -o mask.png
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's flags."""
    parser.add_argument(
        "picture", type=Path, metavar="PICTURE", help="picture with the object; - is standard input"
    )
    parser.add_argument(
        "--click",
        dest="clicks",
        action="append",
        type=parse_click,
        metavar="X,Y",
        help="a pixel of the object; !X,Y: one that is not on it; may be repeated (default: the main object)",
    )
    parser.add_argument("--box", type=parse_box, metavar="X0,Y0,X1,Y1", help="a box around the object")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        required=True,
        metavar="FILE",
        help="file for the mask, which is white on the object",
    )
    machine = parser.add_argument_group("machine")
    add_segmenter_flag(machine)
    add_engine_flags(machine)
    add_server_flags(parser.add_argument_group("server (instead of this machine)"), with_model=False)


def run(options: argparse.Namespace) -> int:
    """Finds the object, and writes its mask.

    Raises:
        AnyDoorError: a flag, the picture, the segmenter or the server cannot be used, or nothing is found.
    """
    check_flags(options, ("segmenter", *field_names(EngineOptions)))
    ((picture,),) = read_standard_input([options.picture])
    if options.clicks and options.box:
        raise InputError("--click and --box cannot be used together: give one of them")
    check_output(options.output, picture, 1, grid=False)
    mask = _find(picture, Where(box=options.box, clicks=options.clicks), options)
    save_pictures([(np.repeat(mask[..., None] * np.uint8(255), 3, axis=2), options.output)])
    if options.output != STREAM:
        print(f"{options.output} ({np.count_nonzero(mask)} of {mask.size} pixels)")
    return 0


def _find(picture: PictureLike, where: Where, options: argparse.Namespace) -> NDArray[np.bool_]:
    if options.server:
        with connect(options) as client:
            return client.segment(picture, where)
    from runtime.segmentation import Segmenter

    segmenter = Segmenter.load(*(options.segmenter or ()), options=engine_options(options))
    segmenter.check(where)
    return segmenter.mask(picture, where.clicks, where.box)
