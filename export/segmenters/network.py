"""Nodes around a network that comes as ONNX, so that its graph has the inputs and outputs of a bundle."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, compose, helper, numpy_helper

from engines.spec import GraphSpec, TensorSpec

_NETWORK = "network/"
_INSIDE_THE_FILE = 1024
"""Bytes of the largest tensor that stays in the graph's file; the others lie beside it."""


class WrappedNetwork:
    """A network whose inputs are computed by nodes in front of it, and whose outputs by nodes behind it."""

    def __init__(self, model: onnx.ModelProto) -> None:
        """Wraps a copy of a network.

        Args:
            model: with its weights.
        """
        weights = {initializer.name for initializer in model.graph.initializer}
        self._types = {value.name: value.type.tensor_type.elem_type for value in model.graph.input}
        self.inputs = [name for name in self._types if name not in weights]
        """Names of what the network takes."""
        self._model: onnx.ModelProto = compose.add_prefix(model, _NETWORK)
        self._front: list[onnx.NodeProto] = []
        self._back: list[onnx.NodeProto] = []
        self._constants = 0

    def constant(self, values: Any, dtype: Any = np.float32) -> str:
        """Returns a tensor of fixed values."""
        self._constants += 1
        name = f"constant_{self._constants}"
        self._model.graph.initializer.append(numpy_helper.from_array(np.asarray(values, dtype), name))
        return name

    def before(self, operator: str, *inputs: str, **attributes: Any) -> str:
        """Returns a node in front of the network; returns its result."""
        return _add(self._front, "before", operator, inputs, attributes)

    def after(self, operator: str, *inputs: str, **attributes: Any) -> str:
        """Returns a node behind the network; returns its result."""
        return _add(self._back, "after", operator, inputs, attributes)

    def feed(self, name: str, value: str) -> None:
        """Gives the network an input, as numbers of the type that it takes."""
        self._front.append(helper.make_node("Cast", [value], [_NETWORK + name], to=self._types[name]))

    def output(self, name: str) -> str:
        """Returns what the network returns, in float32."""
        return self.after("Cast", _NETWORK + name, to=TensorProto.FLOAT)

    def save(self, path: Path, spec: GraphSpec, results: Sequence[str]) -> None:
        """Writes the graph, its weights beside it in `PATH.data`.

        Args:
            path: where to.
            spec: its signature.
            results: what `output` and `after` have returned, for each output of the signature.
        """
        graph = self._model.graph
        named = [
            helper.make_node("Identity", [result], [tensor.name])
            for result, tensor in zip(results, spec.outputs)
        ]
        nodes = [*self._front, *graph.node, *self._back, *named]
        # sizes that were variable are fixed by what is fed
        for field in (graph.input, graph.output, graph.value_info, graph.node):
            del field[:]
        graph.node.extend(nodes)
        graph.input.extend(_value(tensor) for tensor in spec.inputs)
        graph.output.extend(_value(tensor) for tensor in spec.outputs)
        graph.doc_string = ""
        onnx.save_model(
            self._model,
            path,
            save_as_external_data=True,
            location=f"{path.name}.data",
            size_threshold=_INSIDE_THE_FILE,
        )


def _add(
    nodes: list[onnx.NodeProto], prefix: str, operator: str, inputs: Sequence[str], attributes: dict[str, Any]
) -> str:
    result = f"{prefix}_{len(nodes)}"
    nodes.append(helper.make_node(operator, list(inputs), [result], **attributes))
    return result


def _value(tensor: TensorSpec) -> onnx.ValueInfoProto:
    dtype = helper.np_dtype_to_tensor_dtype(np.dtype(tensor.dtype))
    return helper.make_tensor_value_info(tensor.name, dtype, tensor.shape)


def shape_of(value: onnx.ValueInfoProto) -> tuple[int | None, ...]:
    """Returns the sizes of an input or output; None for one that is variable."""
    return tuple(size.dim_value or None for size in value.type.tensor_type.shape.dim)
