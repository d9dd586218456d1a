"""Estimates the memory of a graph's intermediate results from the ONNX graph, without running it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import onnx
from onnx import NodeProto, TensorProto, helper

from engines.manifest import CUDA, Manifest
from export.rewrite.rule import MICROSOFT


def scratch_of_graph(path: Path, manifest: Manifest, has_attention: bool = False) -> dict[str, int]:
    """Backend -> `scratch_bytes` of a typical call on a CPU; `cuda` -> of the largest call on a card.

    Args:
        path: a graph of the bundle, in standard operators.
        manifest: of the bundle, for its sizes.
        has_attention: whether ONNX Runtime has attention as one operator on a CPU.
    """
    on_a_cpu = scratch_bytes(path, manifest.typical_sizes, has_attention)
    on_a_card = scratch_bytes(path, manifest.largest_sizes)
    return {**on_a_cpu, CUDA: on_a_card["onnxruntime"]}


def scratch_on_a_card(path: Path, manifest: Manifest) -> int:
    """Bytes of intermediate results of the largest call of a graph that was rewritten for cards.

    Args:
        path: a graph of the bundle, in the operators of ONNX Runtime's CUDA provider.
        manifest: of the bundle, for its sizes.
    """
    model = _with_sizes(path, manifest.largest_sizes)
    return _peak(model.graph, result_bytes(model))


def result_bytes(model: onnx.ModelProto) -> dict[str, int]:
    """Bytes of each result of a graph without variable dimensions, by its name.

    Args:
        model: in standard operators, or those of ONNX Runtime's CUDA provider.
    """
    standard = onnx.ModelProto()
    standard.CopyFrom(model)
    del standard.graph.node[:]
    for node in model.graph.node:
        standard.graph.node.extend(_of_the_same_shape(node) if node.domain == MICROSOFT else [node])
    return {name: _nbytes(value) for name, value in _inferred(standard).items()}


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
    model = _with_sizes(path, sizes)
    inferred = _inferred(model)
    nbytes = {name: _nbytes(value) for name, value in inferred.items()}
    scores = {_shape(inferred[node.output[0]]) for node in model.graph.node if node.op_type == "Softmax"}
    fused = {name: 0 if _shape(inferred[name]) in scores else size for name, size in nbytes.items()}
    peak = _peak(model.graph, fused)
    return {"onnxruntime": peak if has_attention else _peak(model.graph, nbytes), "openvino": peak}


def _with_sizes(path: Path, sizes: Mapping[str, int]) -> onnx.ModelProto:
    model = onnx.load(path, load_external_data=False)
    for tensor in (*model.graph.input, *model.graph.output):
        for dimension in tensor.type.tensor_type.shape.dim:
            if dimension.dim_param in sizes:
                dimension.dim_value = sizes[dimension.dim_param]
    # the exporter's own notes have symbols that nothing resolves
    del model.graph.value_info[:]
    return model


def _inferred(model: onnx.ModelProto) -> dict[str, onnx.ValueInfoProto]:
    graph = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    return {value.name: value for value in (*graph.value_info, *graph.output)}


def _of_the_same_shape(node: NodeProto) -> list[NodeProto]:
    """Returns standard operators with the shapes of one of the provider's, which onnx cannot infer."""
    first, *others = node.output
    if node.op_type == "NhwcConv":
        attributes = {each.name: helper.get_attribute_value(each) for each in node.attribute}
        picture, kernel, result = (f"{first}_{name}_nchw" for name in ("picture", "kernel", "result"))
        return [
            helper.make_node("Transpose", [node.input[0]], [picture], perm=[0, 3, 1, 2]),
            helper.make_node("Transpose", [node.input[1]], [kernel], perm=[0, 3, 1, 2]),
            helper.make_node("Conv", [picture, kernel], [result], **attributes),
            helper.make_node("Transpose", [result], [first], perm=[0, 2, 3, 1]),
        ]
    if node.op_type == "BiasSplitGelu":
        halves = [first, f"{first}_gate"]
        return [helper.make_node("Split", [node.input[0]], halves, axis=-1, num_outputs=2)]
    # attention has the shape of the queries, normalisations and sums that of what they change
    return [helper.make_node("Identity", [node.input[0]], [name]) for name in (first, *others) if name]


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
