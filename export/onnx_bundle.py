"""Builds a bundle of ONNX graphs from a checkpoint, and compares each with PyTorch."""

from __future__ import annotations

import gc
import shutil
import time
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

from engines.bundle import CONSTANTS, MERGES, Bundle, file_record
from engines.engine import Engine, open_engine
from engines.manifest import ANY_TARGET, CPU, CUDA, FileRecord, GraphRecord, Manifest, TokenizerRecord
from engines.options import EngineOptions
from engines.spec import GraphSpec
from export.onnx_graph import export_onnx
from export.options import ONNX, BuildOptions
from export.precision import TORCH_DTYPES
from export.progress import Progress
from export.reuse import copy_graph, has_graph, made_from
from export.rewrite.attention import Attention, CausalAttention
from export.rewrite.files import rewrite_file
from export.scratch import scratch_of_graph, scratch_on_a_card
from export.systems.system import ExportSource, GraphExport
from export.verification import verify_graph
from export.weights import store_exact_halves
from training.network.tokenizer_files import TokenizerFiles

_ON_THE_CPU = EngineOptions(backend=ONNX, device="cpu")

_STEPS_PER_GRAPH = 4


def step_count(graphs: int) -> int:
    """Returns the number of progress steps of `export_graphs`."""
    return 2 + _STEPS_PER_GRAPH * graphs


def export_graphs(source: ExportSource, output: Path, options: BuildOptions, progress: Progress) -> Manifest:
    """Exports all graphs and compares each with PyTorch.

    They are built one after the other, each from its own part of the network, so that memory holds one part
    at a time.

    Args:
        source: an opened checkpoint.
        output: directory to write to; gets everything but the manifest.
        options: how to build.
        progress: gets `step_count` steps.

    Raises:
        AnyDoorError: a graph does not compute what PyTorch does; or the bundle to copy from cannot be used.
    """
    progress.step("reading the checkpoint")
    reuse = None if options.reuse is None else Bundle.open(options.reuse)
    manifest = empty_manifest(source, options, source.record())
    for graph in source.graphs(options.size, options.precision):
        record = _build_graph(source, graph, output, manifest, progress, reuse)
        manifest = replace(manifest, graphs={**manifest.graphs, graph.spec.name: record})
    digests = {name: record.made_from for name, record in manifest.graphs.items()}
    if reuse is not None and not any(has_graph(reuse, *of) for of in digests.items()):
        progress.note(f"nothing is copied from '{reuse.path}': no graph in it is made from the same")
    progress.step("computing constants")
    constants: dict[str, Any] = {**source.constants(_open_on_the_cpu(output, manifest))}
    np.savez(output / CONSTANTS, **constants)
    if source.tokenizer is not None:
        manifest = replace(manifest, tokenizer=write_tokenizer(output, source.tokenizer))
    if manifest.target != ANY_TARGET:
        progress.steps += len(manifest.graphs)
        graphs = {
            name: _rewrite_graph(source, record, output, manifest, options.rules, progress)
            for name, record in manifest.graphs.items()
        }
        manifest = replace(manifest, graphs=graphs)
    return replace(manifest, constants=file_record(output, CONSTANTS))


def write_tokenizer(output: Path, tokenizer: TokenizerFiles) -> TokenizerRecord:
    """Writes the merges of a bundle's tokenizer."""
    (output / MERGES).write_text(tokenizer.merges, "utf-8", newline="\n")
    return TokenizerRecord(file_record(output, MERGES), tokenizer.pad, tokenizer.any_case)


def _open_on_the_cpu(output: Path, manifest: Manifest) -> Engine:
    """Returns the engine for graphs that are in standard operators yet, whatever they will be rewritten
    for."""
    return open_engine(Bundle(output, replace(manifest, target=ANY_TARGET)), _ON_THE_CPU)


def _rewrite_graph(
    source: ExportSource,
    record: GraphRecord,
    output: Path,
    manifest: Manifest,
    rules: str,
    progress: Progress,
) -> GraphRecord:
    """Replaces a graph by one in the operators of the target's execution provider.

    The error in its record is that of the graph before, in plain operators, which run on the CPU.
    """
    name = record.spec.name
    progress.step(f"{name}: rewriting for {rules}")
    plain = output / "plain"
    plain.mkdir()
    for file in record.files:
        (output / file.path).rename(plain / file.path)
    path = output / record.files[0].path
    report = rewrite_file(plain / path.name, path, rules)
    shutil.rmtree(plain)
    _store_exact_halves(path, source, manifest)
    progress.note(f"{name}: {report}")
    scratch = {**record.scratch_bytes, CUDA: scratch_on_a_card(path, manifest)}
    return replace(record, files=_files(path), scratch_bytes=scratch)


def _store_exact_halves(path: Path, source: ExportSource, manifest: Manifest) -> None:
    if manifest.precision == "fp32" and source.dtype == torch.float16:
        store_exact_halves(path)


def _record(spec: GraphSpec, path: Path, manifest: Manifest) -> GraphRecord:
    """Returns the record of an exported graph, after its variant for ONNX Runtime's CPU provider is written.

    The provider's attention computes in float32 alone. Without a matrix of scores it takes much less memory.
    """
    variants = {}
    if manifest.target == ANY_TARGET and manifest.precision == "fp32":
        variant = path.with_name(f"{spec.name}.{CPU}.onnx")
        # attention of another form, as with a single head, is no faster and no slower than before
        matches = rewrite_file(path, variant, CPU, strict=False).matches
        if any(matches[rule.name] for rule in (Attention, CausalAttention)):
            variants[CPU] = file_record(path.parent, variant.name)
        else:
            variant.unlink()
    scratch = scratch_of_graph(path, manifest, has_attention=bool(variants))
    return GraphRecord(spec, _files(path), scratch_bytes=scratch, variants=variants)


def _files(path: Path) -> tuple[FileRecord, ...]:
    """Returns the records of a graph's file and of the file of its weights."""
    files = (path, path.with_name(f"{path.name}.data"))
    return tuple(file_record(path.parent, file.name) for file in files if file.exists())


def empty_manifest(source: ExportSource, options: BuildOptions, checkpoint: Mapping[str, Any]) -> Manifest:
    """Returns the manifest of a bundle of ONNX graphs before it has any graph."""
    return Manifest(
        system=source.system,
        backend=ONNX,
        backend_version=version("onnxruntime"),
        target=CUDA if CUDA in options.targets else ANY_TARGET,
        precision=options.precision,
        max_batch=options.max_batch,
        dimensions=source.dimensions,
        graphs={},
        constants=FileRecord(CONSTANTS, 0, ""),
        defaults={**source.defaults, **options.defaults},
        checkpoint=checkpoint,
        architecture=source.architecture,
        schedule={"kind": "ddpm", "prediction": "epsilon"},
        producer=f"anydoor-runtime {version('anydoor-runtime')}",
    )


def _build_graph(
    source: ExportSource,
    graph: GraphExport,
    output: Path,
    manifest: Manifest,
    progress: Progress,
    reuse: Bundle | None,
) -> GraphRecord:
    started = time.monotonic()
    spec, name = graph.spec, graph.spec.name
    path = output / f"{name}.onnx"
    progress.step(f"{name}: reading weights")
    module = graph.load(TORCH_DTYPES[manifest.precision])
    digest = made_from(module, spec, manifest, source.dtype)
    if reuse is not None and has_graph(reuse, name, digest):
        progress.step(f"{name}: copying from '{reuse.path}'")
        progress.steps -= _STEPS_PER_GRAPH - 2
        return copy_graph(reuse, name, output)
    progress.step(f"{name}: exporting")
    export_onnx(module, spec, path, None if manifest.target == CUDA else ANY_TARGET)
    _strip(path)
    _store_exact_halves(path, source, manifest)
    del module
    gc.collect()
    progress.step(f"{name}: hashing")
    record = _record(spec, path, manifest)
    progress.step(f"{name}: comparing with PyTorch")
    alone = replace(manifest, graphs={name: record})
    engine = _open_on_the_cpu(output, alone)
    reference = graph.load(torch.float32)
    error = verify_graph(reference, graph, engine, manifest)
    engine.unload(name)
    del reference
    gc.collect()
    seconds = round(time.monotonic() - started, 1)
    return replace(record, error=error, build_seconds=seconds, made_from=digest)


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
