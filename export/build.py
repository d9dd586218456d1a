"""Builds bundles: a checkpoint or a bundle of ONNX graphs -> a bundle for one backend."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from engines.backends.onnxruntime.engine import devices as onnxruntime_devices
from engines.backends.tensorrt.library import VARIANTS, load_library
from engines.bundle import Bundle
from engines.cuda import Device
from engines.errors import AnyDoorError, BundleError
from engines.files import only_writer, replacing
from engines.manifest import CUDA, MANIFEST, Manifest, read_manifest
from export.defaults import check_build_defaults
from export.options import BACKENDS, ONNX, BuildOptions
from export.output import check_output
from export.plans import build_plans, check_targets
from export.progress import Progress

if TYPE_CHECKING:
    # PyTorch; a machine that builds plans from ONNX graphs need not have it
    from export.segmenters.building import SegmenterSource
    from export.systems.system import ExportSource


def build_bundle(
    source: ExportSource, output: Path, options: BuildOptions, progress: Progress | None = None
) -> Manifest:
    """Builds a bundle beside its place and puts it there when it is complete and verified.

    Args:
        source: an opened checkpoint; see `export.systems.open_source`.
        output: directory of the bundle; what is there is replaced.
        options: how to build.
        progress: told of every step; a bar on the terminal if None.

    Raises:
        AnyDoorError: an option or the checkpoint is unusable, or a graph does not compute what PyTorch does.
    """
    from export import onnx_bundle

    _check(output, options, (source.path,))
    check_build_defaults(source.system, {**source.defaults, **options.defaults})
    source.check_size(options.size)
    count = len(source.graphs(options.size, options.precision))

    def export(folder: Path, progress: Progress) -> Manifest:
        progress.steps += onnx_bundle.step_count(count)
        return onnx_bundle.export_graphs(source, folder, options, progress)

    return _build_by_export(export, count, output, options, progress)


def build_segmenter(
    source: SegmenterSource, output: Path, options: BuildOptions, progress: Progress | None = None
) -> Manifest:
    """Builds a bundle of a segmenter from ONNX files, like `build_bundle`. Needs no PyTorch.

    Args:
        source: recognised networks.
        output: directory of the bundle; what is there is replaced.
        options: backend and targets.
        progress: told of every step; a bar on the terminal if None.

    Raises:
        AnyDoorError: an option or a network is unusable, or a graph does not compute what its network does.
    """
    from export.segmenters.building import export_segmenter

    _check(output, options, source.paths)
    count = len(source.wraps)

    def export(folder: Path, progress: Progress) -> Manifest:
        progress.steps += 2 * count
        return export_segmenter(source, folder, progress)

    return _build_by_export(export, count, output, options, progress)


def _build_by_export(
    export: Callable[[Path, Progress], Manifest],
    count: int,
    output: Path,
    options: BuildOptions,
    progress: Progress | None,
) -> Manifest:
    """Builds a bundle of so many graphs by way of ONNX, which stays where that is the backend."""

    def build(folder: Path, progress: Progress) -> Manifest:
        if options.backend == ONNX:
            return export(folder, progress)
        progress.steps += count
        graphs = folder / "onnx"
        graphs.mkdir()
        manifest = export(graphs, progress)
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
    _check(output, options, (source.path,))
    if options.backend == ONNX:
        raise AnyDoorError(
            f"'{source.path}' is a bundle already: give a checkpoint, or a --backend to build plans for "
            f"({' or '.join(name for name in BACKENDS if name != ONNX)})"
        )
    if source.manifest.backend != ONNX:
        raise AnyDoorError(f"'{source.path}' holds plans: plans are built from a bundle of ONNX graphs")

    def build(folder: Path, progress: Progress) -> Manifest:
        progress.steps = len(source.manifest.graphs)
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
        timing_cache=Path(f"{os.path.abspath(output)}.timings"),
    )


def _build_beside(
    output: Path, build: Callable[[Path, Progress], Manifest], progress: Progress | None
) -> Manifest:
    """Builds into a folder beside `output`; nobody ever sees half a bundle."""
    with placing(output) as folder, progress or Progress() as shown:
        manifest = build(folder, shown)
        write_manifest(folder, manifest)
    return manifest


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Writes the manifest of a new bundle, and reads it back before the bundle takes anything's place.

    Raises:
        AnyDoorError: no runtime could open the bundle; says why.
    """
    (folder / MANIFEST).write_text(manifest.to_json(), "utf-8")
    try:
        read_manifest(folder / MANIFEST)
    except BundleError as error:
        raise AnyDoorError(
            f"what was built could not be opened, so nothing was written ({error.__cause__ or error})"
        ) from error


@contextmanager
def placing(output: Path) -> Iterator[Path]:
    """Yields a new folder for a bundle, which takes its place when it is complete.

    Raises:
        AnyDoorError: another process builds there, or the folder cannot be written.
    """
    try:
        with only_writer(output), replacing(output) as folder:
            folder.mkdir()
            yield folder
    except BlockingIOError as error:
        raise AnyDoorError(
            f"cannot build '{output}': {error.strerror}; wait for it, or give another --output"
        ) from error
    except OSError as error:
        raise AnyDoorError(f"cannot build '{output}': {error.strerror or error}") from error


def _check(output: Path, options: BuildOptions, inputs: Sequence[Path]) -> None:
    check_output(output, inputs)
    if options.backend != ONNX:
        # before an export of minutes
        check_targets(load_library(options.backend), options.targets)


def default_targets(backend: str) -> tuple[str, ...]:
    """Returns the default targets on this machine: ONNX graphs for CUDA where ONNX Runtime can use a
    card."""
    with suppress(AnyDoorError):
        if backend == ONNX and CUDA in onnxruntime_devices() and Device().card():
            return (CUDA,)
    return ()


def best_backend() -> str:
    """Returns the fastest backend of this machine: TensorRT where there is a card and the library, or ONNX
    Runtime."""
    with suppress(AnyDoorError):
        architecture = Device().card().architecture
        for backend, variant in VARIANTS.items():
            if find_spec(backend) and (not variant.targets or architecture in variant.targets):
                return backend
    return ONNX
