"""Copies of small tensors that need not be made: each is a kernel that takes as long as a large one."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from export.rewrite.rule import PatternRule
from export.rewrite.values import dimensions, scalar


class NarrowIndices(PatternRule):
    """Gather with indices that are cast from int32 to int64 -> Gather with those of int32."""

    name = "int32 indices"

    def pattern(self, op: Any, data: Any, indices: Any) -> Any:
        """Returns what PyTorch's exporter writes for a choice of rows."""
        return op.Gather(data, op.Cast(indices, to=int(ir.DataType.INT64)), _outputs=["chosen"])

    def check(self, context: Any, **found: Any) -> bool:
        """Requires int32, which ONNX allows besides int64."""
        return bool(found["indices"].dtype == ir.DataType.INT32)

    def rewrite(self, op: Any, data: Any, indices: Any, chosen: Any) -> Any:
        """Gather."""
        return op.Gather(data, indices, **chosen.producer().attributes)


class SwappedHalves(PatternRule):
    """[a b], of which the halves are swapped -> [b a], as in the embedding of a timestep.

    Source: `flip_sin_to_cos` of `get_timestep_embedding` in diffusers' models/embeddings.py.
    """

    name = "swapped halves"

    def pattern(self, op: Any, first: Any, second: Any, middle: Any, end: Any, start: Any, until: Any) -> Any:
        """Returns two Slices of a Concat, the other way round."""
        whole = op.Concat(first, second, _outputs=["whole"])
        back = op.Slice(whole, middle, end, _allow_other_inputs=True, _outputs=["back"])
        front = op.Slice(whole, start, until, _allow_other_inputs=True, _outputs=["front"])
        return op.Concat(back, front, _outputs=["swapped"])

    def check(self, context: Any, **found: Any) -> bool:
        """Requires a matrix whose halves lie along the last axis, and slices of just these."""
        shape = dimensions(found["first"])
        if shape is None or len(shape) != 2 or dimensions(found["second"]) != shape:
            return False
        half = shape[1]
        joins = [found[name].producer().attributes["axis"].as_int() for name in ("whole", "swapped")]
        slices = [found[name].producer().inputs for name in ("back", "front")]
        steps = [[scalar(value) for value in inputs[3:]] for inputs in slices]
        bounds = [scalar(found[name]) for name in ("middle", "start", "until")]
        return (
            isinstance(half, int)
            and all(axis in (-1, 1) for axis in joins)
            and all(step in ([1.0], [1.0, 1.0], [-1.0, 1.0]) for step in steps)
            and bounds == [half, 0, half]
            and (scalar(found["end"]) or 0) >= 2 * half
        )

    def rewrite(self, op: Any, first: Any, second: Any, **_: Any) -> Any:
        """Returns one Concat."""
        return op.Concat(second, first, axis=-1)
