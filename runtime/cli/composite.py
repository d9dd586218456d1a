"""`anydoor composite`: puts objects into a scene, on this machine or on a server."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from engines.options import EngineOptions
from runtime.cli.flags import (
    add_bundle_flag,
    add_engine_flags,
    default_bundle,
    engine_options,
    field_names,
    flag_of,
    given,
)
from runtime.cli.output import check_output, write_output
from runtime.cli.progress import Progress
from runtime.cli.remote import SERVER_FLAGS, add_server_flags, connect, follow
from runtime.cli.standard_streams import read_standard_input
from runtime.diffusion.presets import QUALITIES
from runtime.diffusion.samplers import SAMPLERS
from runtime.errors import InputError
from runtime.imaging.modes import MODES
from runtime.request import Placement, Request, Sampling

NAME = "composite"
HELP = "Put one or more objects into a scene"
EXAMPLES = """
anydoor composite --reference cup.png --scene desk.jpg --box 80,60,300,260 -o out.png
anydoor composite --reference cup.jpg --reference-mask cup_mask.png --scene desk.jpg \\
    --mask place.png --mode shape --seed 7 -o out.png
anydoor composite --reference cup.png --box 80,60,300,260 --reference book.png --box 320,90,500,250 \\
    --scene desk.jpg -o both.png
anydoor composite --reference cup.png --scene desk.jpg --box 80,60,300,260 --num-images 4 --grid -o cups.png
anydoor composite --reference cup.png --scene desk.jpg --box 80,60,300,260 --quality fast -o out.png
anydoor composite --reference cup.png --scene desk.jpg --box 80,60,300,260 --server gpu:50051 -o out.png
anydoor composite --reference cup.png --scene - --box 80,60,300,260 -o - < desk.jpg > out.png
"""

_PLACEMENT = ("mode", "reference_ratio", "box_ratio", "crop_ratio", "keep_specks")
_SAMPLING = (
    *("quality", "steps", "guidance_scale", "control_scale", "eta", "sampler"),
    *("guidance_interval", "map_steps"),
)
_MACHINE = ("bundle", *field_names(EngineOptions), "control_window", "initial_noise")
"""Flags that have an effect without --server only."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's flags."""
    _add_placement_flags(parser)
    _add_sampling_flags(parser)
    out = parser.add_argument_group("output")
    out.add_argument(
        "-o",
        "--output",
        type=Path,
        required=True,
        metavar="FILE",
        help=".png, .jpg, .webp or .avif; - writes a PNG to standard output",
    )
    out.add_argument(
        "--num-images", type=int, default=1, metavar="N", help="pictures with seeds S, S+1, ... (default: 1)"
    )
    out.add_argument("--grid", action="store_true", help="write one contact sheet instead of numbered files")
    out.add_argument("--quiet", action="store_true", help="show no progress and no memory plan")
    machine = parser.add_argument_group("machine")
    add_bundle_flag(machine)
    add_engine_flags(machine)
    machine.add_argument(
        "--control-window",
        type=int,
        metavar="N",
        help="steps whose detail maps are computed in one call, up to the bundle's batch (default: the batch "
        "on a card, 1 on a CPU)",
    )
    add_server_flags(parser.add_argument_group("server (instead of this machine)"))


def _add_placement_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "what goes where (repeat for several objects, placed one after the other)"
    )
    group.add_argument(
        "--reference",
        action="append",
        type=Path,
        required=True,
        metavar="FILE",
        help="picture of the object; of all pictures, one may be -, standard input",
    )
    group.add_argument(
        "--reference-mask",
        action="append",
        type=Path,
        metavar="FILE",
        help="where the object is in it (default: its transparency)",
    )
    group.add_argument("--scene", type=Path, required=True, metavar="FILE", help="picture to put it into")
    # one list for both, so that the n-th place belongs to the n-th reference
    group.add_argument(
        "--box",
        dest="places",
        action="append",
        type=parse_box,
        metavar="X0,Y0,X1,Y1",
        help="place in pixels of the scene, x1 and y1 exclusive",
    )
    group.add_argument(
        "--mask", dest="places", action="append", type=Path, metavar="FILE", help="place as a mask"
    )
    group.add_argument(
        "--mode",
        choices=list(MODES),
        help="crop: surroundings are generated anew; shape: the object fills the mask; keep_background: "
        "nothing outside the box changes (default: the model's)",
    )
    group.add_argument(
        "--keep-specks",
        action="store_true",
        help="let pixels of a mask that lie far from the rest belong to it, as the original does",
    )
    for name, what in (
        ("--reference-ratio", "white around the object"),
        ("--box-ratio", "box around the place"),
        ("--crop-ratio", "zoom-in crop around the box"),
    ):
        group.add_argument(
            name, type=float, metavar="R", help=f"{what}, a factor from 1 (default: the model's)"
        )


def _add_sampling_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sampling (default: what --quality says, else the model's)")
    group.add_argument(
        "--seed", type=int, metavar="S", help="the same seed gives the same picture (default: random)"
    )
    group.add_argument(
        "--quality",
        choices=list(QUALITIES),
        help="exact: as the model's authors sample it; balanced, fast: nearly the same picture, at least "
        "twice and four times as fast",
    )
    group.add_argument("--steps", type=int, metavar="N", help="sampling steps")
    group.add_argument(
        "--guidance-scale", type=float, metavar="G", help="classifier-free guidance; 1 is without"
    )
    group.add_argument("--control-scale", type=float, metavar="C", help="factor of the detail maps")
    group.add_argument("--eta", type=float, metavar="E", help="noise per step, 0 (DDIM) to 1 (DDPM)")
    group.add_argument(
        "--sampler",
        choices=list(SAMPLERS),
        help="ddim, or dpm_solver_2m, of second order, which needs fewer steps and has no eta",
    )
    group.add_argument(
        "--guidance-interval",
        type=parse_interval,
        metavar="FIRST,LAST",
        help="timesteps with guidance, of 0 (picture) to 999 (noise); the others cost half",
    )
    group.add_argument(
        "--map-steps",
        type=int,
        metavar="N",
        help="compute detail maps at so many timesteps, shared by neighbouring steps",
    )
    group.add_argument(
        "--initial-noise",
        type=Path,
        metavar="FILE.npy",
        help="latents (N, C, h, w) to start from, to reproduce another implementation",
    )


def parse_box(text: str) -> tuple[int, int, int, int]:
    """`x0,y0,x1,y1` as four numbers.

    Raises:
        argparse.ArgumentTypeError: it is not.
    """
    try:
        x0, y0, x1, y1 = (int(part) for part in text.replace(" ", "").split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"'{text}' is not a box: four whole numbers x0,y0,x1,y1 are expected, like 80,60,300,260"
        ) from error
    return x0, y0, x1, y1


def parse_interval(text: str) -> tuple[int, int]:
    """`first,last` as two numbers.

    Raises:
        argparse.ArgumentTypeError: it is not.
    """
    try:
        first, last = (int(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"'{text}' is not an interval: two timesteps first,last are expected, like 200,999"
        ) from error
    return first, last


def run(options: argparse.Namespace) -> int:
    """Composites, writes the pictures and prints their names.

    Raises:
        AnyDoorError: a flag, a picture, the bundle or the server cannot be used.
    """
    chosen = vars(options)
    # the pictures go straight into the request: no function below gets the options with them
    references, places = chosen.pop("reference"), chosen.pop("places") or []
    masks = chosen.pop("reference_mask") or [None] * len(references)
    _check_counts(len(references), len(places), len(masks))
    _check_flags(options)
    (scene,), references, masks, places = read_standard_input([options.scene], references, masks, places)
    check_output(options.output, scene, options.num_images, options.grid)
    placement = given(options, _PLACEMENT)
    request = Request(
        scene=scene,
        placements=[
            Placement(reference, mask, **{"box" if isinstance(place, tuple) else "mask": place}, **placement)
            for reference, mask, place in zip(references, masks, places)
        ],
        seed=options.seed,
        sampling=Sampling(**given(options, _SAMPLING)),
        num_images=options.num_images,
        initial_noise=_read_noise(options.initial_noise) if options.initial_noise else None,
    )
    with Progress(options.quiet) as progress:
        if options.server:
            with connect(options) as client:
                results = follow(client.stream(request), progress)
        else:
            from runtime.compositor import Compositor

            compositor = Compositor.load(
                options.bundle or default_bundle(),
                engine_options(options),
                **given(options, ["control_window"]),
            )
            if not options.quiet and (plan := compositor.engine.describe()):
                print(plan, file=sys.stderr)
            results = compositor.run(request, progress.on_step)
    write_output(options.output, results, options.grid)
    return 0


def _check_counts(references: int, places: int, masks: int) -> None:
    if places != references:
        raise InputError(
            f"{references} --reference and {places} --box or --mask are given: "
            "every reference needs one place"
        )
    if masks != references:
        raise InputError(
            f"{references} --reference and {masks} --reference-mask are given: give one for every reference, "
            "or none"
        )


def _check_flags(options: argparse.Namespace) -> None:
    """Refuses flags that would have no effect."""
    for name in given(options, _MACHINE if options.server else SERVER_FLAGS):
        if options.server:
            raise InputError(f"{flag_of(name)} is for this machine and has no effect with --server")
        raise InputError(f"{flag_of(name)} is for a server: name one with --server")


def _read_noise(path: Path) -> NDArray[np.float32]:
    try:
        noise = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"cannot read the initial noise '{path}': a .npy file is expected") from error
    if not isinstance(noise, np.ndarray) or noise.dtype.kind != "f":
        raise InputError(f"the initial noise '{path}' must be one array of floating-point numbers")
    return noise
