"""A sum that is normalised in groups -> com.microsoft.SkipGroupNorm."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir

from export.rewrite.rule import MICROSOFT, PatternRule
from export.rewrite.values import describe, dimensions, is_read_once, linear_bias
from export.rewrite.weights import derived_weight


class SkipGroupNorm(PatternRule):
    """x + skip, then GroupNorm -> SkipGroupNorm, whose second output is the sum.

    The skip is a residual, or what the timestep adds to every pixel. The bias of a convolution or a linear
    layer whose result nothing else reads is added here as well: it would be a kernel of its own. The kernel
    takes pictures (N, H, W, C) and a skip of that shape, of (N, 1, 1, C) or (N, C). It adds in the dtype of
    the picture; like that of GroupNorm it takes the sums with atomic operations.

    Sources: SkipGroupNorm in ONNX Runtime's docs/ContribOperators.md; `GroupNorm::ComputeInternal` in
    onnxruntime/contrib_ops/cuda/diffusion/group_norm.cc and `AddSkipBias` in group_norm_impl_kernel.cuh.
    """

    name = "SkipGroupNorm"

    def pattern(self, op: Any, x: Any, skip: Any, scale: Any, shift: Any) -> Any:
        """Returns both the normalised sum and the sum may have readers."""
        total = op.Add(x, skip, _outputs=["total"])
        return op.GroupNorm(total, scale, shift, _domain=MICROSOFT, _outputs=["normalised"]), total

    def check(self, context: Any, **found: Any) -> bool:
        """Requires a picture, and a skip of its shape or of one pixel."""
        shape, skip = dimensions(found["x"]), dimensions(found["skip"])
        if shape is None or skip is None or dimensions(found["total"]) != shape:
            return False
        pixel = (shape[0], 1, 1, shape[-1])
        if skip not in (shape, pixel):
            return self.keep(found["normalised"].producer(), "its summand is broadcast")
        return True

    def rewrite(self, op: Any, x: Any, skip: Any, scale: Any, shift: Any, normalised: Any, **_: Any) -> Any:
        """SkipGroupNorm, with the biases of the summands."""
        biases = [bias for bias in (_bias(x), _bias(skip)) if bias is not None]
        if len(biases) == 2:
            first, second = biases
            total = partial(np.add, second.const_value)
            biases = [derived_weight(op, first, f"plus_{second.name}", total, first.const_value.shape)]
        result, summed = op.SkipGroupNorm(
            _without_bias(op, x),
            scale,
            shift,
            _without_bias(op, skip),
            *biases,
            **normalised.producer().attributes,
            _domain=MICROSOFT,
            _version=1,
            _outputs=2,
        )
        return describe(result, x, dimensions(x)), describe(summed, x, dimensions(x))


def is_residual_group_norm(node: ir.Node) -> bool:
    """Returns whether a node is a GroupNorm of a sum."""
    if node.op_type != "GroupNorm" or node.inputs[0] is None:
        return False
    add = node.inputs[0].producer()
    return add is not None and add.op_type == "Add"


def _bias(value: ir.Value) -> ir.Value | None:
    """Returns what a convolution or a linear layer adds last, if nothing else reads its result."""
    node = value.producer()
    if node is None or node.op_type != "NhwcConv" or not is_read_once(value):
        return linear_bias(value)
    return node.inputs[2] if len(node.inputs) > 2 else None


def _without_bias(op: Any, value: ir.Value) -> ir.Value:
    """Returns the same without what `_bias` returns."""
    node, bias = value.producer(), _bias(value)
    if node is None or bias is None:
        return value
    if node.op_type == "NhwcConv":
        plain = op.NhwcConv(*node.inputs[:2], **node.attributes, _domain=MICROSOFT, _version=1)
    elif node.op_type == "Reshape":
        plain = op.Reshape(_without_bias(op, node.inputs[0]), node.inputs[1], **node.attributes)  # type: ignore
    else:
        return next(summand for summand in node.inputs if summand and summand is not bias)
    return describe(plain, value, dimensions(value))
