"""GEGLU -> two projections, or com.microsoft.BiasSplitGelu."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import onnx_ir as ir

from export.rewrite.rule import MICROSOFT, PatternRule, operator
from export.rewrite.values import describe, dimensions, is_close
from export.rewrite.weights import derived_weight

_WIDTHS = (1280, 2560, 5120)


class BiasSplitGelu(PatternRule):
    """(x + bias), split in two, left times GELU(right) -> BiasSplitGelu, which computes in float32.

    The kernel is compiled for Stable Diffusion's widths: x is (N, L, D), and D / 2 is 1280, 2560 or 5120.

    Sources: BiasSplitGelu in ONNX Runtime's docs/ContribOperators.md; `BiasSplitGelu::ComputeInternal` in
    onnxruntime/contrib_ops/cuda/diffusion/bias_split_gelu.cc.
    """

    name = "BiasSplitGelu"

    def pattern(self, op: Any, x: Any, bias: Any, root: Any, one: Any, half: Any) -> Any:
        """GELU(right) = right (1 + erf(right / sqrt 2)) / 2."""
        left, right = op.Split(op.Add(x, bias), num_outputs=2, _outputs=["left", "right"])
        error = op.Erf(op.Div(right, root), _outputs=["error"])
        return op.Mul(left, op.Mul(right, op.Mul(half, op.Add(error, one))))

    def check(self, context: Any, **found: Any) -> bool:
        """Requires the constants of GELU, a split of the last axis, and a width that the kernel has."""
        constants = {"root": math.sqrt(2), "one": 1.0, "half": 0.5}
        if not all(is_close(found[name], number) for name, number in constants.items()):
            return False
        shape, bias = dimensions(found["x"]), found["bias"]
        axis = found["left"].producer().attributes.get_int("axis", 0)
        if shape is None or axis not in (-1, len(shape) - 1) or dimensions(bias) != shape[-1:]:
            return False
        node, width = found["error"].producer(), shape[-1]
        if len(shape) != 3:
            return self.keep(node, f"its input has {len(shape)} axes")
        if not isinstance(width, int) or width // 2 not in _WIDTHS:
            return self.keep(node, f"its width is {width}, not two times {', '.join(map(str, _WIDTHS))}")
        return True

    def rewrite(self, op: Any, x: Any, bias: Any, **found: Any) -> Any:
        """BiasSplitGelu."""
        return op.BiasSplitGelu(x, bias, _domain=MICROSOFT, _version=1)


def plain_gelu(node: ir.Node) -> str | None:
    """Why an Erf stays that is of no GEGLU: what its GELU takes is no half of a split."""
    divided = node.inputs[0].producer() if node.inputs[0] else None
    argument = divided.inputs[0].producer() if divided and divided.inputs and divided.inputs[0] else None
    return None if argument is None or argument.op_type == "Split" else "a GELU that is no gate"


class TwoProjections(PatternRule):
    """x W + b, split in two along the last axis -> two projections, each with its half of the weights.

    The numbers are the same. The Split is a copy in ONNX Runtime, and a reference kernel in OpenVINO, which
    took 7 % of a UNet's call in BF16.
    """

    name = "two projections"

    def pattern(self, op: Any, x: Any, weight: Any, bias: Any) -> Any:
        """Returns a linear layer of which each half goes its own way."""
        whole = op.Add(op.MatMul(x, weight), bias)
        return op.Split(whole, num_outputs=2, _outputs=["left", "right"])

    def check(self, context: Any, **found: Any) -> bool:
        """Requires weights that are stored, and halves of the last axis."""
        weight, bias, rank = found["weight"], found["bias"], len(dimensions(found["x"]) or ())
        axis = found["left"].producer().attributes.get_int("axis", 0)
        if weight.const_value is None or bias.const_value is None or axis not in (-1, rank - 1):
            return False
        width = weight.const_value.shape[-1]
        return len(weight.const_value.shape) == 2 and width % 2 == 0 and dimensions(bias) == (width,)

    def rewrite(self, op: Any, x: Any, weight: Any, bias: Any, **_: Any) -> Any:
        """Returns two times MatMul and Add."""
        return tuple(self._half(op, x, weight, bias, side) for side in (0, 1))

    def _half(self, op: Any, x: Any, weight: ir.Value, bias: ir.Value, side: int) -> Any:
        assert weight.const_value is not None
        rows, columns = weight.const_value.shape.numpy()
        width, suffix, transform = columns // 2, ("left", "right")[side], partial(_half_of, side=side)
        projected = op.MatMul(x, derived_weight(op, weight, suffix, transform, (rows, width)))
        describe(projected, x, (*(dimensions(x) or ())[:-1], width))
        return op.Add(projected, derived_weight(op, bias, suffix, transform, (width,)))


def _half_of(weights: Any, side: int) -> Any:
    width = weights.shape[-1] // 2
    return weights[..., side * width : (side + 1) * width]


def is_split_projection(node: ir.Node) -> bool:
    """Returns whether a node splits what a linear layer with stored weights returns."""
    if not operator("Split")(node) or node.inputs[0] is None:
        return False
    add = node.inputs[0].producer()
    products = (
        [] if add is None or add.op_type != "Add" else [value.producer() for value in add.inputs if value]
    )
    return any(product is not None and product.op_type == "MatMul" for product in products)
