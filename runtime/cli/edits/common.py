"""Implements what the commands that edit a scene share: where the object is, and what fills its hole."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.cli.flags import engine_options, given, parse_box, parse_click
from runtime.cli.output import check_output, write_output
from runtime.cli.pictures import SAMPLING, add_picture_flags, check_flags, common_arguments, load_compositor
from runtime.cli.placements import (
    add_object_flags,
    add_parameter_flags,
    check_objects,
    joined,
    parameters,
    placements_of,
)
from runtime.cli.progress import Progress
from runtime.cli.remote import connect, follow
from runtime.cli.standard_streams import read_standard_input
from runtime.errors import InputError
from runtime.request import Action, Edit, Fill, Placement, Sampling, Where

if TYPE_CHECKING:
    from runtime.edits import Editor

_PICTURES = ("scene", "object_mask", "other_mask", "objects", "reference_mask", "to")
"""Flags with a picture or a list of them; not every command has all."""


def add_scene_flags(parser: argparse.ArgumentParser, title: str = "the object") -> None:
    """Adds --scene, and the flags that select an object in it."""
    group = parser.add_argument_group(f"{title} (default: the main object of the scene)")
    group.add_argument("--scene", type=Path, required=True, metavar="FILE", help="picture to edit")
    add_where_flags(group, "object", "click")


def add_where_flags(group: argparse._ArgumentGroup, name: str, click: str) -> None:
    """Adds flags for clicks, a box and a mask; see `where`."""
    group.add_argument(
        f"--{click}",
        dest=f"{name}_clicks",
        action="append",
        type=parse_click,
        metavar="X,Y",
        help="a pixel of it; !X,Y: one that is not on it; may be repeated",
    )
    group.add_argument(f"--{name}-box", type=parse_box, metavar="X0,Y0,X1,Y1", help="a box around it")
    group.add_argument(f"--{name}-mask", type=Path, metavar="FILE", help="its mask, of the scene's size")


def add_reference_flags(parser: argparse.ArgumentParser, what: str, mode: str) -> None:
    """Adds the flags of another object, which has its own picture, and of how it is placed.

    Args:
        parser: gets the flags.
        what: title of the group.
        mode: the default of --mode, for the help.
    """
    group = parser.add_argument_group(what)
    add_object_flags(group, "several are views of one object")
    add_parameter_flags(group, mode)


def add_common_flags(parser: argparse.ArgumentParser, sampling: str = SAMPLING) -> None:
    """Adds the flags of filling, sampling under a heading, output, machine and server."""
    group = parser.add_argument_group("what fills the hole that the object leaves")
    group.add_argument(
        "--filler",
        type=Path,
        metavar="DIR",
        help="bundle of Stable Diffusion for inpainting, or of IMPRINT (default: --bundle if it can fill "
        "holes, else the background is guessed)",
    )
    group.add_argument(
        "--fill-prompt", metavar="TEXT", help="what to draw in the hole, for a filler that takes prompts"
    )
    group.add_argument("--fill-steps", type=int, metavar="N", help="sampling steps (default: the model's)")
    add_picture_flags(parser, sampling)


def where(options: argparse.Namespace, name: str = "object") -> Where:
    """Returns where an object is, from the flags."""
    return Where(*(getattr(options, f"{name}_{kind}") for kind in ("box", "mask", "clicks")))


def referenced(options: argparse.Namespace) -> Placement:
    """Returns the other object from the flags, without a place.

    Raises:
        InputError: there is none, or more than one.
    """
    objects, masks = options.objects or [], options.reference_mask or []
    clicks = options.reference_clicks or {}
    kind = check_objects(objects, masks, clicks)
    if kind == "--prompt" and len(objects) > 1:
        raise InputError(f"{len(objects)} --prompt are given: give one")
    return joined(placements_of(objects, masks, clicks, parameters(options)))


def run_edit(options: argparse.Namespace, action: Callable[[argparse.Namespace], Action]) -> int:
    """Edits, writes the pictures and prints their names.

    Args:
        options: parsed flags.
        action: returns what to do, from the flags with their pictures read.

    Raises:
        AnyDoorError: a flag, a picture, a bundle or the server cannot be used.
    """
    if options.server and options.filler:
        raise InputError("--filler has no effect with --server")
    check_flags(options)
    _read_standard_input(options)
    check_output(options.output, options.scene, options.num_images, options.grid)
    common = common_arguments(options)
    if common.pop("initial_noise") is not None:
        raise InputError("--initial-noise is for composite and draw")
    sampling = {name.removeprefix("fill_"): value for name, value in given(options, ["fill_steps"]).items()}
    fill = Fill(options.fill_prompt or "", Sampling(**sampling))
    edit = Edit(options.scene, where(options), action(options), fill, **common)
    with Progress(options.quiet) as progress:
        if options.server:
            with connect(options) as client:
                results = follow(client.stream_edit(edit), progress)
        else:
            editor = _load(options)
            if not options.quiet and (plan := editor.compositor.engine.describe()):
                print(plan, file=sys.stderr)
            results = editor.run(edit, progress.on_step)
    write_output(options.output, results, options.grid)
    if results[0].filler:
        print(f"anydoor: filled by: {results[0].filler}", file=sys.stderr)
    return 0


def _read_standard_input(options: argparse.Namespace) -> None:
    """Puts the bytes of standard input in place of the picture that is `-`."""
    pictures = {name: getattr(options, name) for name in _PICTURES if getattr(options, name, None)}
    lists = [value if isinstance(value, list) else [value] for value in pictures.values()]
    for (name, value), read in zip(pictures.items(), read_standard_input(*lists)):
        setattr(options, name, read if isinstance(value, list) else read[0])


def _load(options: argparse.Namespace) -> Editor:
    from runtime.compositor import Compositor
    from runtime.edits import Editor
    from runtime.segmentation import engine_bytes

    if not options.filler:
        return Editor(load_compositor(options))
    filler = Compositor.load(options.filler, engine_options(options), cache_bytes=0)
    taken = engine_bytes(filler.bundle, filler.engine)
    return Editor(load_compositor(options, taken=taken), filler)
