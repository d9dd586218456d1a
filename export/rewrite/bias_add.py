"""A linear layer's bias and a residual -> com.microsoft.BiasAdd."""

from __future__ import annotations

import math
from typing import Any

import onnx_ir as ir
from onnxscript.rewriter.pattern import ANY_VALUE

from export.rewrite.rule import MICROSOFT, PatternRule
from export.rewrite.values import (
    describe,
    dimensions,
    is_bias,
    is_read_once,
    linear_bias,
    reshape_result,
)

_WIDTHS = (320, 640, 1280)


class BiasAdd(PatternRule):
    """x + bias + skip -> BiasAdd of (N, L, D), where no normalisation follows that would take them in.

    The kernel is compiled for Stable Diffusion's widths: D is 320, 640 or 1280.

    Sources: BiasAdd in ONNX Runtime's docs/ContribOperators.md; `BiasAdd::ComputeInternal` in
    onnxruntime/contrib_ops/cuda/diffusion/bias_add.cc.
    """

    def __init__(self, picture: bool) -> None:
        """Makes the rule for one form of the pattern.

        Args:
            picture: tokens (N, H W, D) become a picture (N, H, W, D) before the residual is added.
        """
        super().__init__()
        self.name = "BiasAdd of a picture" if picture else "BiasAdd"
        self._picture = picture

    def pattern(self, op: Any, x: Any, bias: Any, skip: Any) -> Any:
        """Returns a linear layer's bias, then the residual."""
        biased = op.Add(x, bias, _outputs=["biased"])
        data = op.Reshape(biased, ANY_VALUE, _outputs=["picture"]) if self._picture else biased
        return op.Add(data, skip, _outputs=["result"])

    def check(self, context: Any, **found: Any) -> bool:
        """Requires a stored bias, a residual of the same shape, and a width that the kernel has."""
        shape = dimensions(found["x"])
        inner = [found[name] for name in ("biased", "picture") if name in found]
        if shape is None or not is_bias(found["bias"], shape) or not all(map(is_read_once, inner)):
            return False
        result = reshape_result(found["picture"]) if self._picture else shape
        if dimensions(found["skip"]) != result or found["skip"].const_value is not None:
            return False
        node = found["result"].producer()
        if len(shape) != 3:
            return self.keep(node, f"its input has {len(shape)} axes")
        if self._picture and not _is_flattened(shape, result):
            return self.keep(node, "its tokens are not the pixels of the picture")
        if shape[-1] not in _WIDTHS:
            return self.keep(node, f"its width is {shape[-1]}, not {', '.join(map(str, _WIDTHS))}")
        return True

    def rewrite(self, op: Any, x: Any, bias: Any, skip: Any, result: Any, **found: Any) -> Any:
        """BiasAdd of tokens."""
        shape = dimensions(x) or ()
        if self._picture:
            skip = describe(op.Reshape(skip, op.Constant(value_ints=[0, *shape[1:]])), skip, shape)
        added = describe(op.BiasAdd(x, bias, skip, _domain=MICROSOFT, _version=1), x, shape)
        if not self._picture:
            return added
        reshape = found["picture"].producer()
        return describe(op.Reshape(added, reshape.inputs[1], **reshape.attributes), x, dimensions(result))


def _is_flattened(shape: Any, picture: Any) -> bool:
    return len(picture) == 4 and math.prod(picture[1:3]) == shape[1] and picture[::3] == shape[::2]


def is_biased_residual(node: ir.Node) -> bool:
    """Returns whether a node adds an activation to what a linear layer with a bias returns."""
    if node.domain or node.op_type != "Add":
        return False
    summands = [value for value in node.inputs if value and value.const_value is None]
    return len(summands) == 2 and any(linear_bias(value) for value in summands)
