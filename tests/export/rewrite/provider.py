"""The operators that ONNX Runtime adds to ONNX, written from their documentation, limits included.

Sources: onnxruntime's docs/ContribOperators.md, and for what the CUDA kernels refuse their source in
onnxruntime/contrib_ops/cuda. All compute in float32 and round once, like the kernels.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx.reference.op_run import OpRun

Array = NDArray[Any]

DOMAIN = "com.microsoft"


class LimitError(ValueError):
    """The kernel does not take these arguments."""


def require(condition: bool, what: str) -> None:
    if not condition:
        raise LimitError(what)


class MultiHeadAttention(OpRun):  # type: ignore[misc]
    """contrib_ops/cuda/bert/multihead_attention.cc with flash attention (flash_attention/flash_api.cc)."""

    op_domain = DOMAIN
    largest_head: int | None = 256
    head_multiple = 8

    def _run(self, query: Array, key: Array, value: Array, num_heads: int, scale: float) -> tuple[Array]:  # type: ignore[override]
        batch, length, channels = query.shape
        width = channels // num_heads
        require(query.dtype == key.dtype == value.dtype, "one dtype")
        require(key.shape == value.shape and key.shape[::2] == (batch, channels), "keys like queries")
        require(channels == num_heads * width, "heads divide the channels")
        require(width % self.head_multiple == 0, f"a head width that is a multiple of {self.head_multiple}")
        require(self.largest_head is None or width <= self.largest_head, f"heads up to {self.largest_head}")
        heads = [
            tensor.astype(np.float32).reshape(batch, -1, num_heads, width).swapaxes(1, 2)
            for tensor in (query, key, value)
        ]
        scores = heads[0] @ heads[1].swapaxes(2, 3) * np.float32(scale or width**-0.5)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        result = weights / weights.sum(-1, keepdims=True) @ heads[2]
        return (result.swapaxes(1, 2).reshape(batch, length, channels).astype(query.dtype),)
