"""Implements `anydoor swap`: replaces an object by another, or exchanges two objects of a scene."""

from __future__ import annotations

import argparse

from runtime.cli.edits.common import (
    add_common_flags,
    add_reference_flags,
    add_scene_flags,
    add_where_flags,
    referenced,
    run_edit,
    where,
)
from runtime.errors import InputError
from runtime.imaging.modes import MODES
from runtime.request import Swap, SwapPlaces

NAME = "swap"
HELP = "Replace an object by another, or exchange two objects of a scene"
EXAMPLES = """
anydoor swap --scene desk.jpg --click 120,80 --reference vase.png --segmenter build/engines/sam -o out.png
anydoor swap --scene desk.jpg --object-mask cup.png --reference vase.png --mode shape -o out.png
anydoor swap --scene desk.jpg --click 120,80 --other-click 400,90 --segmenter build/engines/sam -o out.png
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's flags."""
    add_scene_flags(parser)
    add_reference_flags(parser, "another object", required=False)
    parser.add_argument(
        "--mode",
        choices=list(MODES),
        help="mode of --reference; shape: it fills the outline of the old object (default: keep_background)",
    )
    add_where_flags(parser.add_argument_group("or another object of the scene"), "other", "other-click")
    add_common_flags(parser)


def run(options: argparse.Namespace) -> int:
    """Swaps the objects; see `run_edit`."""
    other = where(options, "other")
    in_scene = any(given is not None for given in vars(other).values())
    if in_scene == bool(options.reference):
        raise InputError("give one other object: with --reference, or in the scene with --other-click")
    return run_edit(options, SwapPlaces(other) if in_scene else Swap(referenced(options)))
