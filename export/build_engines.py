"""The command `build_engines.py`, which is also `anydoor build`: checkpoint or ONNX graphs -> bundle for one
backend.

python export/build_engines.py anydoor.safetensors
python export/build_engines.py anydoor.ckpt --precision fp16 --max-batch 8 --output engines/anydoor
python export/build_engines.py anydoor.safetensors --backend tensorrt_rtx --targets sm89,sm120
python export/build_engines.py path/to/onnx-bundle --backend tensorrt

The last form needs no PyTorch: export on a workstation, build the plans on the machine that runs them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from engines.bundle import Bundle
from engines.errors import AnyDoorError
from engines.manifest import Manifest
from export.build import best_backend, build_bundle, build_plan_bundle
from export.options import BACKENDS, ONNX, PRECISIONS, BuildOptions
from export.progress import Progress


def summary(manifest: Manifest) -> str:
    """A table of the graphs of a bundle."""
    lines = [f"{'graph':<12} {'MB':>8} {'scratch MB':>11} {'build s':>8} {'error against PyTorch':>22}"]
    for name, graph in manifest.graphs.items():
        scratch = f"{max(graph.scratch_bytes.values(), default=0) / 1e6:.1f}"
        error = max(graph.error.values())
        sizes = f"{graph.nbytes / 1e6:>8.1f} {scratch:>11}"
        lines.append(f"{name:<12} {sizes} {graph.build_seconds:>8.1f} {error:>22.1e}")
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
        choices=("auto", *BACKENDS),
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
        precision=options.precision or ("fp32" if backend == ONNX else "fp16"),
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
        from export.systems import open_source

        source = open_source(options.source, options.unet_head_width, options.dino_heads)
    except ImportError as error:
        raise AnyDoorError(
            f"a checkpoint needs PyTorch to be exported, and '{error.name}' is not installed: pip install "
            "'.[export]', or give a bundle of ONNX graphs"
        ) from error
    output = options.output or Path("build/engines") / options.source.stem
    if options.max_batch is not None:
        build = replace(build, max_batch=options.max_batch)
    return output, build_bundle(source, output, build, progress)


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
