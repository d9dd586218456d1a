"""Implements `anydoor remove`: removes an object from a scene."""

from __future__ import annotations

import argparse

from runtime.cli.edits.common import add_common_flags, add_scene_flags, run_edit
from runtime.request import Remove

NAME = "remove"
HELP = "Remove an object from a scene"
EXAMPLES = """
anydoor remove --scene desk.jpg --click 120,80 --segmenter build/engines/sam -o out.png
anydoor remove --scene desk.jpg --object-mask cup.png --filler build/engines/512-inpainting-ema -o out.png
anydoor remove --scene desk.jpg --object-mask cup.png --filler build/engines/512-inpainting-ema \\
    --fill-prompt "a wooden desk" --num-images 4 --grid -o desks.png
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's flags."""
    add_scene_flags(parser)
    add_common_flags(parser, "sampling (--seed alone: the others are refused, as no object is drawn)")


def run(options: argparse.Namespace) -> int:
    """Removes the object; see `run_edit`."""
    return run_edit(options, lambda _: Remove())
