"""Implements `anydoor draw`: draws pictures from a prompt, on this machine or on a server."""

from __future__ import annotations

import argparse

from runtime.cli.output import check_output
from runtime.cli.pictures import add_picture_flags, check_flags, common_arguments, make_pictures
from runtime.request import Request

NAME = "draw"
HELP = "Draw pictures from a prompt, with a model that takes prompts"
EXAMPLES = """
anydoor draw --prompt "a sks cup in the snow" --bundle build/engines/sks -o out.png
anydoor draw --prompt "a sks cup" --negative-prompt "blurry" --seed 7 --num-images 4 --grid -o cups.png
anydoor draw --prompt "a sks cup in the snow" --server gpu:50051 --model sks -o out.png
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's flags."""
    group = parser.add_argument_group("what to draw")
    group.add_argument("--prompt", required=True, metavar="TEXT", help="what to draw")
    group.add_argument("--negative-prompt", metavar="TEXT", help="what not to draw")
    group.add_argument(
        "--size",
        type=parse_picture_size,
        metavar="WxH",
        help="width and height in pixels, which must be the bundle's (default)",
    )
    add_picture_flags(parser)


def parse_picture_size(text: str) -> tuple[int, int]:
    """`WxH` as two numbers, or `N` for a square.

    Raises:
        argparse.ArgumentTypeError: it is not.
    """
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(part.isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(
            f"'{text}' is not a size: a width and a height are expected, like 768x512"
        )
    return int(parts[0]), int(parts[-1])


def run(options: argparse.Namespace) -> int:
    """Draws, writes the pictures and prints their names.

    Raises:
        AnyDoorError: a flag, the bundle or the server cannot be used.
    """
    check_flags(options)
    check_output(options.output, None, options.num_images, options.grid)
    request = Request.drawing(
        options.prompt, options.negative_prompt, options.size, **common_arguments(options)
    )
    make_pictures(request, options)
    return 0
