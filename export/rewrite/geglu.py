"""GEGLU -> com.microsoft.BiasSplitGelu."""

from __future__ import annotations

import math
from typing import Any

from export.rewrite.rule import MICROSOFT, Rule
from export.rewrite.values import dimensions, is_close

_WIDTHS = (1280, 2560, 5120)


class BiasSplitGelu(Rule):
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
