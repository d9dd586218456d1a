"""Implements `anydoor reshape`: redraws an object of a scene in another outline."""

from __future__ import annotations

import argparse
from pathlib import Path

from runtime.cli.edits.common import add_common_flags, add_scene_flags, run_edit
from runtime.cli.placements import add_pass_flags, passes
from runtime.request import Reshape

NAME = "reshape"
HELP = "Redraw an object of a scene in another outline"
EXAMPLES = """
anydoor reshape --scene desk.jpg --click 120,80 --to taller.png --segmenter build/engines/sam -o out.png
anydoor reshape --scene desk.jpg --object-mask cup.png --to taller.png -o out.png
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's flags."""
    add_scene_flags(parser)
    parser.add_argument(
        "--to", type=Path, required=True, metavar="FILE", help="mask of the new outline, of the scene's size"
    )
    add_pass_flags(parser.add_argument_group("how it is drawn again"))
    add_common_flags(parser)


def run(options: argparse.Namespace) -> int:
    """Reshapes the object; see `run_edit`."""
    return run_edit(options, lambda read: Reshape(read.to, **passes(read)))
