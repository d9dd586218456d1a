"""Implements the command `build_engines.py`, which is also `anydoor build`: builds a bundle for one backend
from a checkpoint or ONNX graphs.

A bundle of plans is built from a bundle of ONNX graphs without PyTorch: export on a workstation, build the
plans on the machine that runs them.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

try:
    from engines.bundle import Bundle, no_checkpoint
    from engines.errors import AnyDoorError
    from engines.manifest import CUDA, Manifest
    from export.build import best_backend, build_bundle, build_plan_bundle, default_targets
    from export.flags import SKELETONS, add_arguments
    from export.options import ONNX, SOURCE_OPTIONS, BuildOptions, SourceOptions, flag
    from export.output import check_output
    from export.progress import Progress
    from export.script import run_script
    from export.segmenters.command import build_from_onnx, is_segmenter
except ModuleNotFoundError as error:
    if __name__ != "__main__":
        raise
    print(
        f"build_engines.py: the package '{error.name}' is missing: run 'make dev', then "
        "'.venv/bin/python export/build_engines.py'",
        file=sys.stderr,
    )
    sys.exit(2)

NAME = "build"
HELP = "Turn a trained checkpoint into a bundle that the runtime executes"
EXAMPLES = """
anydoor build anydoor.safetensors
anydoor build anydoor.ckpt --precision fp16 --max-batch 8 --output build/engines/half
anydoor build anydoor.safetensors --backend tensorrt_rtx --targets sm89,sm120
anydoor build build/engines/half --backend tensorrt --output build/engines/orin
anydoor build small.safetensors --unet-head-width 8 --dino-heads 6
anydoor build small.safetensors --default guidance_scale=2 --default mode=keep_background
anydoor build stable-diffusion-v1-5 --variant fp16 --resolution 768x512
anydoor build 512-inpainting-ema.safetensors --tokenizer merges.txt --lora cup.safetensors:0.8
anydoor build 768-v-ema.ckpt --prediction v --resolution 768
anydoor build sks-cup-folder --reuse build/engines/stable-diffusion-v1-5
anydoor build u2net.onnx
anydoor build sam_encoder.onnx sam_decoder.onnx
anydoor build --skeleton --precision fp16 --targets cuda
anydoor build --skeleton --system stable_diffusion --precision fp16 --targets cuda
"""

_OF_THE_CHECKPOINT = ("precision", "resolution", *SOURCE_OPTIONS, "default", "reuse")
"""Options that a bundle of ONNX graphs has decided already."""

_OF_ITS_NETWORK = (*SOURCE_OPTIONS, "default", "reuse")
"""Options that a skeleton has decided already."""


def run(options: argparse.Namespace) -> int:
    """Builds the bundle, and prints what it is and where.

    Raises:
        AnyDoorError: it cannot be built; says why.
    """
    try:
        output, manifest = build(options)
    except BrokenPipeError:
        raise
    except OSError as error:
        file = f" '{error.filename}'" if error.filename else ""
        raise AnyDoorError(f"cannot read or write{file}: {error.strerror or error}") from error
    except (MemoryError, RuntimeError) as error:
        # PyTorch has no class of its own for it
        if isinstance(error, RuntimeError) and "allocate memory" not in str(error):
            raise
        raise AnyDoorError(
            "there is not enough memory to build it: give a smaller --resolution, or build it on a machine "
            "with more"
        ) from error
    print(summary(manifest))
    print(f"bundle: {output}")
    return 0


def build(options: argparse.Namespace) -> tuple[Path, Manifest]:
    """Builds what the command line requests; returns the bundle's path and manifest.

    Raises:
        AnyDoorError: it cannot be built; says why.
    """
    if options.skeleton:
        return _build_skeleton(options)
    if options.source is None:
        raise AnyDoorError("give a checkpoint or a bundle to build from, or --skeleton")
    if options.system:
        raise AnyDoorError(
            f"--system is for --skeleton: the system of '{options.source}' is recognised from its weights"
        )
    if is_segmenter(options):
        return build_from_onnx(options)
    build = build_options(options)
    if options.source.is_dir() and not holds_checkpoint(options.source):
        for name in _OF_THE_CHECKPOINT:
            if getattr(options, name) is not None:
                raise AnyDoorError(
                    f"{flag(name)} goes with a checkpoint: '{options.source}' is a bundle, which has its own"
                )
        bundle = Bundle.open(options.source)
        output = options.output or plans_folder(options.source, build.backend)
        if options.max_batch is None:
            build = replace(build, max_batch=bundle.manifest.max_batch)
        return output, build_plan_bundle(bundle, output, build, Progress(quiet=options.quiet))
    output = options.output or Path("build/engines") / checkpoint_name(options.source)
    loras = [path for path, _ in options.lora or ()]
    if not options.source.exists():
        raise AnyDoorError(no_checkpoint(options.source))
    check_output(output, [options.source, *loras, *([options.tokenizer] if options.tokenizer else [])])
    try:
        from export.systems import open_source

        source = open_source(options.source, source_options(options))
    except ModuleNotFoundError as error:
        raise AnyDoorError(
            f"a checkpoint needs PyTorch to be exported, and '{error.name}' is not installed: pip install "
            "'.[export]', or give a bundle of ONNX graphs"
        ) from error
    print(f"checkpoint: {source.description}", flush=True)
    if options.resolution is None and source.size is not None:
        build = replace(build, resolution=source.size)
    return output, build_bundle(source, output, build, Progress(quiet=options.quiet))


def holds_checkpoint(folder: Path) -> bool:
    """Returns whether a folder is a checkpoint: in the layout of diffusers, in shards, or with its file in
    it."""
    suffixes = (".index.json", ".safetensors", ".ckpt", ".pt", ".pth", ".bin")
    return (folder / "unet").is_dir() or any(
        name.name.lower().endswith(suffixes) for name in folder.iterdir()
    )


def checkpoint_name(path: Path) -> str:
    """Returns the default name of a checkpoint's bundle: its file's name without suffix, or its folder's.

    Raises:
        AnyDoorError: it is the root, which has no name.
    """
    # a link has a name of its own: files of the Hugging Face cache are links to files named by their hashes
    whole = Path(os.path.abspath(path))
    if path.name.endswith(".index.json"):
        whole = whole.parent
    elif not path.is_dir():
        return whole.stem
    if not whole.name:
        raise AnyDoorError(f"'{whole}' has no name to call the bundle by: give --output")
    return whole.name


def plans_folder(bundle: Path, backend: str) -> Path:
    """Returns where the plans of a bundle go by default: beside it.

    Raises:
        AnyDoorError: it is the root, which nothing is beside.
    """
    name = f"{checkpoint_name(bundle)}-{backend}"
    # "." and ".." have no parent to write
    return (bundle if bundle.name not in ("", "..") else Path(os.path.abspath(bundle))).with_name(name)


def _build_skeleton(options: argparse.Namespace) -> tuple[Path, Manifest]:
    """Builds a published network without weights.

    Raises:
        AnyDoorError: other options do not go with it, or PyTorch is not installed.
    """
    if options.source is not None:
        raise AnyDoorError(f"--skeleton has no weights: give it or '{options.source}', not both")
    if options.backend not in ("auto", ONNX):
        raise AnyDoorError(f"--skeleton makes ONNX graphs: use it with --backend {ONNX}")
    if options.normalise:
        raise AnyDoorError("--normalise is for segmentation networks, not for --skeleton")
    for name in _OF_ITS_NETWORK:
        if getattr(options, name) is not None:
            raise AnyDoorError(f"{flag(name)} is for checkpoints, not for --skeleton")
    options.backend = ONNX
    system = options.system or "anydoor"
    build, output = build_options(options), options.output or SKELETONS[system]
    check_output(output)
    try:
        from export.skeleton import build_skeleton
        from export.systems import published_source

        source = published_source(build.precision, system)
    except ModuleNotFoundError as error:
        raise AnyDoorError(
            f"--skeleton needs PyTorch, and '{error.name}' is not installed: pip install '.[export]'"
        ) from error
    return output, build_skeleton(source, output, build, Progress(quiet=options.quiet))


def build_options(options: argparse.Namespace) -> BuildOptions:
    """Returns the build options of the command line.

    Raises:
        AnyDoorError: a value is out of range.
    """
    backend = best_backend() if options.backend == "auto" else options.backend
    given = {name: getattr(options, name) for name in ("max_batch", "resolution", "reuse")}
    return BuildOptions(
        backend=backend,
        precision=options.precision or ("fp32" if backend == ONNX else "fp16"),
        targets=options.targets or default_targets(backend),
        defaults=dict(options.default or []),
        deterministic=options.deterministic,
        **{name: value for name, value in given.items() if value is not None},
    )


def source_options(options: argparse.Namespace) -> SourceOptions:
    """Returns the checkpoint options of the command line."""
    given = {name: getattr(options, name) for name in SOURCE_OPTIONS}
    return SourceOptions(**given | {"lora": tuple(options.lora) if options.lora else None})


def summary(manifest: Manifest) -> str:
    """Formats a bundle's properties and a table of its graphs."""
    defaults = ", ".join(f"{name} {value}" for name, value in manifest.defaults.items())
    against = "the network" if manifest.is_segmenter else "PyTorch"
    lines = [
        f"system: {manifest.system}, {manifest.precision}, {manifest.size_text}, batch up to "
        f"{manifest.max_batch}",
        *([] if manifest.is_segmenter else [f"defaults: {defaults or 'those of the system'}"]),
        f"{'graph':<12} {'MB':>8} {'scratch MB':>11} {'build s':>8} {f'error against {against}':>22}",
    ]
    for name, graph in manifest.graphs.items():
        where = CUDA if manifest.target == CUDA else manifest.backend
        scratch = f"{graph.scratch_bytes.get(where, 0) / 1e6:.1f}"
        error = f"{max(graph.error.values()):.1e}" if graph.error else "-"
        sizes = f"{graph.nbytes / 1e6:>8.1f} {scratch:>11}"
        lines.append(f"{name:<12} {sizes} {graph.build_seconds:>8.1f} {error:>22}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command as a script; returns its exit code."""
    examples = EXAMPLES.replace("anydoor build", "python export/build_engines.py").replace("\n", "\n  ")
    parser = argparse.ArgumentParser(
        prog="build_engines.py",
        description=f"{HELP}.",
        epilog=f"examples:{examples.rstrip()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser)
    return run_script("build_engines.py", lambda: run(parser.parse_args(arguments)))


if __name__ == "__main__":
    sys.exit(main())
