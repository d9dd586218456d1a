"""Determines the distribution of a skeleton's noise from the readers of each weight, so that values keep an
ordinary size."""

from __future__ import annotations

import math
from pathlib import Path

import onnx
from onnx import TensorProto, external_data_helper, helper

from export.noise import NoisyWeight

_GAIN = 0.7
"""Standard deviation of a projection's results for inputs of 1: residual blocks add up."""

_SCALES = {
    "GroupNorm": 1,
    "InstanceNormalization": 1,
    "LayerNormalization": 1,
    "SkipGroupNorm": 1,
    "SkipLayerNormalization": 2,
    "Mul": None,
}
"""Operator -> which of its inputs is multiplied with data; None is any."""


def noise_recipe(path: Path) -> list[NoisyWeight]:
    """Returns the weights of a graph that lie in another file, in the order of the graph.

    Args:
        path: an ONNX file; the weights are not read and need not be there.
    """
    graph = onnx.load(path, load_external_data=False).graph
    readers = _readers(graph)
    weights = [w for w in graph.initializer if external_data_helper.uses_external_data(w)]
    return [_describe(weight, *readers[weight.name]) for weight in weights]


def _readers(graph: onnx.GraphProto) -> dict[str, tuple[onnx.NodeProto, int]]:
    """Weight -> the first node that reads it, beyond a Cast, and as which input."""
    readers: dict[str, tuple[onnx.NodeProto, int]] = {}
    for node in graph.node:
        for index, name in enumerate(node.input):
            readers.setdefault(name, (node, index))
    for name, (node, _) in list(readers.items()):
        if node.op_type == "Cast" and node.output[0] in readers:
            readers[name] = readers[node.output[0]]
    return readers


def _describe(weight: TensorProto, reader: onnx.NodeProto, index: int) -> NoisyWeight:
    mean, deviation = _distribution(list(weight.dims), reader, index)
    return NoisyWeight(
        name=weight.name,
        offset=int(external_data_helper.ExternalDataInfo(weight).offset or 0),
        count=math.prod(weight.dims),
        dtype=helper.tensor_dtype_to_np_dtype(weight.data_type).name,
        mean=mean,
        deviation=deviation,
    )


def _distribution(shape: list[int], reader: onnx.NodeProto, index: int) -> tuple[float, float]:
    """Returns mean and standard deviation of a weight that is an input of a node."""
    kind = reader.op_type
    if kind in ("Conv", "NhwcConv") and index == 1:
        return 0.0, _GAIN / math.sqrt(math.prod(shape[1:]))
    if kind == "MatMul":
        return 0.0, _GAIN / math.sqrt(shape[-2])
    if kind == "Gemm" and index == 1:
        transposed = any(attribute.name == "transB" and attribute.i for attribute in reader.attribute)
        return 0.0, _GAIN / math.sqrt(shape[1 if transposed else 0])
    if kind in _SCALES and _SCALES[kind] in (None, index):
        return 1.0, 0.1
    return 0.0, 0.05
