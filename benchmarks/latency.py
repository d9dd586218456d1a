"""How long does a picture take, here and with plain PyTorch? Measures both side by side.

    python benchmarks/latency.py --size small
    python benchmarks/latency.py --size small --system stable_diffusion

Every contender (this runtime on each installed backend, and the same checkpoint as a PyTorch pipeline) runs
in processes of its own, in turn: A B C, A B C. So every start is a cold one, every contender's memory is its
own, and other work on the machine affects all of them alike. From the same noise they draw the same picture,
which is checked.

Where fewer than 50 steps are taken, times at 50 steps are extrapolated: the measured time, and the mean time
of a measured step for every missing one.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec

if any(find_spec(package) is None for package in ("benchmarks", "numpy", "PIL", "tqdm")):
    print(
        "latency.py: the project is not installed: run 'make dev', "
        "then '.venv/bin/python benchmarks/latency.py'",
        file=sys.stderr,
    )
    sys.exit(2)

import argparse
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks.support.cached_models import find_or_build, seeded_bundle, seeded_checkpoint
from benchmarks.support.contender_rounds import Rounds, require_contender
from benchmarks.support.contenders import ANYDOOR, PYTORCH, Contender, Run, Workload
from benchmarks.support.graph_costs import count_bundle
from benchmarks.support.graphs import DENOISE
from benchmarks.support.latency_report import REPORTED_STEPS, as_results, format_report, plot
from benchmarks.support.machine import cores, describe
from benchmarks.support.measurement import LEAST_PSNR, Report
from benchmarks.support.precisions import TORCH_DTYPES
from benchmarks.support.results import require_writable, write_results
from engines.bundle import Bundle, no_checkpoint
from engines.engine import choose_backend
from engines.errors import AnyDoorError, BackendError
from engines.options import BACKENDS, INFERENCE_PRECISIONS, EngineOptions

BUILD = Path("build/latency")

_LARGEST_BATCH = 4

SEEDED = {
    "anydoor": {"small": "small", "full": "full"},
    "stable_diffusion": {"small": "stable-diffusion-small", "full": "stable-diffusion-2-inpainting"},
}
"""System -> size -> its name in `benchmarks.seeded`."""

WORKLOADS = {
    # large enough for attention and convolutions to dominate, small enough for two rounds in minutes
    "small": Workload(
        steps=5, extra_steps=5, cold_steps=5, rounds=2, pictures=2, extras_in=1, resolution=256
    ),
    # on a CPU a picture takes minutes, and so does building the network
    "full": Workload(
        steps=4, extra_steps=1, cold_steps=1, rounds=1, pictures=1, batch=False, extras_in=1, resolution=512
    ),
}


def runtime_contenders(bundles: Sequence[Bundle], precisions: Sequence[str]) -> list[Contender]:
    """Return this runtime on every installed backend that runs a bundle, on a card if there is one.

    Raises:
        BackendError: no installed backend does.
    """
    found: list[Contender] = []
    refusals = []
    for device in ("cuda", "cpu"):
        for bundle, backend, inference in itertools.product(bundles, BACKENDS[1:], precisions):
            precision = bundle.manifest.precision if inference == "fp32" else inference
            contender = Contender(ANYDOOR, device, precision, backend, str(bundle.path))
            try:
                choose_backend(bundle, EngineOptions(backend, device, inference))
                require_contender(contender)
                found.append(contender)
            except AnyDoorError as error:
                refusals.append(str(error))
        if found:
            return found
    paths = ", ".join(f"'{bundle.path}'" for bundle in bundles)
    raise BackendError(f"no installed backend runs {paths}: " + "; ".join(dict.fromkeys(refusals)))


def pytorch_contenders(device: str, precision: str, compiled: bool) -> list[Contender]:
    """Return the PyTorch pipeline, eager and perhaps compiled."""
    eager = Contender(PYTORCH, device, precision)
    return [eager, replace(eager, compiled=True)] if compiled else [eager]


def find_model(options: argparse.Namespace) -> tuple[Path | None, list[Path]]:
    """Return the checkpoint, if there is one, and the bundles.

    Raises:
        AnyDoorError: neither is given, or one cannot be used.
    """
    if options.size:
        checkpoint = seeded_checkpoint(SEEDED[options.system][options.size])
        return checkpoint, options.bundle or [seeded_bundle(checkpoint, WORKLOADS[options.size].resolution)]
    if options.checkpoint and not options.checkpoint.exists():
        raise AnyDoorError(no_checkpoint(options.checkpoint))
    if options.bundle:
        return options.checkpoint, options.bundle
    if options.checkpoint and options.checkpoint.is_dir():
        raise AnyDoorError(
            f"'{options.checkpoint}' is a folder: give what was built from it, too, with --bundle"
        )
    if options.checkpoint:
        return options.checkpoint, [find_or_build(options.checkpoint)]
    raise AnyDoorError(
        "say what to measure: --size small, or --bundle DIR, with --checkpoint FILE for PyTorch"
    )


def workload_of(options: argparse.Namespace) -> Workload:
    """Return how much is measured: the default of the size, changed by flags.

    Raises:
        AnyDoorError: a number is out of range.
    """
    workload = WORKLOADS.get(options.size, Workload())
    if not np.isfinite(options.guidance_scale):
        raise AnyDoorError(f"--guidance-scale must be a number, not {options.guidance_scale}")
    for name in ("steps", "rounds", "pictures", "threads"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise AnyDoorError(f"--{name} must be at least 1, not {value}")
    if options.steps:
        extra = min(options.steps, workload.extra_steps) if options.size == "full" else options.steps
        cold = min(options.steps, workload.cold_steps) if options.size == "full" else options.steps
        workload = replace(workload, steps=options.steps, extra_steps=extra, cold_steps=cold)
    if options.rounds:
        workload = replace(workload, rounds=options.rounds)
    return replace(workload, pictures=options.pictures) if options.pictures else workload


def measure(options: argparse.Namespace) -> Iterator[Report]:
    """Measure what the command line asks for.

    Yields:
        What is known after every turn of a contender; the last one is complete.

    Raises:
        AnyDoorError: it cannot be measured.
    """
    workload = workload_of(options)
    checkpoint, paths = find_model(options)
    bundles = [Bundle.open(path) for path in paths]
    contenders = runtime_contenders(bundles, options.precisions)
    device = contenders[0].device
    if checkpoint and not options.no_pytorch:
        precision = options.pytorch_precision or ("fp32" if device == "cpu" else "fp16")
        contenders += pytorch_contenders(device, precision, options.compiled)
    run = Run(
        workload=replace(workload, resolution=bundles[0].manifest.resolution),
        contender=contenders[0],
        checkpoint=checkpoint,
        threads=options.threads,
        samples=min(_LARGEST_BATCH, *(bundle.manifest.max_batch for bundle in bundles)),
        scenarios=(),
        guidance_scale=options.guidance_scale,
        system=bundles[0].manifest.system,
    )
    machine = describe()
    # the operations of plans cannot be counted
    counted = next((b for b in bundles if b.graph_file(DENOISE).suffix == ".onnx"), None)
    costs = count_bundle(counted) if counted else {}
    rounds = Rounds(run, contenders, options.quiet)
    for _ in rounds.run():
        yield Report(
            name=SEEDED[options.system][options.size] if options.size else paths[0].name,
            workload=run.workload,
            threads=options.threads,
            measurements=rounds.measurements,
            costs=costs,
            peaks=rounds.peaks,
            precision=counted.manifest.precision if counted else "",
            power_source=rounds.power_source,
            machine=machine,
        )


def failures(report: Report) -> list[str]:
    """Return a sentence for every contender that failed or drew another picture than PyTorch."""
    sentences = [f"{m.contender.name}: {m.failure}" for m in report.measurements if m.failure]
    for measurement in report.compared:
        least, found = LEAST_PSNR[measurement.contender.precision], measurement.psnr
        if found is not None and not found >= least:  # NaN is a failure, too
            name = measurement.contender.name
            sentences.append(f"{name}: not the picture of PyTorch: {found:.1f} dB, {least:g} are expected")
    return sentences


def _default(name: str) -> str:
    of_sizes = ", ".join(f"{getattr(plan, name)} with --size {size}" for size, plan in WORKLOADS.items())
    return f" (default: {of_sizes}, else {getattr(Workload(), name)})"


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    result = argparse.ArgumentParser(
        prog="latency.py",
        description="Measure time, memory and energy of pictures: this runtime on every installed backend, "
        "and the same checkpoint in plain PyTorch.",
        epilog="examples:\n"
        "  python benchmarks/latency.py --size small\n"
        "  python benchmarks/latency.py --size full --steps 4\n"
        "  python benchmarks/latency.py --size small --system stable_diffusion\n"
        "  python benchmarks/latency.py --bundle examples/anydoor-small "
        "--checkpoint examples/anydoor-small.safetensors\n"
        "  python benchmarks/latency.py --bundle build/engines/anydoor --steps 20 --rounds 5\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.add_argument(
        "--size",
        choices=tuple(WORKLOADS),
        help="make a network of this size with seeded weights, and measure it",
    )
    result.add_argument(
        "--system",
        choices=tuple(SEEDED),
        default="anydoor",
        help="of the network that --size makes (default: anydoor)",
    )
    result.add_argument(
        "--bundle",
        type=Path,
        nargs="+",
        default=[],
        metavar="DIR",
        help="what the runtime runs; several of one network for different backends are compared",
    )
    result.add_argument(
        "--checkpoint",
        type=Path,
        metavar="CKPT",
        help="what it was built from, for PyTorch: a file, or of Stable Diffusion a folder of diffusers",
    )
    result.add_argument(
        "--steps", type=int, metavar="N", help=f"steps per picture that are really taken{_default('steps')}"
    )
    result.add_argument(
        "--rounds", type=int, metavar="N", help=f"turns of every contender{_default('rounds')}"
    )
    result.add_argument(
        "--pictures", type=int, metavar="N", help=f"warm pictures per turn{_default('pictures')}"
    )
    result.add_argument("--guidance-scale", type=float, default=5.0, metavar="G", help="default: 5")
    result.add_argument("--threads", type=int, default=cores(), metavar="N", help="default: all cores")
    result.add_argument(
        "--precisions",
        nargs="+",
        choices=INFERENCE_PRECISIONS,
        default=["fp32"],
        help="inference precisions of the runtime, where a backend has them (default: fp32)",
    )
    result.add_argument(
        "--pytorch-precision",
        choices=tuple(TORCH_DTYPES),
        help="default: fp32 on a CPU, fp16 on a card",
    )
    result.add_argument(
        "--compiled",
        action="store_true",
        help="also PyTorch with torch.compile; needs a C compiler and minutes",
    )
    result.add_argument("--no-pytorch", action="store_true", help="this runtime alone")
    result.add_argument(
        "--results",
        type=Path,
        metavar="FILE.json",
        help="default: build/latency/NAME.json; the plot is beside it",
    )
    result.add_argument("--note", default="", metavar="TEXT", help="kept in the results file")
    result.add_argument("--quiet", action="store_true", help="no progress bar")
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables; returns 0, 1 if a contender failed or drew another picture, 2, or 130 if stopped."""
    options = parser().parse_args(arguments)
    path = options.results
    try:
        if path:
            require_writable(path)
        for report in measure(options):
            path = options.results or BUILD / f"{report.name}.json"
            write_results(path, as_results(report, options.note))
    except AnyDoorError as error:
        print(f"latency.py: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        print(f"latency.py: the package '{error.name}' is missing: run 'make dev'", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("latency.py: stopped; the turns that were done are in the results", file=sys.stderr)
        return 130
    print(format_report(report))
    if any(measurement.staged for measurement in report.measurements):
        plot(report, REPORTED_STEPS[0], path.with_suffix(".png"))
    print(f"\n{path} and {path.with_suffix('.png')}")
    sentences = failures(report)
    for sentence in sentences:
        print(sentence)
    return 1 if sentences else 0


if __name__ == "__main__":
    sys.exit(main())
