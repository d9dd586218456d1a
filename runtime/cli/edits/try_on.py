"""Implements `anydoor try-on`: dresses a person in a garment."""

from __future__ import annotations

import argparse

from runtime.cli.edits.common import (
    add_common_flags,
    add_reference_flags,
    add_scene_flags,
    referenced,
    run_edit,
)
from runtime.request import TryOn

NAME = "try-on"
HELP = "Dress a person in a garment"
EXAMPLES = """
anydoor try-on --scene person.jpg --object-mask shirt_place.png --reference shirt.png -o out.png
anydoor try-on --scene person.jpg --click 210,300 --reference shirt.jpg --reference-mask auto \\
    --segmenter build/engines/sam --segmenter build/engines/u2net -o out.png
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's flags."""
    add_scene_flags(parser, "the clothes to replace: a coarse outline is enough")
    add_reference_flags(parser, "the garment", "shape")
    add_common_flags(parser)


def run(options: argparse.Namespace) -> int:
    """Tries the garment on; see `run_edit`."""
    return run_edit(options, lambda read: TryOn(referenced(read)))
