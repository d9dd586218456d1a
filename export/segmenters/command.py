"""Implements the part of `anydoor build` for segmenters."""

from __future__ import annotations

import argparse
from itertools import takewhile
from pathlib import Path

from engines.errors import AnyDoorError
from engines.manifest import ANY_TARGET, CUDA, Manifest
from export.build import best_backend, build_segmenter
from export.options import ONNX, SOURCE_OPTIONS, BuildOptions, flag
from export.output import check_output
from export.progress import Progress

NORMALISATIONS = ("imagenet", "half", "signed", "u2net")
"""Names of `export.segmenters.recognition.NORMALISATIONS`, which imports onnx."""

_OF_A_CHECKPOINT = ("precision", "resolution", "max_batch", "default", "reuse", *SOURCE_OPTIONS)


def add_segmenter_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that only segmenters have."""
    group = parser.add_argument_group("networks that cut out objects, as ONNX")
    group.add_argument(
        "decoder",
        type=Path,
        nargs="?",
        metavar="DECODER",
        help="of a network that finds what is clicked on, beside its encoder",
    )
    group.add_argument(
        "--normalise",
        choices=NORMALISATIONS,
        help="how values of pictures are normalised, where inputs and outputs do not say it: imagenet "
        "(BiRefNet, RMBG-2.0), half (IS-Net, RMBG-1.4), signed (MODNet), u2net",
    )


def is_segmenter(options: argparse.Namespace) -> bool:
    """Returns whether the command line asks for a segmenter.

    Raises:
        AnyDoorError: it does not, and has flags of one.
    """
    source: Path | None = options.source
    if source is not None and source.suffix.lower() == ".onnx":
        return True
    if options.decoder or options.normalise:
        what = f"'{options.decoder}'" if options.decoder else "--normalise"
        raise AnyDoorError(f"{what} is for segmentation networks, given as .onnx files")
    return False


def build_from_onnx(options: argparse.Namespace) -> tuple[Path, Manifest]:
    """Builds the segmenter that the command line asks for: where the bundle is, and its manifest.

    Raises:
        AnyDoorError: it cannot be built; says why.
    """
    for name in _OF_A_CHECKPOINT:
        if getattr(options, name) is not None:
            raise AnyDoorError(f"{flag(name)} goes with a checkpoint: '{options.source}' is an ONNX file")
    if options.deterministic or CUDA in options.targets:
        name = "--deterministic" if options.deterministic else f"--targets {CUDA}"
        raise AnyDoorError(
            f"{name} goes with a checkpoint: '{options.source}' is an ONNX file, whose bundle runs anywhere"
        )
    paths = [options.source, *([options.decoder] if options.decoder else [])]
    backend = best_backend() if options.backend == "auto" else options.backend
    targets = options.targets or ((ANY_TARGET,) if backend == ONNX else ())
    build = BuildOptions(backend=backend, targets=targets, max_batch=1)
    try:
        from export.segmenters.building import SegmenterSource
    except ModuleNotFoundError as error:
        raise AnyDoorError(
            f"the package '{error.name}' is missing; install it with: pip install '.[export]'"
        ) from error
    output = options.output or Path("build/engines") / _name(paths)
    check_output(output, paths)
    source = SegmenterSource.open(paths, options.normalise)
    print(f"network: {source.description}", flush=True)
    return output, build_segmenter(source, output, build, Progress(quiet=options.quiet))


def _name(paths: list[Path]) -> str:
    """Returns the default name of a bundle: the file's name, or what an encoder's and a decoder's have in
    common."""
    alike = takewhile(lambda letters: len(set(letters)) == 1, zip(*(path.stem for path in paths)))
    return "".join(first for first, *_ in alike).rstrip("_-. ") or paths[0].stem
