"""Checkpoint -> bundle: exports the four graphs, runs each against PyTorch, writes the manifest.

python export/build_engines.py anydoor.safetensors
python export/build_engines.py anydoor.ckpt --precision fp16 --max-batch 8 --output engines/anydoor
"""

from __future__ import annotations

import argparse
import gc
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnx
import torch

from engines.bundle import CONSTANTS, MANIFEST, Bundle, FileRecord, GraphRecord, Manifest, file_record, sha256
from engines.engine import open_engine
from engines.errors import AnyDoorError
from engines.graphs import GRAPHS, ID_ENCODER
from export.checkpoint import Checkpoint, read_checkpoint
from export.graphs import GRAPH_MODULES, PART_OF_GRAPH, export_onnx, model_shape
from export.progress import Progress
from export.verification import verify_graph, worst
from training.architecture import REFERENCE_SIZE
from training.model import AnyDoor

BACKENDS = ("auto", "onnxruntime")
PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16}
DETAIL_DTYPES = {"fp32": "float32", "fp16": "float16"}


@dataclass(frozen=True)
class BuildOptions:
    """How to build a bundle."""

    backend: str = "onnxruntime"
    precision: str = "fp32"
    max_batch: int = 4
    """Most samples in one call."""
    resolution: int = 512
    """Side of the generated picture, in pixels."""


def build_bundle(
    checkpoint: Checkpoint, output: Path, options: BuildOptions, progress: Progress | None = None
) -> Manifest:
    """Builds a bundle beside its place and puts it there when it is complete and verified.

    Graphs are built one after the other, each from its own part of the network, so that memory holds one
    part at a time.

    Args:
        checkpoint: an opened checkpoint.
        output: directory of the bundle; what is there is replaced.
        options: how to build.
        progress: told of every step; a bar on the terminal if None.

    Raises:
        AnyDoorError: an option or the checkpoint is unusable, or a graph does not compute what PyTorch does.
    """
    _check(checkpoint, output, options)
    partial = output.with_name(f".{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        with progress or Progress() as shown:
            shown.steps = 2 + 4 * len(GRAPHS)
            manifest = _build(checkpoint, partial, options, shown)
        _put_in_place(partial, output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return manifest


def _build(checkpoint: Checkpoint, output: Path, options: BuildOptions, progress: Progress) -> Manifest:
    progress.step("reading the checkpoint")
    manifest = Manifest(
        producer=f"anydoor-runtime {version('anydoor-runtime')}",
        checkpoint={"file": checkpoint.path.name, "sha256": sha256(checkpoint.path)},
        architecture=asdict(checkpoint.architecture),
        model=model_shape(checkpoint.architecture, options.resolution, DETAIL_DTYPES[options.precision]),
        schedule={"kind": "ddpm", "prediction": "epsilon"},
        precision=options.precision,
        max_batch=options.max_batch,
        graphs={},
        constants=FileRecord(CONSTANTS, 0, ""),
    )
    for graph in GRAPHS:
        record = _build_graph(checkpoint, graph, output, manifest, progress)
        manifest = replace(manifest, graphs={**manifest.graphs, graph: record})
    progress.step("computing constants")
    manifest = replace(manifest, constants=_write_constants(checkpoint, output, manifest))
    (output / MANIFEST).write_text(manifest.to_json(), "utf-8")
    return manifest


def _build_graph(
    checkpoint: Checkpoint, graph: str, output: Path, manifest: Manifest, progress: Progress
) -> GraphRecord:
    started = time.monotonic()
    spec = manifest.specs[graph]
    name = f"{graph}.onnx"
    progress.step(f"{graph}: reading weights")
    module = _module(checkpoint, graph, PRECISIONS[manifest.precision])
    progress.step(f"{graph}: exporting")
    export_onnx(module, spec, output / name)
    _strip(output / name)
    del module
    gc.collect()
    progress.step(f"{graph}: hashing")
    record = GraphRecord(
        files=tuple(file_record(output, file) for file in (name, f"{name}.data")),
        backend="onnxruntime",
        backend_version=version("onnxruntime"),
        target="any",
        error={},
    )
    progress.step(f"{graph}: comparing with PyTorch")
    engine = open_engine(Bundle(output, replace(manifest, graphs=dict.fromkeys(GRAPHS, record))), "cpu")
    reference = _module(checkpoint, graph, torch.float32)
    error = verify_graph(reference, spec, engine, manifest.precision)
    engine.unload(graph)
    del reference
    gc.collect()
    return replace(record, error=error, build_seconds=round(time.monotonic() - started, 1))


def _module(checkpoint: Checkpoint, graph: str, dtype: torch.dtype) -> torch.nn.Module:
    return GRAPH_MODULES[graph](checkpoint.load_part(PART_OF_GRAPH[graph], dtype)).eval()


def _write_constants(checkpoint: Checkpoint, output: Path, manifest: Manifest) -> FileRecord:
    engine = open_engine(Bundle(output, manifest), "cpu")
    black = np.zeros((1, 3, REFERENCE_SIZE, REFERENCE_SIZE), np.float32)
    tokens = engine.to_host(engine.run(ID_ENCODER, {"reference": black})["tokens"])
    schedule = checkpoint.alphas_cumprod
    if schedule is None:
        schedule = AnyDoor(checkpoint.architecture, parts=[]).alphas_cumprod
    np.savez(output / CONSTANTS, unconditional_tokens=tokens, alphas_cumprod=schedule.float().numpy())
    return file_record(output, CONSTANTS)


def _strip(path: Path) -> None:
    """Drops what the exporter notes on every node: Python stack traces, larger than the graph itself."""
    model = onnx.load(path, load_external_data=False)
    for graph in (model.graph, *model.functions):
        for item in (*graph.node, *graph.value_info, *getattr(graph, "initializer", ())):
            item.doc_string = ""
            del item.metadata_props[:]
        del graph.metadata_props[:]
    del model.metadata_props[:]
    onnx.save(model, path)


def _check(checkpoint: Checkpoint, output: Path, options: BuildOptions) -> None:
    if options.precision not in PRECISIONS:
        raise AnyDoorError(f"there is no precision '{options.precision}': choose {' or '.join(PRECISIONS)}")
    if options.backend not in BACKENDS:
        raise AnyDoorError(f"there is no backend '{options.backend}': choose {' or '.join(BACKENDS)}")
    if options.max_batch < 1:
        raise AnyDoorError(f"--max-batch must be at least 1, not {options.max_batch}")
    a = checkpoint.architecture
    step = a.latent_factor * 2 ** (len(a.unet_channels) - 1)
    if options.resolution < step or options.resolution % step:
        raise AnyDoorError(
            f"--resolution must be a multiple of {step} for this network, not {options.resolution}"
        )
    if output.exists() and not (output / MANIFEST).is_file() and any(output.iterdir()):
        raise AnyDoorError(f"'{output}' is a directory with other things in it: give another --output")


def _put_in_place(partial: Path, output: Path) -> None:
    """Replaces a directory by another; at no time is a half-written bundle in its place."""
    old = output.with_name(f".{output.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if output.exists():
        output.rename(old)
    partial.rename(output)
    shutil.rmtree(old, ignore_errors=True)


def summary(manifest: Manifest) -> str:
    """A table of the graphs of a bundle."""
    lines = [f"{'graph':<12} {'MB':>8} {'build s':>8} {'error against PyTorch':>22}"]
    for name, graph in manifest.graphs.items():
        megabytes = sum(record.bytes for record in graph.files) / 1e6
        lines.append(f"{name:<12} {megabytes:>8.1f} {graph.build_seconds:>8.1f} {worst(graph.error):>22.1e}")
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        prog="build_engines.py",
        description="Turn a trained AnyDoor checkpoint into a bundle that the runtime executes.",
        epilog="examples:\n"
        "  python export/build_engines.py anydoor.safetensors\n"
        "  python export/build_engines.py anydoor.ckpt --precision fp16 --output build/engines/half\n"
        "  python export/build_engines.py small.safetensors --unet-head-width 8 --dino-heads 6\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.add_argument("checkpoint", type=Path, metavar="CKPT", help=".safetensors, .ckpt or .pth file")
    result.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="the bundle (default: build/engines/NAME of the checkpoint)",
    )
    result.add_argument("--backend", choices=BACKENDS, default="auto", help="what will execute it")
    result.add_argument("--precision", choices=list(PRECISIONS), default="fp32", help="default: fp32")
    result.add_argument(
        "--max-batch", type=int, default=4, metavar="N", help="most samples in one call (default: 4)"
    )
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


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    options = parser().parse_args(arguments)
    try:
        checkpoint = read_checkpoint(options.checkpoint, options.unet_head_width, options.dino_heads)
        output = options.output or Path("build/engines") / options.checkpoint.stem
        build = BuildOptions(
            backend="onnxruntime" if options.backend == "auto" else options.backend,
            precision=options.precision,
            max_batch=options.max_batch,
            resolution=options.resolution,
        )
        manifest = build_bundle(checkpoint, output, build, Progress(quiet=options.quiet))
    except AnyDoorError as error:
        print(f"build_engines.py: {error}", file=sys.stderr)
        return 2
    print(summary(manifest))
    print(f"bundle: {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
