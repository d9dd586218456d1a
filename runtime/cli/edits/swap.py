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
from runtime.cli.placements import passes, placement_flags
from runtime.errors import InputError
from runtime.request import Action, Swap, SwapPlaces

NAME = "swap"
HELP = "Replace an object by another, or exchange two objects of a scene"
EXAMPLES = """
anydoor swap --scene desk.jpg --click 120,80 --reference vase.png --segmenter build/engines/sam -o out.png
anydoor swap --scene desk.jpg --object-mask cup.png --reference vase.png --mode shape -o out.png
anydoor swap --scene desk.jpg --object-mask cup.png --reference vase-1.png --reference vase-2.png \\
    --bundle build/engines/two-views -o out.png
anydoor swap --scene desk.jpg --click 120,80 --other-click 400,90 --segmenter build/engines/sam -o out.png
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's flags."""
    add_scene_flags(parser)
    add_reference_flags(parser, "another object", "keep_background")
    add_where_flags(parser.add_argument_group("or another object of the scene"), "other", "other-click")
    add_common_flags(parser)


def run(options: argparse.Namespace) -> int:
    """Swaps the objects; see `run_edit`."""
    other = where(options, "other")
    in_scene = any(given is not None for given in vars(other).values())
    if in_scene == bool(options.objects):
        raise InputError("give one other object: with --reference, or in the scene with --other-click")
    if in_scene and (unused := placement_flags(options)):
        raise InputError(f"{unused[0]} is for an object with a --reference: leave it out")
    return run_edit(options, _exchange if in_scene else _replace)


def _exchange(options: argparse.Namespace) -> Action:
    return SwapPlaces(where(options, "other"), **passes(options))


def _replace(options: argparse.Namespace) -> Action:
    return Swap(referenced(options))
