"""Scaled dot-product attention -> com.microsoft.MultiHeadAttention."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript.rewriter.pattern import ANY_VALUE

from export.rewrite.rule import MICROSOFT, PatternRule
from export.rewrite.values import (
    constant,
    dimensions,
    permuted,
    reshape_result,
    reshaped,
    scalar,
    shape_items,
)


class TransposedKeys(PatternRule):
    """Keys that are transposed as (B H, L, D) -> one Transpose of (B, H, L, D).

    PyTorch's exporter writes Reshape, Transpose, Reshape, with shapes that it computes at run time where a
    dimension is variable.
    """

    name = "transposed keys"

    def pattern(self, op: Any, keys: Any, flat_shape: Any, full_shape: Any) -> Any:
        """Maps (B, H, L, D) to (B H, L, D) -> (B H, D, L) -> (B, H, D, L)."""
        return op.Reshape(op.Transpose(op.Reshape(keys, flat_shape), perm=[0, 2, 1]), full_shape)

    def check(self, context: Any, **found: Any) -> bool:
        """Requires that the reshapes leave the last two axes alone."""
        source = dimensions(found["keys"])
        flat, full = shape_items(found["flat_shape"]), shape_items(found["full_shape"])
        if source is None or len(source) != 4 or flat is None or len(flat) != 3:
            return False
        return flat[1:] == source[2:] and reshaped(source, full) == permuted(source, (0, 1, 3, 2))

    def rewrite(self, op: Any, keys: Any, **_: Any) -> Any:
        """Maps (B, H, L, D) to (B, H, D, L)."""
        return op.Transpose(keys, perm=[0, 1, 3, 2])


@dataclass(frozen=True)
class HeadLimits:
    """Which head widths a kernel of MultiHeadAttention takes."""

    multiple_of: int = 1
    largest: int | None = None


CUDA_HEADS = HeadLimits(multiple_of=8, largest=256)
"""Flash attention, FP16: `flash::is_supported` in onnxruntime/contrib_ops/cuda/bert/flash_attention/
flash_api.cc. In FP32 it is memory-efficient attention, for the same multiple and up to 1024 channels
(`has_memory_efficient_attention` in cutlass_fmha/memory_efficient_attention.h). For the decoder's one head of
512 channels that was no faster than the plain operators on an H100, so one limit does for both."""

CPU_HEADS = HeadLimits()
"""Any width, but float32 alone: onnxruntime/contrib_ops/cpu/bert/multihead_attention.cc."""


_LOW = -1e4
"""What a mask adds to scores that do not count is less."""


class Attention(PatternRule):
    """Heads split, scores scaled, Softmax, heads merged -> MultiHeadAttention of (B, L, H D) tensors.

    No matrix of scores is made where the kernel is flash attention. Queries may be more or fewer than keys.
    The scale is 1 / sqrt(D) unless the graph has another one. Source: MultiHeadAttention in ONNX Runtime's
    docs/ContribOperators.md; the limits are those of the kernel, see `CUDA_HEADS` and `CPU_HEADS`.
    """

    name = "MultiHeadAttention"
    causal = False

    def __init__(self, heads: HeadLimits) -> None:
        super().__init__()
        self._heads = heads

    def pattern(
        self, op: Any, query: Any, key: Any, value: Any, query_scale: Any, key_scale: Any, merged_shape: Any
    ) -> Any:
        """Softmax(s Q (s K)^T) V for every head."""
        return self._pattern(
            op, query, key, value, query_scale, key_scale, merged_shape, lambda scores: scores
        )

    def _pattern(
        self,
        op: Any,
        query: Any,
        key: Any,
        value: Any,
        query_scale: Any,
        key_scale: Any,
        merged_shape: Any,
        masked: Callable[[Any], Any],
    ) -> Any:
        def split(data: Any, output: str) -> Any:
            return op.Transpose(op.Reshape(data, ANY_VALUE, _outputs=[output]), perm=[0, 2, 1, 3])

        queries, values = split(query, "queries"), split(value, "values")
        keys = op.Transpose(split(key, "keys"), perm=[0, 1, 3, 2])
        scores = op.MatMul(op.Mul(queries, query_scale), op.Mul(keys, key_scale))
        weights = op.Softmax(masked(scores), axis=-1, _outputs=["weights"])
        merged = op.Transpose(op.MatMul(weights, values), perm=[0, 2, 1, 3])
        return op.Reshape(merged, merged_shape)

    def check(self, context: Any, **found: Any) -> bool:
        """Requires that heads are split and merged along the last axis, and a head width of the kernel's."""
        split = _split_heads(found["queries"])
        others = [_split_heads(found[name]) for name in ("keys", "values")]
        if split is None or any(other != split for other in others) or _scale(found) is None:
            return False
        width, whole = split[1], dimensions(found["query"]) or ()
        if reshaped((*whole[:2], *split), shape_items(found["merged_shape"])) != whole:
            return False
        softmax, limits = found["weights"].producer(), self._heads
        if limits.largest is not None and width > limits.largest:
            return self.keep(softmax, f"heads of {width} channels are wider than {limits.largest}")
        if width % limits.multiple_of:
            return self.keep(softmax, f"heads of {width} channels are not a multiple of {limits.multiple_of}")
        return True

    def rewrite(self, op: Any, query: Any, key: Any, value: Any, **found: Any) -> Any:
        """MultiHeadAttention."""
        split, scale = _split_heads(found["queries"]), _scale(found)
        assert split is not None
        assert scale is not None
        heads, width = split
        usual = 1 / math.sqrt(width)
        # its square root was rounded to the dtype of the graph, twice
        rounded = constant(found["query_scale"])
        assert rounded is not None
        if math.isclose(scale, usual, rel_tol=2 * float(np.finfo(rounded.dtype).eps)):
            scale = usual
        causal = {"unidirectional": 1} if self.causal else {}
        return op.MultiHeadAttention(
            query, key, value, num_heads=heads, scale=scale, **causal, _domain=MICROSOFT, _version=1
        )


class CausalAttention(Attention):
    """The same with a mask that lets no query see a later key -> `unidirectional` MultiHeadAttention."""

    name = "causal MultiHeadAttention"
    causal = True

    def pattern(  # type: ignore[override]
        self,
        op: Any,
        query: Any,
        key: Any,
        value: Any,
        query_scale: Any,
        key_scale: Any,
        merged_shape: Any,
        mask: Any,
    ) -> Any:
        """Softmax(s Q (s K)^T + mask) V for every head."""
        return self._pattern(
            op, query, key, value, query_scale, key_scale, merged_shape, lambda scores: op.Add(scores, mask)
        )

    def check(self, context: Any, **found: Any) -> bool:
        """Requires a causal mask, and as many keys as queries."""
        lengths = [(dimensions(found[name]) or (None, None))[1] for name in ("query", "key")]
        if not _is_causal(found["mask"]) or not isinstance(lengths[0], int) or lengths[0] != lengths[1]:
            return False
        return super().check(context, **found)


def single_head(node: ir.Node) -> str | None:
    """Why a Softmax stays that the rules do not recognise: there is one head, and nothing splits it off."""
    scores = dimensions(node.inputs[0])
    is_single = scores is not None and (len(scores) == 3 or (len(scores) == 4 and scores[1] == 1))
    return "a single head that no reshape splits off" if is_single else None


def _is_causal(mask: ir.Value) -> bool:
    """Returns whether a mask is 0 up to the diagonal and very low above it, as PyTorch's exporter computes
    it."""
    where = mask.producer()
    if where is None or where.op_type != "Where":
        return False
    above, low, zero = where.inputs
    equal = above.producer() if above else None
    lowest = scalar(low)
    if equal is None or equal.op_type != "Equal" or lowest is None or lowest > _LOW or scalar(zero) != 0:
        return False
    triangle = equal.inputs[0].producer() if equal.inputs[0] else None
    if triangle is None or triangle.op_type != "Trilu" or scalar(equal.inputs[1]) != 0:
        return False
    is_lower = not triangle.attributes.get_int("upper", 1)
    on_diagonal = len(triangle.inputs) == 1 or scalar(triangle.inputs[1]) == 0
    ones = triangle.inputs[0].producer() if triangle.inputs[0] else None
    return (
        is_lower
        and on_diagonal
        and ones is not None
        and ones.op_type == "Expand"
        and scalar(ones.inputs[0]) == 1
    )


def _scale(found: Mapping[str, ir.Value]) -> float | None:
    """Returns what scores are multiplied by; None if it is not constant."""
    scales = [scalar(found[name]) for name in ("query_scale", "key_scale")]
    return None if None in scales else math.prod(scale or 0 for scale in scales)


def _split_heads(split: ir.Value) -> tuple[int, int] | None:
    """Returns (H, D) if a Reshape splits (B, L, H D) into (B, L, H, D), else None."""
    reshape = split.producer()
    assert reshape is not None
    whole, parts = dimensions(reshape.inputs[0]), reshape_result(split)
    if whole is None or parts is None or len(whole) != 3 or len(parts) != 4 or parts[:2] != whole[:2]:
        return None
    heads, width = parts[2:]
    if not isinstance(heads, int) or not isinstance(width, int) or heads * width != whole[2]:
        return None
    return heads, width
