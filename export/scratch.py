"""Estimates the memory of a graph's intermediate results from the ONNX graph, without running it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import onnx
from onnx import TensorProto, helper

from engines.manifest import CUDA, Manifest


def scratch_of_graph(path: Path, manifest: Manifest, has_attention: bool = False) -> dict[str, int]:
    """Backend -> `scratch_bytes` of a typical call on a CPU; `cuda` -> of the largest call on a card.

    Args:
        path: a graph of the bundle, in standard operators.
        manifest: of the bundle, for its sizes and target. Graphs for `cuda` have attention as one operator.
        has_attention: whether ONNX Runtime has it on a CPU.
    """
    on_a_cpu = scratch_bytes(path, manifest.typical_sizes, has_attention)
    on_a_card = scratch_bytes(path, manifest.largest_sizes, manifest.target == CUDA)
    return {**on_a_cpu, CUDA: on_a_card["onnxruntime"]}


def scratch_bytes(path: Path, sizes: Mapping[str, int], has_attention: bool = False) -> dict[str, int]:
    """Backend -> most bytes of intermediate results that exist at the same time in one call.

    A result exists from the node that makes it to the last node that reads it. What a backend does in place
    or keeps in another layout is not known here, so this is an estimate.

    Args:
        path: an ONNX graph; its weights are not read.
        sizes: variable dimension -> its size in the call.
        has_attention: whether ONNX Runtime computes attention as one operator, without the matrix of scores,
            as OpenVINO always does.
    """
    model = onnx.load(path, load_external_data=False)
    for tensor in (*model.graph.input, *model.graph.output):
        for dimension in tensor.type.tensor_type.shape.dim:
            if dimension.dim_param in sizes:
                dimension.dim_value = sizes[dimension.dim_param]
    # the exporter's own notes have symbols that nothing resolves
    del model.graph.value_info[:]
    model = onnx.shape_inference.infer_shapes(model, data_prop=True)
    inferred = {value.name: value for value in (*model.graph.value_info, *model.graph.output)}
    nbytes = {name: _nbytes(value) for name, value in inferred.items()}
    scores = {_shape(inferred[node.output[0]]) for node in model.graph.node if node.op_type == "Softmax"}
    fused = {name: 0 if _shape(inferred[name]) in scores else size for name, size in nbytes.items()}
    peak = _peak(model.graph, fused)
    return {"onnxruntime": peak if has_attention else _peak(model.graph, nbytes), "openvino": peak}


def _peak(graph: onnx.GraphProto, nbytes: Mapping[str, int]) -> int:
    last_reader = {name: index for index, node in enumerate(graph.node) for name in node.input}
    outputs = {value.name for value in graph.output}
    # backends fold what follows from weights alone when they load the graph
    constants = {initializer.name for initializer in graph.initializer} | {""}
    exists: dict[str, int] = {}
    peak = 0
    for index, node in enumerate(graph.node):
        if constants.issuperset(node.input):
            constants.update(node.output)
            continue
        exists |= {name: nbytes.get(name, 0) for name in node.output}
        peak = max(peak, sum(exists.values()))
        for name in (*node.input, *node.output):
            if name not in outputs and last_reader.get(name, -1) <= index:
                exists.pop(name, None)
    return peak


def _shape(value: onnx.ValueInfoProto) -> tuple[int, ...]:
    return tuple(dimension.dim_value for dimension in value.type.tensor_type.shape.dim)


def _nbytes(value: onnx.ValueInfoProto) -> int:
    dtype = value.type.tensor_type.elem_type
    if dtype in (TensorProto.UNDEFINED, TensorProto.STRING):
        return 0
    return math.prod(_shape(value)) * int(helper.tensor_dtype_to_np_dtype(dtype).itemsize)
