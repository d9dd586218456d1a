"""Checkpoint -> bundle of ONNX graphs, each compared with PyTorch."""

from __future__ import annotations

import gc
import time
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
import torch

from engines.bundle import CONSTANTS, Bundle, FileRecord, GraphRecord, Manifest, file_record, sha256
from engines.engine import open_engine
from engines.errors import AnyDoorError
from engines.spec import GRAPHS, ID_ENCODER
from export.precision import DETAIL_DTYPES, PRECISIONS, keep_float32_layers
from export.progress import Progress
from export.systems.anydoor import GRAPH_MODULES, PART_OF_GRAPH, export_onnx, model_shape
from export.verification import verify_graph
from export.weights import store_exact_halves
from training.network.architecture import REFERENCE_SIZE
from training.network.checkpoint import Checkpoint
from training.network.modules import AnyDoor

if TYPE_CHECKING:
    from export.build_engines import BuildOptions

STEPS = 2 + 4 * len(GRAPHS)
"""What `export_graphs` reports as progress."""


def check_resolution(checkpoint: Checkpoint, resolution: int) -> None:
    """Refuses a picture size that the network cannot halve often enough.

    Raises:
        AnyDoorError: it cannot.
    """
    a = checkpoint.architecture
    step = a.latent_factor * 2 ** (len(a.unet_channels) - 1)
    if resolution < step or resolution % step:
        raise AnyDoorError(f"--resolution must be a multiple of {step} for this network, not {resolution}")


def export_graphs(
    checkpoint: Checkpoint, output: Path, options: BuildOptions, progress: Progress
) -> Manifest:
    """Exports all graphs and compares each with PyTorch.

    They are built one after the other, each from its own part of the network, so that memory holds one part
    at a time.

    Args:
        checkpoint: an opened checkpoint.
        output: directory to write to; gets everything but the manifest.
        options: how to build.
        progress: gets `STEPS` steps.

    Raises:
        AnyDoorError: a graph does not compute what PyTorch does.
    """
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
    return replace(manifest, constants=_write_constants(checkpoint, output, manifest))


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
    if manifest.precision == "fp32" and checkpoint.dtype == torch.float16:
        store_exact_halves(output / name)
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
    engine = open_engine(
        Bundle(output, replace(manifest, graphs=dict.fromkeys(GRAPHS, record))), "cpu", backend="onnxruntime"
    )
    reference = _module(checkpoint, graph, torch.float32)
    error = verify_graph(reference, spec, engine, manifest.precision)
    engine.unload(graph)
    del reference
    gc.collect()
    return replace(record, error=error, build_seconds=round(time.monotonic() - started, 1))


def _module(checkpoint: Checkpoint, graph: str, dtype: torch.dtype) -> torch.nn.Module:
    part = checkpoint.load_part(PART_OF_GRAPH[graph], dtype)
    if dtype != torch.float32:
        keep_float32_layers(part)
    return GRAPH_MODULES[graph](part).eval()


def _write_constants(checkpoint: Checkpoint, output: Path, manifest: Manifest) -> FileRecord:
    engine = open_engine(Bundle(output, manifest), "cpu", backend="onnxruntime")
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
