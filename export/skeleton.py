"""Builds bundles without weights, about a megabyte at full size: graphs and manifest as of a normal build.

The network that they are exported from has parameters that take no memory. Operators can be counted in a
skeleton, and it is a small thing to move to another machine, where `export.noise` gives it weights. For that
it has a file more than a bundle: how the noise of each weight is distributed.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as passes
import torch
from torch import nn

from engines.bundle import CONSTANTS, file_record
from engines.engine import Array, Engine
from engines.manifest import CUDA, FileRecord, GraphRecord, Manifest
from export.build import placing, write_manifest
from export.noise import write_recipe
from export.noise_recipe import noise_recipe
from export.onnx_bundle import empty_manifest, write_tokenizer
from export.onnx_graph import trace
from export.options import BuildOptions
from export.precision import TORCH_DTYPES
from export.progress import Progress
from export.rewrite.rewriting import rewrite
from export.scratch import scratch_of_graph, scratch_on_a_card
from export.systems.system import ExportSource, GraphExport

_LARGEST_CONSTANT = 4096
"""Bytes; what is larger is a weight. The largest constant is a table of 1,000 numbers."""

_MARKS = [float(mark) for mark in np.arange(0x3000, 0x4400, dtype=np.uint16).view(np.float16) if mark != 1]
"""Values of parameters, exact in FP16: all differ, so the exporter merges no two, and tell weights from
constants."""


def build_skeleton(
    source: ExportSource, output: Path, options: BuildOptions, progress: Progress | None = None
) -> Manifest:
    """Builds a bundle of ONNX graphs whose weights are left out.

    Args:
        source: a network; `without_weights` of a system's source makes one that takes no memory.
        output: directory of the bundle; what is there is replaced.
        options: precision, resolution, batch and target.
        progress: told of every graph; a bar on the terminal if None.

    Returns:
        The manifest. It names the missing files with their sizes and with empty hashes.

    Raises:
        AnyDoorError: the network cannot make pictures of this size.
        RewriteError: a graph has a pattern that no rule for the target recognised.
    """
    source.check_size(options.size)
    graphs = source.graphs(options.size, options.precision)
    manifest = empty_manifest(source, options, checkpoint={})
    with placing(output) as folder, progress or Progress() as shown:
        shown.steps = len(graphs)
        for graph in graphs:
            shown.step(f"{graph.spec.name}: exporting")
            record = _build_graph(graph, folder, manifest, options.rules)
            manifest = replace(manifest, graphs={**manifest.graphs, graph.spec.name: record})
        recipes = {name: noise_recipe(folder / of.files[0].path) for name, of in manifest.graphs.items()}
        write_recipe(folder, recipes)
        constants: dict[str, Any] = {**source.constants(cast(Engine, _NoiseEngine(manifest)))}
        np.savez(folder / CONSTANTS, **constants)
        manifest = replace(manifest, constants=file_record(folder, CONSTANTS))
        if source.tokenizer is not None:
            manifest = replace(manifest, tokenizer=write_tokenizer(folder, source.tokenizer))
        write_manifest(folder, manifest)
    return manifest


def _build_graph(graph: GraphExport, folder: Path, manifest: Manifest, rules: str) -> GraphRecord:
    module = graph.load(TORCH_DTYPES[manifest.precision])
    marks = set(_mark(module))
    model = trace(module, graph.spec).model
    passes.ClearMetadataAndDocStringPass()(model)
    path = folder / f"{graph.spec.name}.onnx"
    data = f"{path.name}.data"
    _leave_out_weights(model, data, marks)
    ir.save(model, path)
    scratch = scratch_of_graph(path, manifest)
    rewrite(model, rules)
    size = _leave_out_weights(model, data, marks)
    ir.save(model, path)
    if manifest.target == CUDA:
        scratch[CUDA] = scratch_on_a_card(path, manifest)
    files = (file_record(folder, path.name), FileRecord(data, size, ""))
    return GraphRecord(graph.spec, files, scratch_bytes=scratch)


def _mark(module: nn.Module) -> Iterator[float]:
    """Gives every parameter a value of its own that takes the memory of one number."""
    for parameter, mark in zip(module.parameters(), itertools.cycle(_MARKS)):
        parameter.data = torch.full((), mark, dtype=parameter.dtype).expand(parameter.shape)
        yield mark


def _leave_out_weights(model: ir.Model, file: str, marks: Collection[float]) -> int:
    """Replaces weights by places in a file that does not exist. Returns how many bytes it would have."""
    offset = 0
    for weight in model.graph.initializers.values():
        tensor = weight.const_value
        if tensor is None or not _is_weight(tensor, marks):
            continue
        shape = ir.Shape(tensor.shape)
        weight.const_value = ir.ExternalTensor(
            file, offset, tensor.nbytes, tensor.dtype, shape=shape, name=weight.name or ""
        )
        offset += tensor.nbytes
    return offset


def _is_weight(tensor: ir.TensorProtocol, marks: Collection[float]) -> bool:
    """Returns whether a tensor is a parameter or was made of one."""
    if isinstance(tensor, ir.LazyTensor | ir.ExternalTensor) or tensor.nbytes >= _LARGEST_CONSTANT:
        return True
    if not tensor.dtype.is_floating_point() or tensor.size == 0:
        return False
    values = np.unique(tensor.numpy())
    return len(values) == 1 and float(values[0]) in marks


class _NoiseEngine:
    """Stands in for an engine where there is nothing to run: results are noise of the right shape."""

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest

    def run(self, graph: str, inputs: dict[str, Array]) -> dict[str, Array]:
        """Returns output -> seeded noise."""
        random, spec = np.random.default_rng(0), self._manifest.specs[graph]
        sizes = spec.sizes({name: array.shape for name, array in inputs.items()})
        return {t.name: random.standard_normal(t.resolve(sizes)).astype(t.dtype) for t in spec.outputs}

    def to_host(self, tensor: Array) -> Array:
        """Returns the tensor itself."""
        return tensor
