"""2-D convolution -> com.microsoft.NhwcConv."""

from __future__ import annotations

from typing import Any

import numpy as np

from export.rewrite.layout import channels_first, channels_last, last
from export.rewrite.rule import MICROSOFT, PatternRule
from export.rewrite.values import describe, dimensions
from export.rewrite.weights import derived_weight

_ATTRIBUTES = ("strides", "pads", "dilations", "group", "kernel_shape")


class Convolution(PatternRule):
    """Conv of (N, C, H, W) -> NhwcConv of (N, H, W, C) with weights (M, kH, kW, C / group).

    Tensor cores read channels last; with channels first cuDNN transposes before and after every convolution.
    The kernel is Conv's own for another layout, in float16 and float32. This rule uses it for pictures alone.

    Sources: NhwcConv in ONNX Runtime's docs/ContribOperators.md; onnxruntime/contrib_ops/cuda/diffusion/
    nhwc_conv.cc; for the layout of the weights `Conv::PrePack` in onnxruntime/core/providers/cuda/nn/conv.cc,
    which brings those of the same kernel in another domain to {M, kH, kW, C/group}.
    """

    name = "NhwcConv"

    def pattern(self, op: Any, x: Any, weight: Any) -> Any:
        """Returns a convolution, with a bias or without."""
        return op.Conv(x, weight, _allow_other_inputs=True, _outputs=["result"])

    def check(self, context: Any, **found: Any) -> bool:
        """Requires pictures, explicit padding, and weights that are stored."""
        node, weight = found["result"].producer(), found["weight"]
        if weight.const_value is None:
            return self.keep(node, "its weights are computed")
        if len(weight.const_value.shape) != 4:
            return self.keep(node, f"it has {len(weight.const_value.shape) - 2} spatial axes")
        if node.attributes.get_string("auto_pad", "NOTSET") != "NOTSET":
            return self.keep(node, "its padding is automatic")
        return True

    def rewrite(self, op: Any, x: Any, weight: Any, result: Any) -> Any:
        """NhwcConv between the two layouts."""
        node = result.producer()
        outputs, inputs, *kernel = weight.const_value.shape
        transposed = derived_weight(op, weight, "nhwc", _filters_last, (outputs, *kernel, inputs))
        attributes = {name: node.attributes[name] for name in _ATTRIBUTES if name in node.attributes}
        picture = op.NhwcConv(
            channels_last(op, x), transposed, *node.inputs[2:], **attributes, _domain=MICROSOFT, _version=1
        )
        return channels_first(op, describe(picture, x, last(dimensions(result))))


def _filters_last(weights: Any) -> Any:
    return np.transpose(weights, (0, 2, 3, 1))
