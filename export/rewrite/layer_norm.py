"""Layer normalisation between casts -> LayerNormalization in FP16."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from export.rewrite.rule import PatternRule
from export.rewrite.weights import derived_weight

_FLOAT, _HALF = int(ir.DataType.FLOAT), int(ir.DataType.FLOAT16)


class HalfLayerNorm(PatternRule):
    """Cast to float32, LayerNormalization, Cast back -> LayerNormalization of FP16.

    The statistics are float32 in the kernel, so a row of large activations does not overflow:
    `HostApplyLayerNorm<half, float, half>` in onnxruntime/core/providers/cuda/nn/layer_norm_impl.cu.
    """

    name = "LayerNormalization in FP16"

    def pattern(self, op: Any, x: Any, scale: Any, shift: Any) -> Any:
        """Normalisation in float32 between neighbours in float16."""
        data = op.Cast(x, to=_FLOAT)
        return op.Cast(op.LayerNormalization(data, scale, shift, _outputs=["normalised"]), to=_HALF)

    def check(self, context: Any, **found: Any) -> bool:
        """Requires weights that are stored."""
        stored = all(found[name].const_value is not None for name in ("scale", "shift"))
        return bool(stored and found["x"].dtype == ir.DataType.FLOAT16)

    def rewrite(self, op: Any, x: Any, scale: Any, shift: Any, normalised: Any) -> Any:
        """LayerNormalization with weights in FP16."""
        weights = [
            derived_weight(op, value, "half", np.asarray, value.const_value.shape, ir.DataType.FLOAT16)
            for value in (scale, shift)
        ]
        return op.LayerNormalization(x, *weights, **normalised.producer().attributes)


def is_cast_layer_norm(node: ir.Node) -> bool:
    """Returns whether a node is a LayerNormalization of activations that were cast from FP16."""
    if node.op_type != "LayerNormalization" or node.inputs[0] is None:
        return False
    cast = node.inputs[0].producer()
    source = cast.inputs[0] if cast is not None and cast.op_type == "Cast" else None
    return source is not None and source.dtype == ir.DataType.FLOAT16
