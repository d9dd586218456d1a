"""Linear layers of one input -> one matrix product, and a Split."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence

import onnx_ir as ir
import onnx_ir.passes.common as passes

from export.rewrite.rule import Rule
from export.rewrite.values import describe, dimensions
from export.rewrite.weights import joined_weight

_FEWEST = 4
"""Three products, of queries, keys and values, would become a product and a copy of all that it returns."""

_MOST = 32
"""The Split of more parts, or of unequal ones, copies their addresses from the memory of the host first."""


class JoinedProjections(Rule):
    """x W1, x W2, .. of one width -> x [W1 W2 ..] and its parts; with biases where they are part of a Gemm.

    The keys and values of all cross-attentions read the same tokens, and all residual blocks the same
    embedding of the timestep. Each product is too small to occupy a card, and a Gemm with a bias is two
    kernels. The numbers are the same.

    Source: `Split::ComputeInternal` in onnxruntime/core/providers/cuda/tensor/split.cc.
    """

    name = "joined projections"

    def apply(self, model: ir.Model) -> int:
        """Joins what can be. Returns how many joined products that makes."""
        alike: defaultdict[Hashable, list[ir.Node]] = defaultdict(list)
        for node in model.graph:
            if is_projection(node):
                alike[_kind(node)].append(node)
        groups = [nodes[at : at + _MOST] for nodes in alike.values() for at in range(0, len(nodes), _MOST)]
        groups = [nodes for nodes in groups if len(nodes) >= _FEWEST]
        for nodes in groups:
            _join(model.graph, nodes)
        if groups:
            passes.RemoveUnusedNodesPass()(model)
        return len(groups)


def is_projection(node: ir.Node) -> bool:
    """Returns whether a node is a linear layer whose weights are stored."""
    if node.domain or node.op_type not in ("MatMul", "Gemm"):
        return False
    weights = [value.const_value if value else None for value in node.inputs[1:]]
    return None not in weights and weights[0] is not None and len(weights[0].shape) == 2


def _kind(node: ir.Node) -> Hashable:
    shapes = tuple((value.dtype, *(dimensions(value) or ())) for value in node.inputs[1:] if value)
    attributes = tuple(sorted((name, str(attribute.value)) for name, attribute in node.attributes.items()))
    return node.op_type, node.inputs[0], shapes, attributes


def _join(graph: ir.Graph, nodes: Sequence[ir.Node]) -> None:
    """Puts one product and a Split before the first of some linear layers, and removes these."""
    first, x = nodes[0], nodes[0].inputs[0]
    axis = 0 if first.attributes.get_int("transB", 0) else 1
    stacks = [[value for value in values if value] for values in zip(*(node.inputs[1:] for node in nodes))]
    weights = [joined_weight(graph, stack, side) for stack, side in zip(stacks, (axis, 0))]
    product = ir.node(first.op_type, [x, *weights], first.attributes)
    result = first.outputs[0]
    assert result.shape is not None
    *rows, width = result.shape
    describe(product.outputs[0], result, (*rows, width * len(nodes)))
    split = ir.node("Split", product.outputs, {"axis": -1, "num_outputs": len(nodes)}, num_outputs=len(nodes))
    graph.insert_before(first, [product, split])
    for node, part in zip(nodes, split.outputs):
        describe(part, node.outputs[0], dimensions(node.outputs[0]))
        ir.convenience.replace_all_uses_with(node.outputs[0], part, replace_graph_outputs=True)
        graph.remove(node, safe=True)
