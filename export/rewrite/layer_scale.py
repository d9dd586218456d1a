"""A scale of each channel behind a linear layer -> part of its weights."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir

from export.rewrite.rule import PatternRule
from export.rewrite.values import describe, dimensions, is_bias, is_read_once
from export.rewrite.weights import derived_weight


class LayerScale(PatternRule):
    """(x W + b) s -> x (W s) + (b s), as in DINOv2's residual branches ("LayerScale": Touvron et al., Going
    deeper with Image Transformers, 2021, section 3).

    Weights are multiplied in float32 and rounded once.
    """

    name = "scaled projections"

    def pattern(self, op: Any, x: Any, weight: Any, bias: Any, scale: Any) -> Any:
        """Returns a linear layer, and a factor for each of its channels."""
        projected = op.Add(op.MatMul(x, weight), bias, _outputs=["projected"])
        return op.Mul(projected, scale, _outputs=["scaled"])

    def check(self, context: Any, **found: Any) -> bool:
        """Requires stored weights, and that nothing else reads what is scaled."""
        shape = dimensions(found["projected"])
        if shape is None or not is_read_once(found["projected"]) or found["weight"].const_value is None:
            return False
        return all(is_bias(found[name], shape) for name in ("bias", "scale"))

    def rewrite(self, op: Any, x: Any, weight: Any, bias: Any, scale: Any, scaled: Any, **_: Any) -> Any:
        """MatMul and Add with other weights."""
        suffix, transform = f"times_{scale.name}", partial(_scaled, scale.const_value)
        weights, shift = (
            derived_weight(op, value, suffix, transform, tuple(value.const_value.shape.numpy()))
            for value in (weight, bias)
        )
        projected = describe(op.MatMul(x, weights), scaled, dimensions(scaled))
        return describe(op.Add(projected, shift), scaled, dimensions(scaled))


def _scaled(scale: ir.TensorProtocol, weights: Any) -> Any:
    return weights.astype(np.float32) * scale.numpy().astype(np.float32)


def scaled_for_some(node: ir.Node) -> str | None:
    """Why a scale stays that the rule does not recognise: the layer has other readers."""
    values = [value for value in node.inputs if value and value.const_value is None]
    return "others read the layer without the scale" if not is_read_once(values[0]) else None


def is_layer_scale(node: ir.Node) -> bool:
    """Returns whether a node multiplies what a linear layer returns by stored numbers, one for each
    channel."""
    if node.op_type != "Mul":
        return False
    for value, scale in zip(node.inputs, reversed(node.inputs)):
        add = value.producer() if value else None
        layers = add.inputs if add and add.op_type == "Add" else ()
        products = [summand.producer() for summand in layers if summand]
        if any(product and product.op_type == "MatMul" for product in products):
            return is_bias(scale, dimensions(value) or ())
    return False
