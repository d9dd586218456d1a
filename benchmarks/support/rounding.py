"""Runs FP16 graphs on a CPU with every result rounded to FP16.

ONNX Runtime has no FP16 arithmetic for the CPU: it computes in FP32 and drops the conversions between
neighbouring operators, so the result of an FP16 graph is far more exact than on any card. Here each operator
computes in FP32 (as the FP32 accumulators of tensor cores do) and its result is rounded by a conversion that
is part of the graph, which ONNX Runtime does not drop. On a card fused operators round less often.

The largest magnitude of every result is measured before it is rounded: above 65504 it would overflow.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper

from engines.backends.onnxruntime.engine import OnnxRuntimeEngine
from engines.bundle import Bundle
from engines.engine import Array, DeviceTensor
from engines.options import EngineOptions

LARGEST_FP16 = float(np.finfo(np.float16).max)

COPYING_OPERATORS = frozenset(
    (
        *("Cast", "Concat", "Expand", "Gather", "Identity", "Reshape", "Shape", "Slice", "Split"),
        *("Squeeze", "Transpose", "Unsqueeze", "Where"),
    )
)
"""Operators that copy numbers and round nothing."""

_EXTREME = "extreme:"


def round_every_result(model: ModelProto) -> list[str]:
    """Rewrite an FP16 graph in place so that each operator computes in FP32 and rounds its result.

    Returns:
        Names of the outputs that were added, `extreme:TENSOR`, each the largest magnitude of a result.
    """
    inferred = onnx.shape_inference.infer_shapes(model).graph
    half = {t.name for t in inferred.initializer if t.data_type == TensorProto.FLOAT16}
    values = (*inferred.input, *inferred.value_info, *inferred.output)
    half |= {v.name for v in values if v.type.tensor_type.elem_type == TensorProto.FLOAT16}
    nodes: list[NodeProto] = []
    widened: dict[str, str] = {}
    extremes: list[str] = []
    for node in model.graph.node:
        if node.op_type in COPYING_OPERATORS or not half & {*node.input, *node.output}:
            nodes.append(node)
            continue
        for name in half & {*node.input} - widened.keys():
            widened[name] = f"{name}:fp32"
            nodes.append(_cast(name, widened[name], TensorProto.FLOAT))
        results = [name for name in node.output if name in half]
        _rename(node, widened, results)
        nodes.append(node)
        for name in results:
            nodes += [_cast(f"{name}:exact", name, TensorProto.FLOAT16), *_measure(name)]
            extremes.append(_EXTREME + name)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    model.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, []) for name in extremes)
    return extremes


def _rename(node: NodeProto, widened: Mapping[str, str], results: Sequence[str]) -> None:
    inputs = [widened.get(name, name) for name in node.input]
    outputs = [f"{name}:exact" if name in results else name for name in node.output]
    del node.input[:], node.output[:]
    node.input.extend(inputs)
    node.output.extend(outputs)


def _cast(source: str, result: str, dtype: int) -> NodeProto:
    return helper.make_node("Cast", [source], [result], to=dtype)


def _measure(name: str) -> list[NodeProto]:
    return [
        helper.make_node("Abs", [f"{name}:exact"], [f"{name}:magnitude"]),
        helper.make_node("ReduceMax", [f"{name}:magnitude"], [_EXTREME + name], keepdims=0),
    ]


class RoundingEngine(OnnxRuntimeEngine):
    """Runs an FP16 bundle with every result rounded, and keeps the largest magnitudes."""

    def __init__(self, bundle: Bundle, threads: int | None = None) -> None:
        super().__init__(bundle, EngineOptions(threads=threads))
        # measures each result at once and frees it: the default order keeps all of them, and the attention
        # scores of a 512 px picture take 20 GB
        self._options.execution_order = self._library.ExecutionOrder.PRIORITY_BASED
        self.extremes: dict[str, dict[str, float]] = {}
        """Graph -> result -> its largest magnitude in all calls so far."""

    def model(self, graph: str, path: Path) -> bytes:
        """Return the rewritten graph; its weights stay in the bundle."""
        model = onnx.load(path, load_external_data=False)
        names = round_every_result(model)
        self.extremes.setdefault(graph, {name.removeprefix(_EXTREME): 0.0 for name in names})
        content: bytes = model.SerializeToString()
        return content

    def run(
        self,
        graph: str,
        inputs: Mapping[str, DeviceTensor | Array],
        outputs: Sequence[str] | None = None,
    ) -> dict[str, DeviceTensor]:
        """Run a graph."""
        self.load(graph)
        extremes = self.extremes[graph]
        names = list(outputs or (spec.name for spec in self._specs[graph].outputs))
        results = super().run(graph, inputs, [*names, *(_EXTREME + name for name in extremes)])
        for name, largest in extremes.items():
            # not max(), which may drop NaN
            found = float(self.to_host(results.pop(_EXTREME + name)))
            extremes[name] = found if not found <= largest else largest
        return results
