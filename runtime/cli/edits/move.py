"""Implements `anydoor move`: moves an object to another place in its scene."""

from __future__ import annotations

import argparse

from runtime.cli.edits.common import add_common_flags, add_scene_flags, run_edit
from runtime.cli.flags import parse_box
from runtime.cli.placements import add_pass_flags, passes
from runtime.request import Move

NAME = "move"
HELP = "Move an object to another place in its scene"
EXAMPLES = """
anydoor move --scene desk.jpg --click 120,80 --to 300,60,420,260 --segmenter build/engines/sam -o out.png
anydoor move --scene desk.jpg --object-mask cup.png --to 300,60,420,260 -o out.png
anydoor move --scene desk.jpg --click 120,80 --to 300,60,420,260 --server gpu:50051 -o out.png
anydoor move --scene desk.jpg --object-mask cup.png --to 300,60,420,260 --strength 0.5 -o out.png
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's flags."""
    add_scene_flags(parser)
    parser.add_argument(
        "--to", type=parse_box, required=True, metavar="X0,Y0,X1,Y1", help="the new place, in pixels"
    )
    add_pass_flags(parser.add_argument_group("how it is drawn again"))
    add_common_flags(parser)


def run(options: argparse.Namespace) -> int:
    """Moves the object; see `run_edit`."""
    return run_edit(options, lambda read: Move(read.to, **passes(read)))
