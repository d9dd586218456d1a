"""Graphs as PyTorch modules behind the interface of an engine: nothing is exported, which takes minutes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from engines.bundle import CONSTANTS, Bundle, file_record
from engines.engine import Array, concatenate_rows, observed, run_step_by_step
from engines.manifest import GraphRecord
from engines.spec import GraphSpec
from export.onnx_bundle import empty_manifest
from export.options import BuildOptions
from export.systems.system import ExportSource, Size
from runtime import Compositor


class ModuleEngine:
    """Runs modules whose arguments are the inputs of a graph, in their order; tensors stay on the host."""

    device, backend, cache_bytes = "cpu", "pytorch", None

    def __init__(self, graphs: Mapping[str, tuple[GraphSpec, nn.Module]]) -> None:
        self.specs = {name: spec for name, (spec, _) in graphs.items()}
        self.observer: Any = None
        self._graphs = graphs

    def run(
        self, graph: str, inputs: Mapping[str, Array], outputs: Sequence[str] | None = None
    ) -> dict[str, Array]:
        spec, module = self._graphs[graph]
        with torch.no_grad(), observed(self, "run", graph, inputs):  # type: ignore[arg-type]
            result = module(*(torch.from_numpy(inputs[tensor.name]) for tensor in spec.inputs))
        results = result if isinstance(result, tuple) else (result,)
        return {tensor.name: value.numpy() for tensor, value in zip(spec.outputs, results)}

    def run_steps(self, *arguments: Any) -> dict[str, Any]:
        return run_step_by_step(self, *arguments)  # type: ignore[arg-type]

    def nbytes(self, tensor: Array) -> int:
        return tensor.nbytes

    def to_device(self, array: Array) -> Array:
        return array

    def to_host(self, tensor: Array) -> Array:
        return tensor

    def concatenate(self, pieces: Sequence[tuple[Array, int, int]]) -> Array:
        return concatenate_rows(pieces)


def module_compositor(source: ExportSource, folder: Path, size: Size) -> Compositor:
    """A compositor of the modules of a checkpoint; `folder` gets the constants of its bundle."""
    graphs = source.graphs(size, "fp32")
    engine: Any = ModuleEngine({each.spec.name: (each.spec, each.load(torch.float32)) for each in graphs})
    constants: dict[str, Any] = {**source.constants(engine)}
    np.savez(folder / CONSTANTS, **constants)
    manifest = replace(
        empty_manifest(source, BuildOptions(resolution=size), source.record()),
        graphs={each.spec.name: GraphRecord(each.spec, ()) for each in graphs},
        constants=file_record(folder, CONSTANTS),
    )
    return Compositor(Bundle(folder, manifest), engine)
