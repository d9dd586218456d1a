"""Implements `anydoor segment`: finds objects in pictures and writes their masks, here or on a server."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from engines.options import EngineOptions
from runtime.cli import progress
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
from runtime.result import Found

if TYPE_CHECKING:
    from runtime.imaging.sources import PictureLike

NAME = "segment"
HELP = "Find the object in each picture, and write its mask"
EXAMPLES = """
anydoor segment cup.jpg -o mask.png
anydoor segment cup.jpg --segmenter build/engines/u2net -o mask.png
anydoor segment photos/*.jpg --segmenter build/engines/u2net -o masks
anydoor segment desk.jpg --click 120,80 --click '!200,90' --segmenter build/engines/sam -o mask.png
anydoor segment desk.jpg --box 80,60,300,260 --segmenter build/engines/sam -o mask.png
anydoor segment desk.jpg --click 120,80 --server gpu:50051 -o mask.png
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's flags."""
    parser.add_argument(
        "pictures",
        nargs="+",
        type=Path,
        metavar="PICTURE",
        help="picture with an object; - is standard input",
    )
    parser.add_argument(
        "--click",
        dest="clicks",
        action="append",
        type=parse_click,
        metavar="X,Y",
        help="a pixel of the object, in every picture; !X,Y: one that is not on it; may be repeated "
        "(default: the main object)",
    )
    parser.add_argument("--box", type=parse_box, metavar="X0,Y0,X1,Y1", help="a box around the object")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        required=True,
        metavar="FILE",
        help="file for the mask, which is white on the object; of several pictures a folder, where every "
        "mask has its picture's name and .png",
    )
    machine = parser.add_argument_group("machine")
    add_segmenter_flag(machine)
    add_engine_flags(machine)
    add_server_flags(parser.add_argument_group("server (instead of this machine)"), with_model=False)


def run(options: argparse.Namespace) -> int:
    """Finds the objects, and writes their masks.

    Raises:
        AnyDoorError: a flag, a picture, the segmenter or the server cannot be used, or nothing is found.
    """
    check_flags(options, ("segmenter", *field_names(EngineOptions)))
    if options.clicks and options.box:
        raise InputError("--click and --box cannot be used together: give one of them")
    outputs = _outputs(options.pictures, options.output)
    (pictures,) = read_standard_input(options.pictures)
    for picture, output in zip(pictures, outputs):
        check_output(output, picture, 1, grid=False)
    failures = 0
    with _finder(options) as find:
        told = time.monotonic()
        for index, (picture, output) in enumerate(zip(pictures, outputs)):
            if time.monotonic() - told >= progress.SECONDS_BETWEEN_LINES:
                print(f"anydoor: picture {index + 1} of {len(pictures)}", file=sys.stderr, flush=True)
                told = time.monotonic()
            try:
                _write(find(picture), output)
            except InputError as error:
                if len(pictures) == 1:
                    raise
                print(f"anydoor: '{options.pictures[index]}' has no mask: {error}", file=sys.stderr)
                failures += 1
    if failures:
        raise InputError(f"{failures} of {len(pictures)} pictures have no mask; the others are done")
    return 0


def _outputs(pictures: Sequence[Path], output: Path) -> list[Path]:
    """Returns the file for the mask of each picture, in a folder where there are several.

    Raises:
        InputError: two masks would be the same file, or a mask would replace a picture.
    """
    if len(pictures) == 1 and not output.is_dir():
        return [output]
    if output == STREAM:
        raise InputError("standard output holds one mask: write those of several pictures to a folder")
    if STREAM in pictures:
        raise InputError("the mask of standard input has no name in a folder: give that picture alone")
    of: dict[Path, Path] = {}
    for picture in pictures:
        mask = output / f"{picture.stem}.png"
        if mask in of:
            raise InputError(f"'{mask}' would be the mask of '{of[mask]}' and of '{picture}': rename one")
        of[mask] = picture
    replaced = {path.resolve() for path in pictures} & {path.resolve() for path in of}
    if replaced:
        raise InputError(f"a mask would replace the picture '{min(replaced)}': write to another folder")
    return list(of)


@contextmanager
def _finder(options: argparse.Namespace) -> Iterator[Callable[[PictureLike], Found]]:
    """Opens the segmenter or the server; yields what finds the object of a picture."""
    where = Where(box=options.box, clicks=options.clicks)
    if options.server:
        with connect(options) as client:
            yield lambda picture: client.find(picture, where)
        return
    from runtime.segmentation import Segmenter

    segmenter = Segmenter.load(*(options.segmenter or ()), options=engine_options(options))
    segmenter.check(where)
    yield lambda picture: segmenter.segment(picture, where.clicks, where.box)


def _write(found: Found, output: Path) -> None:
    """Writes a mask, and prints what it is."""
    mask = found.mask
    save_pictures([(np.repeat(mask[..., None] * np.uint8(255), 3, axis=2), output)])
    if output != STREAM:
        score = "" if found.score is None else f", score {found.score:.2f}"
        print(f"{output} ({np.count_nonzero(mask)} of {mask.size} pixels{score})", flush=True)
