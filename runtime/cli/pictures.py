"""Implements what the commands that draw pictures share: flags, and the path from a request to files."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from engines.options import EngineOptions
from runtime.cli.flags import (
    add_bundle_flag,
    add_engine_flags,
    add_segmenter_flag,
    default_bundle,
    engine_options,
    field_names,
    flag_of,
    given,
)
from runtime.cli.output import write_output
from runtime.cli.progress import Progress
from runtime.cli.remote import SERVER_FLAGS, add_server_flags, connect, follow
from runtime.diffusion.presets import QUALITIES
from runtime.diffusion.samplers import SAMPLERS
from runtime.errors import InputError
from runtime.request import Request, Sampling

if TYPE_CHECKING:
    from runtime.compositor import Compositor

SAMPLING = "sampling (defaults: those of --quality, else the model's)"
"""Heading of the flags of sampling."""

_SAMPLING = (
    *("quality", "steps", "guidance_scale", "control_scale", "eta", "sampler"),
    *("guidance_interval", "map_steps"),
)
_MACHINE = ("bundle", "segmenter", *field_names(EngineOptions), "control_window", "initial_noise")
"""Flags that only have an effect without --server."""


def add_picture_flags(parser: argparse.ArgumentParser, sampling: str = SAMPLING) -> None:
    """Adds the flags of sampling, output, machine and server; `sampling` is the heading of the first."""
    _add_sampling_flags(parser.add_argument_group(sampling))
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
        "--num-images",
        type=int,
        default=1,
        metavar="N",
        help="number of pictures, with seeds S, S+1, ... (default: 1)",
    )
    out.add_argument("--grid", action="store_true", help="write one contact sheet instead of numbered files")
    out.add_argument("--quiet", action="store_true", help="do not print progress and the memory plan")
    machine = parser.add_argument_group("machine")
    add_bundle_flag(machine)
    add_segmenter_flag(machine)
    add_engine_flags(machine)
    machine.add_argument(
        "--control-window",
        type=int,
        metavar="N",
        help="steps whose detail maps are computed in one call, up to the bundle's batch (default: the batch "
        "on a card, 1 on a CPU)",
    )
    add_server_flags(parser.add_argument_group("server (instead of this machine)"))


def _add_sampling_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--seed", type=int, metavar="S", help="the same seed gives the same picture (default: random)"
    )
    group.add_argument(
        "--quality",
        choices=list(QUALITIES),
        help="exact: sampling as by the model's authors; balanced, fast: nearly the same picture, at least "
        "twice and four times as fast",
    )
    group.add_argument("--steps", type=int, metavar="N", help="sampling steps")
    group.add_argument(
        "--guidance-scale", type=float, metavar="G", help="scale of classifier-free guidance; 1 turns it off"
    )
    group.add_argument("--control-scale", type=float, metavar="C", help="factor of the detail maps")
    group.add_argument("--eta", type=float, metavar="E", help="noise per step, 0 (DDIM) to 1 (DDPM)")
    group.add_argument(
        "--sampler",
        choices=list(SAMPLERS),
        help="dpm_solver_2m is of second order, needs fewer steps than ddim, and has no eta",
    )
    group.add_argument(
        "--guidance-interval",
        type=parse_interval,
        metavar="FIRST,LAST",
        help="timesteps with guidance, from 0 (picture) to 999 (noise); the others cost half",
    )
    group.add_argument(
        "--map-steps",
        type=int,
        metavar="N",
        help="number of timesteps at which detail maps are computed; neighbouring steps share them",
    )
    group.add_argument(
        "--initial-noise",
        type=Path,
        metavar="FILE.npy",
        help="latents (N, C, h, w) to start from, to reproduce another implementation; not for edits",
    )


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


def common_arguments(options: argparse.Namespace) -> dict[str, Any]:
    """Returns the arguments of a request that the flags say: seed, sampling, number of pictures, noise.

    Raises:
        InputError: the noise cannot be read.
    """
    return {
        "seed": options.seed,
        "sampling": Sampling(**given(options, _SAMPLING)),
        "num_images": options.num_images,
        "initial_noise": _read_noise(options.initial_noise) if options.initial_noise else None,
    }


def make_pictures(request: Request, options: argparse.Namespace) -> None:
    """Has a request done, on this machine or on a server; writes the pictures and prints their names.

    Raises:
        AnyDoorError: the request, the bundle or the server cannot be used.
    """
    with Progress(options.quiet) as progress:
        if options.server:
            with connect(options) as client:
                results = follow(client.stream(request), progress)
        else:
            compositor = load_compositor(options)
            if not options.quiet and (plan := compositor.engine.describe()):
                print(plan, file=sys.stderr)
            results = compositor.run(request, progress.on_step)
    write_output(options.output, results, options.grid)


def load_compositor(options: argparse.Namespace, taken: int = 0) -> Compositor:
    """Opens the bundle and the segmenters that the flags name.

    Args:
        options: parsed flags.
        taken: bytes of the memory budget that are another model's.

    Raises:
        AnyDoorError: one of them cannot be used.
    """
    from runtime.compositor import Compositor
    from runtime.segmentation import Segmenter, beside

    engine = beside(engine_options(options), taken)
    segmenter = Segmenter.load(*(options.segmenter or ()), options=engine)
    return Compositor.load(
        options.bundle or default_bundle(),
        segmenter.beside(engine),
        segmenter=segmenter,
        **given(options, ["control_window"]),
    )


def check_flags(options: argparse.Namespace, of_machine: Sequence[str] = _MACHINE) -> None:
    """Refuses flags that would have no effect.

    Args:
        options: parsed flags.
        of_machine: those that have an effect without --server only.

    Raises:
        InputError: names the flag.
    """
    for name in given(options, of_machine if options.server else SERVER_FLAGS):
        if options.server:
            raise InputError(f"{flag_of(name)} has no effect with --server")
        raise InputError(f"{flag_of(name)} needs --server")


def _read_noise(path: Path) -> NDArray[np.float32]:
    try:
        noise = np.load(path, allow_pickle=False)
    except Exception as error:
        # on a damaged header NumPy raises almost any class there is
        raise InputError(f"cannot read the initial noise '{path}': a .npy file is expected") from error
    if not isinstance(noise, np.ndarray) or noise.dtype.kind != "f":
        raise InputError(f"the initial noise '{path}' must be one array of floating-point numbers")
    return noise
