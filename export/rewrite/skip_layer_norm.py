"""A residual that is normalised -> com.microsoft.SkipLayerNormalization."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from export.rewrite.rule import MICROSOFT, PatternRule
from export.rewrite.values import describe, differing_summands, dimensions, is_bias, is_read_once


class SkipLayerNorm(PatternRule):
    """x + bias + skip, then LayerNormalization -> SkipLayerNormalization, whose fourth output is the sum.

    ONNX Runtime fuses the two itself where nothing else reads the sum (`CheckFirstAdd` in onnxruntime/core/
    optimizer/skip_layer_norm_fusion.cc); in a transformer the next residual always does. The kernel takes
    (N, L, D) or (L, D) and a skip of the same shape. It sums in float32 if the provider has the option
    enable_skip_layer_norm_strict_mode, which the engine sets.

    Sources: SkipLayerNormalization in ONNX Runtime's docs/ContribOperators.md; `ComputeInternal` in
    onnxruntime/contrib_ops/cuda/bert/skip_layer_norm.cc.
    """

    def __init__(self, biased: bool) -> None:
        """Makes the rule for one form of the pattern.

        Args:
            biased: one of the summands is the result of a linear layer, whose bias is added here.
        """
        super().__init__()
        self.name = "SkipLayerNormalization with bias" if biased else "SkipLayerNormalization"
        self._biased = biased

    def pattern(self, op: Any, x: Any, bias: Any, skip: Any, scale: Any, shift: Any) -> Any:
        """Returns both the normalised sum and the sum have readers."""
        summand = op.Add(x, bias, _outputs=["summand"]) if self._biased else x
        total = op.Add(summand, skip, _outputs=["total"])
        return op.LayerNormalization(total, scale, shift, _outputs=["normalised"]), total

    def check(self, context: Any, **found: Any) -> bool:
        """Requires summands of one shape, a bias that is read once, and the last axis."""
        shape = dimensions(found["x"])
        if shape is None or dimensions(found["skip"]) != shape:
            return False
        if self._biased and not (is_bias(found["bias"], shape) and is_read_once(found["summand"])):
            return False
        node = found["normalised"].producer()
        if len(shape) not in (2, 3):
            return self.keep(node, f"its input has {len(shape)} axes")
        if node.attributes.get_int("axis", -1) not in (-1, len(shape) - 1):
            return self.keep(node, "it normalises more than the last axis")
        return True

    def rewrite(
        self, op: Any, x: Any, skip: Any, scale: Any, shift: Any, normalised: Any, total: Any, **found: Any
    ) -> Any:
        """SkipLayerNormalization, without its statistics."""
        result, _, _, summed = op.SkipLayerNormalization(
            x,
            skip,
            scale,
            shift,
            *([found["bias"]] if self._biased else []),
            epsilon=normalised.producer().attributes.get_float("epsilon", 1e-5),
            _domain=MICROSOFT,
            _version=1,
            _outputs=4,
        )
        return describe(result, x, dimensions(x)), describe(summed, x, dimensions(x))


def is_residual_layer_norm(node: ir.Node) -> bool:
    """Returns whether a node is a LayerNormalization of the sum of two activations."""
    if node.op_type != "LayerNormalization" or node.inputs[0] is None:
        return False
    add = node.inputs[0].producer()
    return (
        add is not None
        and add.op_type == "Add"
        and all(value is not None and value.const_value is None for value in add.inputs)
    )


def broadcast_sum(node: ir.Node) -> str | None:
    """Why such a LayerNormalization stays that no rule recognises, as that of a text's embeddings."""
    return differing_summands(node.inputs[0].producer() if node.inputs[0] else None)
