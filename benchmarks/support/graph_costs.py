"""Counts operations and bytes of a bundle's graphs, from the ONNX files."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.support.graphs import GRAPHS_OF
from benchmarks.support.peaks import Peak
from engines.bundle import Bundle
from engines.errors import BundleError

if TYPE_CHECKING:
    from onnx import GraphProto, NodeProto

Shape = tuple[int, ...]

_VIEWS = frozenset(("Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity", "Shape", "Size", "Constant"))
"""Operators that move nothing."""

_MOVES = frozenset(
    (
        *("Cast", "Concat", "ConstantOfShape", "Expand", "Gather", "Pad", "Range", "Resize", "Slice"),
        *("Split", "Tile", "Transpose", "Where", "IsNaN", "Equal", "Less", "Greater", "Not"),
    )
)
"""Operators that move or compare values and compute nothing."""


@dataclass(frozen=True)
class GraphCost:
    """What one call of a graph takes, on any backend."""

    graph: str
    matrix_flops: int
    """Operations of convolutions, matrix products and attention; a multiplication and an addition are two."""
    other_flops: int
    """All other arithmetic, one operation per value that an operator computes."""
    weight_bytes: int
    io_bytes: int
    """Inputs and outputs of the graph."""
    unfused_bytes: int
    """What is moved if every operator takes its inputs from memory and leaves its outputs there."""

    @property
    def least_bytes(self) -> int:
        """Bytes that have to be moved: weights, inputs and outputs once, no intermediate results."""
        return self.weight_bytes + self.io_bytes

    def limit(self, peak: Peak, bytes_factor: float = 1.0) -> float:
        """Return the least seconds that a call can take.

        Args:
            peak: rates of the machine.
            bytes_factor: size of a value on the machine / its size in the graph; 0.5 for FP32 run as FP16.
        """
        return max(
            self.matrix_flops / (peak.tflops * 1e12), self.least_bytes * bytes_factor / (peak.gbs * 1e9)
        )


def matrix_flops(node: NodeProto, inputs: Sequence[Shape], output: Shape) -> int:
    """Count the operations of a convolution, matrix product or attention; 0 for any other operator."""
    attributes = {a.name: a for a in node.attribute}
    if node.op_type in ("Conv", "ConvTranspose"):
        # weights (outputs, inputs / groups, *kernel); of a transposed one (inputs, outputs / groups, *kernel)
        positions = output if node.op_type == "Conv" else inputs[0]
        return 2 * math.prod(positions) * math.prod(inputs[1][1:])
    if node.op_type == "MatMul":
        return 2 * math.prod(output) * inputs[0][-1]
    if node.op_type == "Gemm":
        transposed = "transA" in attributes and attributes["transA"].i
        return 2 * math.prod(output) * inputs[0][0 if transposed else 1]
    if node.op_type == "Attention":
        return _attention_flops(inputs, {name: a.i for name, a in attributes.items()})
    return 0


def _attention_flops(inputs: Sequence[Shape], attributes: Mapping[str, int]) -> int:
    queries, keys, values = inputs[:3]
    if len(queries) == 4:
        heads, value_width = queries[1], values[3]
        query_length, key_length, width = queries[2], keys[2], queries[3]
    else:
        heads, width = attributes["q_num_heads"], queries[2] // attributes["q_num_heads"]
        query_length, key_length = queries[1], keys[1]
        value_width = values[2] // attributes["kv_num_heads"]
    return 2 * queries[0] * heads * query_length * key_length * (width + value_width)


def count_graph(path: Path, name: str, sizes: Mapping[str, int] | None = None) -> GraphCost:
    """Count a graph, without reading its weights.

    Args:
        path: an ONNX file.
        name: what to call the graph.
        sizes: variable dimension -> its size; None if there is none.

    Raises:
        BundleError: a shape cannot be inferred.
    """
    graph = _inferred(path, sizes or {})
    values = (*graph.input, *graph.value_info, *graph.output)
    shapes = {value.name: _shape(value) for value in values}
    shapes |= {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    width = {value.name: _itemsize(value.type.tensor_type.elem_type) for value in values}
    width |= {tensor.name: _itemsize(tensor.data_type) for tensor in graph.initializer}

    def shape(name: str) -> Shape:
        found = shapes.get(name)
        if found is None:
            raise BundleError(f"cannot count '{path}': the shape of '{name}' cannot be inferred")
        return found

    def nbytes(names: set[str]) -> int:
        return sum(math.prod(shape(name)) * width[name] for name in names)

    matrix = other = unfused = 0
    for node in graph.node:
        inputs, outputs = [name for name in node.input if name], [name for name in node.output if name]
        if node.op_type in _VIEWS:
            continue
        unfused += nbytes({*inputs, *outputs})
        flops = matrix_flops(node, [shape(name) for name in inputs], shape(outputs[0]))
        matrix += flops
        if not flops and node.op_type not in _MOVES:
            other += sum(math.prod(shape(name)) for name in outputs)
    weights = {t.name for t in graph.initializer}
    borders = {v.name for v in (*graph.input, *graph.output)} - weights
    return GraphCost(name, matrix, other, nbytes(weights), nbytes(borders), unfused)


def _inferred(path: Path, sizes: Mapping[str, int]) -> GraphProto:
    """Returns the graph of a file with the shapes that follow from its inputs' sizes."""
    import onnx

    model = onnx.load(path, load_external_data=False)
    for value in model.graph.input:
        for dimension in value.type.tensor_type.shape.dim:
            if dimension.dim_param:
                dimension.dim_value = sizes[dimension.dim_param]
    # the shapes that the exporter wrote down have variable dimensions
    del model.graph.value_info[:]
    for value in model.graph.output:
        value.type.tensor_type.ClearField("shape")
    return onnx.shape_inference.infer_shapes(model, data_prop=True).graph


def _shape(value: Any) -> Shape | None:
    kind = value.type.tensor_type
    if not kind.HasField("shape") or not all(d.HasField("dim_value") for d in kind.shape.dim):
        return None
    return tuple(d.dim_value for d in kind.shape.dim)


def _itemsize(element_type: int) -> int:
    import onnx

    return int(onnx.helper.tensor_dtype_to_np_dtype(element_type).itemsize)


def count_bundle(bundle: Bundle, sizes: Mapping[str, int] | None = None) -> dict[str, GraphCost]:
    """Count the graphs of a bundle that a picture needs; AnyDoor's `encode` serves refining alone.

    Args:
        bundle: of ONNX graphs.
        sizes: variable dimension -> its size; those of one picture with guidance if None.

    Raises:
        BundleError: the bundle holds plans, which cannot be counted.
    """
    for graph in bundle.manifest.graphs:
        if bundle.graph_file(graph).suffix != ".onnx":
            raise BundleError(
                f"'{bundle.path}' holds plans: operations are counted in the bundle of ONNX graphs that they "
                "were built from"
            )
    sizes = sizes or bundle.manifest.typical_sizes
    graphs = GRAPHS_OF.get(bundle.manifest.system, tuple(bundle.manifest.graphs))
    return {graph: count_graph(bundle.graph_file(graph), graph, sizes) for graph in graphs}
