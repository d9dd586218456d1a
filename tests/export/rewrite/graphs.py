"""Small graphs as the exporter writes them, and how they are run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from tests.export.rewrite.provider import OPERATORS

Array = NDArray[Any]

ONNX_DTYPES = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16}

TOLERANCE = {"float32": 1e-5, "float16": 4e-3}
"""Relative error; float16 has 11 bits, and the plain graph rounds after every operator."""


class Builder:
    """Collects the nodes and weights of a graph."""

    def __init__(self, dtype: str, seed: int = 0) -> None:
        self.dtype = np.dtype(dtype)
        self.random = np.random.default_rng(seed)
        self._inputs: list[onnx.ValueInfoProto] = []
        self._weights: dict[str, Array] = {}
        self._nodes: list[onnx.NodeProto] = []
        self._noted: list[onnx.ValueInfoProto] = []

    def input(self, name: str, *shape: int | str) -> str:
        self._inputs.append(helper.make_tensor_value_info(name, ONNX_DTYPES[self.dtype.name], shape))
        return name

    def constant(self, value: Any, dtype: Any = None) -> str:
        """A weight or a shape; floats have the dtype of the graph if none is given."""
        array = np.asarray(value)
        kind = dtype or (np.int64 if array.dtype.kind == "i" else self.dtype)
        name = f"constant_{len(self._weights)}"
        self._weights[name] = array.astype(kind)
        return name

    def weight(self, *shape: int, dtype: Any = None, mean: float = 0.0, std: float = 1.0) -> str:
        return self.constant(self.random.normal(mean, std, shape), dtype or self.dtype)

    def node(
        self, kind: str, *inputs: str, outputs: int = 1, shape: tuple[int | str, ...] = (), **attributes: Any
    ) -> Any:
        """Adds a node; a shape that cannot be inferred is noted, as the exporter does."""
        names = [f"{kind}_{len(self._nodes)}_{index}" for index in range(outputs)]
        if shape:
            self._noted.append(helper.make_tensor_value_info(names[0], ONNX_DTYPES[self.dtype.name], shape))
        self._nodes.append(helper.make_node(kind, inputs, names, name=names[0], **attributes))
        return names[0] if outputs == 1 else names

    def model(self, *outputs: str) -> ir.Model:
        """The graph with inferred shapes, as an exporter notes them."""
        results = [onnx.ValueInfoProto(name=output) for output in outputs]
        weights = [numpy_helper.from_array(array, name) for name, array in self._weights.items()]
        noted = [value for value in self._noted if value.name not in outputs]
        graph = helper.make_graph(self._nodes, "graph", self._inputs, results, weights, value_info=noted)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
        return ir.from_proto(onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True))


def random_inputs(model: ir.Model, sizes: Mapping[str, int] | None = None, seed: int = 0) -> dict[str, Array]:
    """Normal random inputs of a graph."""
    random = np.random.default_rng(seed)
    return {
        value.name or "": random.normal(
            size=[dim if isinstance(dim, int) else (sizes or {})[str(dim.value)] for dim in value.shape or ()]
        ).astype((value.dtype or ir.DataType.FLOAT).numpy())
        for value in model.graph.inputs
    }


def evaluate(
    model: ir.Model, inputs: Mapping[str, Array], operators: Sequence[Any] = OPERATORS
) -> list[Array]:
    """Runs a graph with ONNX's reference evaluator, its provider's operators with ours."""
    proto = ir.to_proto(ir.external_data.load_to_model(model))
    # its Sigmoid evaluates both of the forms that it chooses from
    with np.errstate(over="ignore", invalid="ignore"):
        return list(ReferenceEvaluator(proto, new_ops=list(operators)).run(None, dict(inputs)))


def relative_error(found: Array, expected: Array) -> float:
    difference = np.linalg.norm(found.astype(np.float64) - expected.astype(np.float64))
    return float(difference / np.linalg.norm(expected.astype(np.float64)))
