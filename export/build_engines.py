"""Checkpoint or bundle of ONNX graphs -> bundle for one backend.

python export/build_engines.py anydoor.safetensors
python export/build_engines.py anydoor.ckpt --precision fp16 --max-batch 8 --output engines/anydoor
python export/build_engines.py anydoor.safetensors --backend tensorrt_rtx --targets sm89,sm120
python export/build_engines.py path/to/onnx-bundle --backend tensorrt

The last form needs no PyTorch: export on a workstation, build the plans on the machine that runs them.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from engines.backends.tensorrt.library import FLAVOURS, load_library
from engines.bundle import MANIFEST, Bundle, Manifest
from engines.cuda import Device
from engines.errors import AnyDoorError
from engines.spec import GRAPHS
from export.plans import build_plans, check_targets
from export.progress import Progress

if TYPE_CHECKING:
    # PyTorch; a machine that builds plans from ONNX graphs need not have it
    from training.network.checkpoint import Checkpoint

ONNX = "onnxruntime"
BACKENDS = ("auto", ONNX, *FLAVOURS)
PRECISIONS = ("fp32", "fp16")


@dataclass(frozen=True)
class BuildOptions:
    """How to build a bundle."""

    backend: str = ONNX
    precision: str = "fp32"
    max_batch: int = 4
    """Most samples in one call."""
    resolution: int = 512
    """Side of the generated picture, in pixels."""
    targets: tuple[str, ...] = ()
    """GPU architectures of plans, like sm89; what suits the library if empty."""


def build_bundle(
    checkpoint: Checkpoint, output: Path, options: BuildOptions, progress: Progress | None = None
) -> Manifest:
    """Builds a bundle beside its place and puts it there when it is complete and verified.

    Args:
        checkpoint: an opened checkpoint.
        output: directory of the bundle; what is there is replaced.
        options: how to build.
        progress: told of every step; a bar on the terminal if None.

    Raises:
        AnyDoorError: an option or the checkpoint is unusable, or a graph does not compute what PyTorch does.
    """
    from export import onnx_bundle

    _check(output, options)
    onnx_bundle.check_resolution(checkpoint, options.resolution)

    def build(folder: Path, progress: Progress) -> Manifest:
        if options.backend == ONNX:
            progress.steps = onnx_bundle.STEPS
            return onnx_bundle.export_graphs(checkpoint, folder, options, progress)
        progress.steps = onnx_bundle.STEPS + len(GRAPHS)
        graphs = folder / "onnx"
        graphs.mkdir()
        manifest = onnx_bundle.export_graphs(checkpoint, graphs, options, progress)
        manifest = _build_plans(Bundle(graphs, manifest), folder, output, options, progress)
        shutil.rmtree(graphs)
        return manifest

    return _build_beside(output, build, progress)


def build_plan_bundle(
    source: Bundle, output: Path, options: BuildOptions, progress: Progress | None = None
) -> Manifest:
    """Builds a bundle of TensorRT plans from a bundle of ONNX graphs, like `build_bundle`.

    Args:
        source: an opened bundle; precision and resolution are its own.
        output: directory of the new bundle; what is there is replaced.
        options: backend, batch and targets.
        progress: told of every step; a bar on the terminal if None.

    Raises:
        AnyDoorError: an option or the source is unusable.
    """
    _check(output, options)
    if options.backend not in FLAVOURS:
        raise AnyDoorError(
            f"'{source.path}' is a bundle already: give a checkpoint, or a --backend to build plans for "
            f"({' or '.join(FLAVOURS)})"
        )
    if any(record.backend != ONNX for record in source.manifest.graphs.values()):
        raise AnyDoorError(f"'{source.path}' holds plans: plans are built from a bundle of ONNX graphs")
    if output.resolve() == source.path.resolve():
        raise AnyDoorError(f"'{output}' is the bundle to build from: give another --output")

    def build(folder: Path, progress: Progress) -> Manifest:
        progress.steps = len(GRAPHS)
        return _build_plans(source, folder, output, options, progress)

    return _build_beside(output, build, progress)


def _build_plans(
    source: Bundle, folder: Path, output: Path, options: BuildOptions, progress: Progress
) -> Manifest:
    return build_plans(
        source,
        folder,
        load_library(options.backend),
        progress,
        options.max_batch,
        options.targets,
        timing_cache=output.with_name(f"{output.name}.timings"),
    )


def _build_beside(
    output: Path, build: Callable[[Path, Progress], Manifest], progress: Progress | None
) -> Manifest:
    partial = output.with_name(f".{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        with progress or Progress() as shown:
            manifest = build(partial, shown)
        (partial / MANIFEST).write_text(manifest.to_json(), "utf-8")
        _put_in_place(partial, output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return manifest


def _check(output: Path, options: BuildOptions) -> None:
    for what, chosen, known in (
        ("backend", options.backend, BACKENDS[1:]),
        ("precision", options.precision, PRECISIONS),
    ):
        if chosen not in known:
            raise AnyDoorError(f"there is no {what} '{chosen}': choose one of {', '.join(known)}")
    if options.max_batch < 1:
        raise AnyDoorError(f"--max-batch must be at least 1, not {options.max_batch}")
    if output.exists() and not (output / MANIFEST).is_file() and any(output.iterdir()):
        raise AnyDoorError(f"'{output}' is a directory with other things in it: give another --output")
    if options.backend in FLAVOURS:
        # before an export of minutes
        check_targets(load_library(options.backend), options.targets)
    elif options.targets:
        raise AnyDoorError("--targets names architectures of plans: it goes with --backend tensorrt_rtx")


def _put_in_place(partial: Path, output: Path) -> None:
    """Replaces a directory by another; at no time is a half-written bundle in its place."""
    old = output.with_name(f".{output.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if output.exists():
        output.rename(old)
    partial.rename(output)
    shutil.rmtree(old, ignore_errors=True)


def best_backend() -> str:
    """What runs fastest on this machine: TensorRT where there is a card and the library, or ONNX Runtime."""
    with suppress(AnyDoorError):
        architecture = Device().card().architecture
        for backend, flavour in FLAVOURS.items():
            if find_spec(backend) and (not flavour.targets or architecture in flavour.targets):
                return backend
    return ONNX


def summary(manifest: Manifest) -> str:
    """A table of the graphs of a bundle."""
    lines = [f"{'graph':<12} {'MB':>8} {'scratch MB':>11} {'build s':>8} {'error against PyTorch':>22}"]
    for name, graph in manifest.graphs.items():
        megabytes = sum(record.bytes for record in graph.files) / 1e6
        scratch = f"{graph.scratch_bytes / 1e6:.1f}" if graph.scratch_bytes else "-"
        error = max(graph.error.values())
        lines.append(f"{name:<12} {megabytes:>8.1f} {scratch:>11} {graph.build_seconds:>8.1f} {error:>22.1e}")
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        prog="build_engines.py",
        description="Turn a trained AnyDoor checkpoint into a bundle that the runtime executes.",
        epilog="examples:\n"
        "  python export/build_engines.py anydoor.safetensors\n"
        "  python export/build_engines.py anydoor.ckpt --precision fp16 --output build/engines/half\n"
        "  python export/build_engines.py anydoor.safetensors --backend tensorrt_rtx --targets sm89,sm120\n"
        "  python export/build_engines.py build/engines/half --backend tensorrt --output build/engines/orin\n"
        "  python export/build_engines.py small.safetensors --unet-head-width 8 --dino-heads 6\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.add_argument(
        "source",
        type=Path,
        metavar="CKPT",
        help=".safetensors, .ckpt or .pth file; or a bundle of ONNX graphs, to build plans without PyTorch",
    )
    result.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="the bundle (default: build/engines/NAME of the checkpoint)",
    )
    result.add_argument(
        "--backend",
        choices=BACKENDS,
        default="auto",
        help="what will execute it (default: best of this machine)",
    )
    result.add_argument(
        "--targets",
        type=lambda text: tuple(text.lower().split(",")),
        default=(),
        metavar="SM,SM",
        help="cards that tensorrt_rtx builds for: sm75 sm80 sm86 sm89 sm120 sm121 (default: sm86,sm89,sm120)",
    )
    result.add_argument(
        "--precision", choices=PRECISIONS, help="default: fp16 for TensorRT, fp32 for ONNX Runtime"
    )
    result.add_argument("--max-batch", type=int, metavar="N", help="most samples in one call (default: 4)")
    result.add_argument(
        "--resolution", type=int, default=512, metavar="PX", help="side of the picture (default: 512)"
    )
    result.add_argument(
        "--unet-head-width",
        type=int,
        metavar="N",
        help="channels per attention head, if not stored (default: 64)",
    )
    result.add_argument(
        "--dino-heads",
        type=int,
        metavar="N",
        help="heads of the ID encoder, if not stored (default: width / 64)",
    )
    result.add_argument("--quiet", action="store_true", help="no progress bar")
    return result


def build(options: argparse.Namespace) -> tuple[Path, Manifest]:
    """What the command line asks for: where the bundle is, and its manifest.

    Raises:
        AnyDoorError: it cannot be built; says why.
    """
    backend = best_backend() if options.backend == "auto" else options.backend
    build = BuildOptions(
        backend=backend,
        precision=options.precision or ("fp16" if backend in FLAVOURS else "fp32"),
        resolution=options.resolution,
        targets=options.targets,
    )
    progress = Progress(quiet=options.quiet)
    if options.source.is_dir():
        bundle = Bundle.open(options.source)
        output = options.output or options.source.with_name(f"{options.source.name}-{backend}")
        build = replace(build, max_batch=options.max_batch or bundle.manifest.max_batch)
        return output, build_plan_bundle(bundle, output, build, progress)
    try:
        from training.network.checkpoint import read_checkpoint
    except ImportError as error:
        raise AnyDoorError(
            f"a checkpoint needs PyTorch to be exported, and '{error.name}' is not installed: pip install "
            "'anydoor-runtime[export]', or give a bundle of ONNX graphs"
        ) from error
    checkpoint = read_checkpoint(options.source, options.unet_head_width, options.dino_heads)
    output = options.output or Path("build/engines") / options.source.stem
    if options.max_batch is not None:
        build = replace(build, max_batch=options.max_batch)
    return output, build_bundle(checkpoint, output, build, progress)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    try:
        output, manifest = build(parser().parse_args(arguments))
    except AnyDoorError as error:
        print(f"build_engines.py: {error}", file=sys.stderr)
        return 2
    print(summary(manifest))
    print(f"bundle: {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
