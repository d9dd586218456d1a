"""The command line: `anydoor composite`, `anydoor serve`, `anydoor doctor`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from engines.engine import BACKENDS, DEVICES, INFERENCE_PRECISIONS
from engines.errors import AnyDoorError, BackendError
from runtime.diffusion.presets import DEFAULT, QUALITIES, preset
from runtime.diffusion.samplers import SAMPLERS
from runtime.errors import InputError
from runtime.imaging.collage import MODES, Ratios
from runtime.imaging.pictures import contact_sheet, format_of, save_picture
from runtime.request import Placement, Request, Sampling
from runtime.sizes import size_flag

if TYPE_CHECKING:
    from runtime.compositor import StepCallback
    from runtime.job import Composite

DEFAULT_BUNDLE = "build/engines/anydoor"
BUNDLE_VARIABLE = "ANYDOOR_BUNDLE"

_DESCRIPTION = "Put an object from one picture into another."
_COMPOSITE_EXAMPLES = """examples:
  anydoor composite --reference cup.png --scene desk.jpg --box 80,60,300,260 -o out.png
  anydoor composite --reference cup.jpg --reference-mask cup_mask.png --scene desk.jpg \\
      --mask place.png --mode shape --seed 7 -o out.png
  anydoor composite --reference cup.png --box 80,60,300,260 --reference book.png --box 320,90,500,250 \\
      --scene desk.jpg -o both.png
  anydoor composite --reference cup.png --scene desk.jpg --box 80,60,300,260 --num-images 4 --grid -o cups.png
  anydoor composite --reference cup.png --scene desk.jpg --box 80,60,300,260 --quality fast -o out.png
  anydoor composite --reference cup.png --scene desk.jpg --box 80,60,300,260 --server gpu:50051 -o out.png
"""


class _AddTarget(argparse.Action):
    """Collects --box and --mask in one list, so that the n-th belongs to the n-th --reference."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        targets = getattr(namespace, self.dest) or []
        kind = "box" if option_string == "--box" else "mask"
        setattr(namespace, self.dest, [*targets, (kind, values)])


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


def parser() -> argparse.ArgumentParser:
    """All commands."""
    result = argparse.ArgumentParser(prog="anydoor", description=_DESCRIPTION)
    commands = result.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_composite(commands)
    _add_serve(commands)
    doctor = commands.add_parser(
        "doctor",
        help="what is installed, which backends work, which bundle fits this machine",
        description="Say what is installed, which backends work, and which bundles fit this machine.",
    )
    doctor.add_argument(
        "bundles",
        nargs="*",
        type=Path,
        metavar="BUNDLE",
        help="bundles to check (default: all of build/engines)",
    )
    doctor.add_argument(
        "--memory-budget",
        type=size_flag,
        metavar="SIZE",
        help="say what of a bundle would live where in so much memory, like 6G",
    )
    return result


def _add_composite(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "composite",
        help="put objects into a scene",
        description="Put one or more objects into a scene.",
        epilog=_COMPOSITE_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = command.add_argument_group(
        "what goes where (repeat for several objects, placed one after the other)"
    )
    what.add_argument(
        "--reference", action="append", type=Path, required=True, metavar="FILE", help="picture of the object"
    )
    what.add_argument(
        "--reference-mask",
        action="append",
        type=Path,
        metavar="FILE",
        help="where the object is in it (default: its transparency)",
    )
    what.add_argument("--scene", type=Path, required=True, metavar="FILE", help="picture to put it into")
    what.add_argument(
        "--box",
        dest="targets",
        action=_AddTarget,
        type=parse_box,
        metavar="X0,Y0,X1,Y1",
        help="place in pixels of the scene, x1 and y1 exclusive",
    )
    what.add_argument(
        "--mask", dest="targets", action=_AddTarget, type=Path, metavar="FILE", help="place as a mask"
    )
    what.add_argument(
        "--mode",
        choices=list(MODES),
        default="crop",
        help="crop: surroundings are generated anew (default); shape: the object fills the mask; "
        "keep_background: nothing outside the box changes",
    )
    ratios = Ratios()
    what.add_argument(
        "--reference-ratio", type=float, default=ratios.reference, metavar="R", help="white margin"
    )
    what.add_argument(
        "--box-ratio", type=float, default=ratios.box, metavar="R", help="box around the target"
    )
    what.add_argument("--crop-ratio", type=float, default=ratios.crop, metavar="R", help="zoom-in crop")
    _add_sampling(command)
    out = command.add_argument_group("output")
    out.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help=".png, .jpg or .webp")
    out.add_argument(
        "--num-images", type=int, default=1, metavar="N", help="pictures with seeds S, S+1, ... (default: 1)"
    )
    out.add_argument("--grid", action="store_true", help="write one contact sheet instead of numbered files")
    out.add_argument("--quiet", action="store_true", help="no progress bar")
    how = command.add_argument_group("machine")
    how.add_argument(
        "--bundle",
        type=Path,
        default=Path(os.environ.get(BUNDLE_VARIABLE, DEFAULT_BUNDLE)),
        metavar="DIR",
        help=f"default: ${BUNDLE_VARIABLE}, else {DEFAULT_BUNDLE}",
    )
    how.add_argument("--device", choices=DEVICES, default="auto", help="default: the best there is")
    how.add_argument(
        "--backend",
        choices=BACKENDS,
        default="auto",
        help="what executes the graphs (default: the fastest that is installed)",
    )
    how.add_argument(
        "--inference-precision",
        choices=INFERENCE_PRECISIONS,
        default="fp32",
        help="of graphs that are in float32; bf16 where the processor has it (default: fp32)",
    )
    how.add_argument(
        "--cuda-graphs",
        action="store_true",
        help="with ONNX Runtime on a card, capture the denoise graph and replay it",
    )
    how.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: all cores)")
    how.add_argument(
        "--memory-budget",
        type=size_flag,
        metavar="SIZE",
        help="of the device's memory, like 6G (default: nearly all that is free)",
    )
    how.add_argument(
        "--control-window",
        type=int,
        default=1,
        metavar="N",
        help="steps whose detail maps are computed in one call, up to the bundle's batch; more pays on a GPU "
        "(default: 1)",
    )
    _add_server(command)


def _add_server(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("server (instead of this machine)")
    group.add_argument("--server", metavar="ADDRESS", help="host:port or unix:/path of 'anydoor serve'")
    group.add_argument("--timeout", type=float, metavar="SECONDS", help="give up after this time")
    group.add_argument("--token-file", type=Path, metavar="FILE", help="bearer token to send")
    group.add_argument("--tls", action="store_true", help="connect with TLS; implied by the files below")
    group.add_argument("--tls-ca", type=Path, metavar="FILE", help="certificates to trust (PEM)")
    group.add_argument("--tls-certificate", type=Path, metavar="FILE", help="certificate to show (PEM)")
    group.add_argument("--tls-key", type=Path, metavar="FILE", help="its private key (PEM)")


def _add_serve(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    from runtime.server.settings import add_flags

    command = commands.add_parser(
        "serve",
        help="serve composites over gRPC",
        description="Serve composites over gRPC; proto/anydoor/v1/compositor.proto is the contract.",
    )
    add_flags(command)


def _add_sampling(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("sampling (what is not given is as the quality says)")
    group.add_argument(
        "--seed", type=int, metavar="S", help="the same seed gives the same picture (default: random)"
    )
    group.add_argument(
        "--quality",
        choices=list(QUALITIES),
        default=DEFAULT,
        help="exact: as the original (default); balanced, fast: nearly the same picture, at least twice and "
        "four times as fast",
    )
    exact = QUALITIES[DEFAULT]
    group.add_argument("--steps", type=int, metavar="N", help=f"exact: {exact.steps}")
    group.add_argument("--guidance-scale", type=float, metavar="G", help=f"exact: {exact.guidance_scale:g}")
    group.add_argument(
        "--control-scale",
        type=float,
        metavar="C",
        help=f"of the detail maps (exact: {exact.control_scale:g})",
    )
    group.add_argument("--eta", type=float, metavar="E", help="0 DDIM to 1 DDPM noise (exact: 0)")
    group.add_argument(
        "--sampler",
        choices=SAMPLERS,
        help="ddim, or dpm_solver_2m, of second order, which needs fewer steps and has no eta (exact: ddim)",
    )
    group.add_argument(
        "--guidance-interval",
        type=parse_interval,
        metavar="FIRST,LAST",
        help="timesteps with guidance, of 0 (picture) to 999 (noise); the others cost half (exact: 0,999)",
    )
    group.add_argument(
        "--map-steps",
        type=int,
        metavar="N",
        help="compute detail maps at so many timesteps, shared by neighbouring steps (exact: at all)",
    )
    group.add_argument(
        "--initial-noise",
        type=Path,
        metavar="FILE.npy",
        help="latents (N, C, h, w) to start from, to reproduce another implementation",
    )


def run_composite(options: argparse.Namespace) -> int:
    """The command `composite`."""
    format_of(options.output)
    request = Request(
        scene=options.scene,
        placements=_placements(options),
        seed=options.seed,
        sampling=_sampling(options),
        num_images=options.num_images,
        initial_noise=_load_noise(options.initial_noise) if options.initial_noise else None,
    )
    with _progress(options.quiet) as (on_step, describe):
        if options.server:
            results = _composite_on_server(options, request, on_step, describe)
        else:
            results = _composite_here(options, request, None if options.quiet else on_step)
    images = [result.image for result in results]
    if options.grid:
        save_picture(contact_sheet(images), options.output)
        print(f"{options.output} (seeds {results[0].seed} to {results[-1].seed})")
        return 0
    for path, result in zip(_output_paths(options.output, len(images)), results):
        save_picture(result.image, path)
        print(f"{path} (seed {result.seed})")
    return 0


@contextmanager
def _progress(quiet: bool) -> Iterator[tuple[StepCallback, Callable[[str], object]]]:
    """What to tell of steps, and of what goes on. A bar that is not shown is not imported either."""
    if quiet:
        yield lambda done, total: None, lambda text: None
        return
    from tqdm import tqdm

    with tqdm(unit="step", desc="loading", dynamic_ncols=True) as bar:

        def on_step(done: int, total: int) -> None:
            bar.total = total
            bar.set_description("sampling" if done < total else "finishing", refresh=False)
            bar.update(done - bar.n)

        yield on_step, bar.set_description


def _composite_here(
    options: argparse.Namespace, request: Request, on_step: StepCallback | None
) -> list[Composite]:
    from runtime.compositor import Compositor

    compositor = Compositor.load(
        options.bundle,
        options.device,
        options.threads,
        control_window=options.control_window,
        memory_budget=options.memory_budget,
        backend=options.backend,
        inference_precision=options.inference_precision,
        cuda_graphs=options.cuda_graphs,
    )
    if not options.quiet and (plan := compositor.engine.describe()):
        print(plan, file=sys.stderr)
    return compositor.run(**vars(request), on_step=on_step)


def _composite_on_server(
    options: argparse.Namespace,
    request: Request,
    on_step: StepCallback,
    describe: Callable[[str], object],
) -> list[Composite]:
    try:
        from runtime.client import Client, ServerError, Tls
    except ImportError as error:
        raise _missing("client", error) from error
    from runtime.server.ticket import Queued, StepDone

    tls_files = (options.tls_ca, options.tls_certificate, options.tls_key)
    tls = Tls(*tls_files) if options.tls or any(tls_files) else None
    token = _read_token(options.token_file) if options.token_file else None
    with Client(options.server, token=token, tls=tls, timeout=options.timeout) as client:
        for news in client.stream(request):
            if isinstance(news, Queued):
                describe(f"{news.position} before us" if news.position else "next")
            elif isinstance(news, StepDone):
                on_step(news.done, news.total)
            elif isinstance(news, list):
                return news
    raise ServerError(f"the server at {options.server} ended without a picture", "OK")


def _read_token(path: Path) -> str:
    try:
        return path.read_text("ascii").strip()
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read a token from '{path}'") from error


def _missing(extra: str, error: ImportError) -> AnyDoorError:
    return BackendError(
        f"the package '{error.name}' is missing; install it with: pip install 'anydoor-runtime[{extra}]'"
    )


def run_serve(options: argparse.Namespace) -> int:
    """The command `serve`."""
    from runtime.server.settings import settings_from

    settings = settings_from(options, os.environ.get(BUNDLE_VARIABLE, DEFAULT_BUNDLE))
    try:
        from runtime.server.serve import serve
    except ImportError as error:
        raise _missing("serve", error) from error
    return serve(settings)


def _placements(options: argparse.Namespace) -> list[Placement]:
    targets = options.targets or []
    references = options.reference
    masks = options.reference_mask or [None] * len(references)
    if len(targets) != len(references):
        raise InputError(
            f"{len(references)} --reference and {len(targets)} --box or --mask are given: "
            "every reference needs one place"
        )
    if len(masks) != len(references):
        raise InputError(
            f"{len(references)} --reference and {len(masks)} --reference-mask are given: "
            "give one for every reference, or none"
        )
    ratios = Ratios(options.reference_ratio, options.box_ratio, options.crop_ratio)
    return [
        Placement(reference, mask, **{kind: value}, mode=options.mode, ratios=ratios)
        for reference, mask, (kind, value) in zip(references, masks, targets)
    ]


def _sampling(options: argparse.Namespace) -> Sampling:
    names = ("steps", "guidance_scale", "control_scale", "eta", "sampler", "guidance_interval", "map_steps")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    return preset(options.quality, **given)


def _load_noise(path: Path) -> NDArray[np.float32]:
    try:
        noise = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"cannot read the initial noise '{path}': a .npy file is expected") from error
    if not isinstance(noise, np.ndarray) or noise.dtype.kind != "f":
        raise InputError(f"the initial noise '{path}' must be one array of floating-point numbers")
    return noise


def _output_paths(path: Path, count: int) -> list[Path]:
    if count == 1:
        return [path]
    return [path.with_name(f"{path.stem}-{i + 1}{path.suffix}") for i in range(count)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit code: 0, or 2 for anything that the user can mend."""
    options = parser().parse_args(arguments)
    try:
        if options.command == "doctor":
            from runtime.cli.doctor import run_doctor

            return run_doctor(options.bundles, options.memory_budget)
        if options.command == "serve":
            return run_serve(options)
        return run_composite(options)
    except AnyDoorError as error:
        print(f"anydoor: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("anydoor: interrupted; nothing was written", file=sys.stderr)
        return 130
