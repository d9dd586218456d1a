"""Computes rewritten weights when the graph is saved, so that they need not be in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

Transform = Callable[[NDArray[Any]], NDArray[Any]]


def derived_weight(
    op: Any,
    weight: ir.Value,
    suffix: str,
    transform: Transform,
    shape: Sequence[int],
    dtype: ir.DataType | None = None,
) -> ir.Value:
    """Returns a weight that is computed from another one.

    Args:
        op: the builder of the replacement.
        weight: an initializer.
        suffix: of the new weight's name; the same weight with the same suffix is stored once.
        transform: old array -> new array.
        shape: of the new array.
        dtype: of the new array; as the old one if None.
    """
    graph, tensor = weight.graph, weight.const_value
    assert isinstance(graph, ir.Graph)
    assert tensor is not None
    name = f"{weight.name}_{suffix}"
    if name in graph.initializers:
        return graph.initializers[name]
    lazy = _lazy(tensor, name, transform, shape, dtype or tensor.dtype)
    return op.initializer(lazy, name)  # type: ignore[no-any-return]


def joined_weight(graph: ir.Graph, weights: Sequence[ir.Value], axis: int) -> ir.Value:
    """Returns a weight that is several others of one shape and dtype, one behind the other.

    Args:
        graph: stores them, and the new one.
        weights: initializers.
        axis: along which they are joined.
    """
    tensors = [weight.const_value for weight in weights if weight.const_value is not None]
    shape = list(tensors[0].shape.numpy())
    shape[axis] *= len(tensors)

    def join(_: NDArray[Any]) -> NDArray[Any]:
        return np.concatenate([tensor.numpy() for tensor in tensors], axis)

    name, dtype = f"{weights[0].name}_joined", tensors[0].dtype
    lazy = _lazy(tensors[0], name, join, shape, dtype)
    value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype), const_value=lazy)
    graph.register_initializer(value)
    return value


def fold_casts(graph: ir.Graph) -> None:
    """Replaces casts of weights by weights of the other dtype, so that patterns see weights.

    Bundles in FP32 store weights that are exact in FP16 as such (`export.weights`).
    """
    for node in list(graph):
        if node.op_type != "Cast" or node.inputs[0] is None or not node.inputs[0].is_initializer():
            continue
        tensor, result = node.inputs[0].const_value, node.outputs[0]
        if tensor is None or result.is_graph_output():
            continue
        dtype, name = ir.DataType(node.attributes.get_int("to")), result.name or ""
        result.name = f"{name}_cast"
        lazy = _lazy(tensor, name, np.asarray, tuple(tensor.shape.numpy()), dtype)
        weight = ir.Value(name=name, shape=result.shape, type=ir.TensorType(dtype), const_value=lazy)
        graph.register_initializer(weight)
        ir.convenience.replace_all_uses_with(result, weight)
        graph.remove(node, safe=True)


def _lazy(
    tensor: ir.TensorProtocol, name: str, transform: Transform, shape: Sequence[int], dtype: ir.DataType
) -> ir.LazyTensor:
    def compute() -> ir.Tensor:
        array = transform(tensor.numpy()).astype(dtype.numpy())
        return ir.Tensor(np.ascontiguousarray(array), name=name)

    return ir.LazyTensor(compute, dtype=dtype, shape=ir.Shape(shape), name=name)
